"""Dense tensor parallelism under DeepSpeed, at every ZeRO stage, against one process of stock Hugging Face.

As test_layouts.py, whose oracle it takes: three steps with a clip that binds; loss, norm, clip factor, token counts and
every weight after the third step, put together from the parts.
"""

import pytest
import torch
from test_layouts import AUX, CPU, Z, oracle, recipe_for, tokens

from moe_train.optim import Engine, optimizer_factory
from moe_train.parallel import Topology, build_groups
from moe_train.testing import run_distributed
from moe_train.train.assemble import build_sharded_model
from moe_train.train.check import ResolvedRun
from moe_train.train.objective import ObjectiveScale


def train(rank: int, recipe, world: int, expert: int, tensor: int):
    run = ResolvedRun.at(recipe, Topology(world=world, expert=expert, tensor=tensor))
    groups = build_groups(run.topology)
    built, store = build_sharded_model(run, groups, CPU)
    engine = Engine(built.model, store, optimizer_factory(recipe.optimizer, CPU), recipe, groups, run.accumulation)
    assert engine.deepspeed.train_batch_size() == recipe.batch.global_size
    scale = ObjectiveScale(tokens=8 * 16, sequences=8, num_moe_layers=built.num_balanced_layers, aux_coef=AUX, z_coef=Z)
    size, data = recipe.batch.micro_size, groups.data
    records = []
    for batch in tokens():
        total = torch.zeros((), dtype=torch.float64)
        for number in range(run.accumulation):
            start = (number * data.world_size + data.rank_in_group) * size
            part = batch[start : start + size]
            with built.context.micro_batch():
                loss = engine(input_ids=part[:, :-1], labels=part[:, 1:]).loss
                objective = scale.objective(loss, built.context.losses)
                engine.backward(objective * data.world_size, last=number == run.accumulation - 1)
            total += objective.detach()
        data.all_reduce_(total)
        result = engine.step(recipe.optimizer.lr)
        counts = groups.world.all_reduce_(built.context.take_counts())
        records.append((float(total), result.grad_norm, result.clip_factor, result.skipped, counts))
    fragments = [*engine.dense_fragments(), *engine.store.fragments()]
    return records, [(f, f.views["master"].clone(), f.views["exp_avg"].clone()) for f in fragments]


def compare(results, expected, tolerance: float, weight_tolerance: float | None = None) -> None:
    """Weights of every rank, those of ranks that save nothing included."""
    records, params = expected
    for rank, (found, _) in enumerate(results):
        for step, ((loss, norm, clip, skipped, counts), (e_loss, e_norm, e_counts)) in enumerate(
            zip(found, records, strict=True)
        ):
            where = f"rank {rank}, step {step}"
            assert loss == pytest.approx(e_loss, rel=tolerance), where
            assert norm == pytest.approx(e_norm, rel=10 * tolerance), where
            assert clip == pytest.approx(0.1 / (e_norm + 1e-6), rel=10 * tolerance), where
            assert clip < 1, "the clip must bind, or the test shows less than it says"
            assert not skipped
            assert torch.equal(counts, e_counts), where
    seen = {name: torch.zeros(p.shape, dtype=torch.int) for name, p in params.items()}
    for rank, (_, pieces) in enumerate(results):
        for fragment, values, moments in pieces:
            whole = params[fragment.name] if fragment.expert is None else params[fragment.name][fragment.expert]
            assert tuple(whole.shape) == fragment.shape, fragment.name
            local = whole if fragment.part is None else fragment.part.take(whole)
            error = float((values - local.flatten()[fragment.start : fragment.stop]).abs().max())
            assert error < (weight_tolerance or 200 * tolerance), f"rank {rank}, {fragment.name}: {error:.2e}"
            assert moments.shape == values.shape
            assert fragment.expert is not None or moments.abs().max() > 0 or "experts" in fragment.name
            if fragment.owner:
                held = torch.zeros(local.numel(), dtype=torch.int)
                held[fragment.start : fragment.stop] = 1
                count = seen[fragment.name] if fragment.expert is None else seen[fragment.name][fragment.expert]
                here = torch.zeros(whole.shape, dtype=torch.int)
                if fragment.part is None:
                    here = held.view(whole.shape)
                else:
                    fragment.part.put(here, held.view(local.shape))
                count += here
    wrong = [name for name, count in seen.items() if not (count == 1).all()]
    assert not wrong, f"every element exactly once: {wrong}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "expert"), [(2, 1), (4, 2)])
def test_qwen3_moe_at_every_stage(world, expert, stage):
    recipe = recipe_for("qwen3_moe", stage, batch={"micro_size": 2})
    compare(run_distributed(train, world, recipe, world, expert, 2), oracle(recipe), 2e-6)


@pytest.mark.parametrize(("family", "stage"), [("mixtral", 3), ("qwen2_moe", 1), ("olmoe", 3), ("deepseek_v3", 2)])
def test_every_family_on_two_copies_of_two_ranks(family, stage):
    recipe = recipe_for(family, stage)
    compare(run_distributed(train, 4, recipe, 4, 2, 2), oracle(recipe), 2e-6)


@pytest.mark.parametrize(("family", "stage"), [("olmoe", 0), ("deepseek_v3", 3)])
def test_four_ranks_share_one_dense_part(family, stage):
    recipe = recipe_for(family, stage)
    compare(run_distributed(train, 4, recipe, 4, 4, 4), oracle(recipe), 2e-6)


@pytest.mark.parametrize(("family", "stage"), [("qwen3_moe", 3), ("deepseek_v3", 1)])
def test_activation_checkpointing(family, stage):
    recipe = recipe_for(family, stage, model={"activation_checkpointing": True})
    compare(run_distributed(train, 2, recipe, 2, 1, 2), oracle(recipe), 2e-6)


@pytest.mark.parametrize(("world", "expert"), [(2, 1), (4, 2)])
def test_bfloat16_norms_agree_at_every_stage(world, expert):
    """Below stage 2 another optimizer asks for the norm in another way: the experts must count once there too.

    Adam divides by the gradient's size: at its usual eps, rounding of an element that should be 0 is a step of lr.
    """
    found = {}
    for stage in range(4):
        recipe = recipe_for("qwen3_moe", stage, precision={"compute": "bf16"}, optimizer={"eps": 1e-5})
        results = run_distributed(train, world, recipe, world, expert, 2)
        norms = [[record[1] for record in records] for records, _ in results]
        assert norms == [norms[0]] * world, "all ranks see one norm"
        found[stage] = norms[0]
    expected = [norm for _, norm, _ in oracle(recipe)[0]]
    for stage, norms in found.items():
        assert norms == pytest.approx(expected, rel=2e-2), stage
        assert norms[0] == pytest.approx(found[2][0], rel=1e-6), stage
        assert norms == pytest.approx(found[2], rel=2e-4), stage  # sums in another order, rounded to bf16 weights
