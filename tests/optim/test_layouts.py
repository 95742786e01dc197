"""Whole models at every layout against one process of stock Hugging Face, torch AdamW and clip_grad_norm_.

Three optimizer steps with a clip that binds, weight decay, and an auxiliary loss with z-loss: loss, gradient norm,
clip factor and every parameter after the third step.
"""

import pytest
import torch
import torch.nn.functional as F
from small_configs import FAMILIES, build_alone, small_recipe
from transformers import AutoModelForCausalLM

from moe_train.errors import TrainingError
from moe_train.model import compute_dtype
from moe_train.model.profiles import profile_of
from moe_train.optim import Engine, optimizer_factory
from moe_train.parallel import Topology, build_groups
from moe_train.testing import run_distributed
from moe_train.train.assemble import build_sharded_model
from moe_train.train.check import ResolvedRun
from moe_train.train.objective import ObjectiveScale

STEPS, AUX, Z = 3, 0.02, 0.01
CPU = torch.device("cpu")


def recipe_for(family: str, stage: int, **sections):
    options = {"zero": {"stage": stage}, "moe": {"aux_loss_coef": AUX, "z_loss_coef": Z}} | sections
    return small_recipe(family, **options)


def tokens() -> torch.Tensor:
    """[step, sequence, token]."""
    return torch.randint(0, 61, (STEPS, 8, 17), generator=torch.Generator().manual_seed(9))


def resolve(recipe, world: int, expert: int) -> ResolvedRun:
    return ResolvedRun.at(recipe, Topology(world=world, expert=expert))


def train(rank: int, recipe, world: int, expert: int):
    run = resolve(recipe, world, expert)
    groups = build_groups(run.topology)
    built, store = build_sharded_model(run, groups, CPU)
    engine = Engine(built.model, store, optimizer_factory(recipe.optimizer, CPU), recipe, groups, run.accumulation)
    scale = ObjectiveScale(tokens=8 * 16, sequences=8, num_moe_layers=len(built.layers), aux_coef=AUX, z_coef=Z)
    size = recipe.batch.micro_size
    records = []
    for batch in tokens():
        total = torch.zeros((), dtype=torch.float64)
        for number in range(run.accumulation):
            start = (number * world + rank) * size
            part = batch[start : start + size]
            with built.context.micro_batch():
                loss = engine(input_ids=part[:, :-1], labels=part[:, 1:]).loss
                objective = scale.objective(loss, built.context.losses)
                engine.backward(objective * world, last=number == run.accumulation - 1)
            total += objective.detach()
        groups.world.all_reduce_(total)
        result = engine.step(recipe.optimizer.lr)
        counts = groups.world.all_reduce_(built.context.take_counts())
        records.append((float(total), result.grad_norm, result.clip_factor, result.skipped, counts))
    pieces = [
        (f.name, f.expert, f.shape, f.start, f.views["master"].clone())
        for f in [*engine.dense_fragments(), *engine.store.fragments()]
        if f.owner
    ]
    return records, pieces


def stock_model(recipe):
    """Stock model with our initial weights: drawn by name on one process."""
    run = resolve(recipe, 1, 1)
    built, experts = build_alone(recipe)
    stock = AutoModelForCausalLM.from_config(run.model_config, dtype=torch.float32, attn_implementation="sdpa").train()
    state = dict(built.model.state_dict()) | {name: value.detach() for name, value in experts.items()}
    stock.load_state_dict(state, strict=True)
    return stock, profile_of(run.model_config.model_type).spec(run.model_config)


def oracle(recipe):
    stock, spec = stock_model(recipe)
    routed: list[tuple] = []
    for module in stock.modules():
        if type(module).__name__.lower().endswith("topkrouter"):
            module.register_forward_hook(lambda m, i, out: routed.append((out[0], out[2])))
    options = {"lr": 0.01, "betas": recipe.optimizer.betas, "eps": recipe.optimizer.eps}
    named = list(stock.named_parameters())
    matrices = [p for n, p in named if p.dim() >= 2]
    vectors = [p for n, p in named if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        **options,
    )
    records = []
    for batch in tokens():
        routed.clear()
        logits = stock(input_ids=batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        aux = z = torch.zeros(())
        counts = []
        for logit, ids in routed:
            scores = logit.softmax(-1) if spec.score == "softmax" else logit.sigmoid()
            scores = scores / scores.sum(-1, keepdim=True)
            chosen = F.one_hot(ids, spec.num_experts).sum(1)
            counts.append(chosen.sum(0))
            f = chosen.view(8, 16, -1).float().mean(1) * spec.num_experts / spec.top_k
            aux = aux + (f * scores.view(8, 16, -1).mean(1)).sum() / (8 * len(routed))
            z = z + logit.logsumexp(-1).square().mean() / len(routed)
        objective = loss + AUX * aux + Z * z
        optimizer.zero_grad()
        objective.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(stock.parameters(), recipe.optimizer.grad_clip))
        optimizer.step()
        records.append((float(objective.detach()), norm, torch.stack(counts)))
    return records, {n: p.detach() for n, p in stock.named_parameters()}


def compare(results, expected, tolerance: float) -> None:
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
    seen: dict[str, int] = dict.fromkeys(params, 0)
    for _, pieces in results:
        for name, expert, shape, start, values in pieces:
            whole = params[name] if expert is None else params[name][expert]
            assert tuple(whole.shape) == shape, name
            reference = whole.flatten()[start : start + values.numel()]
            # AdamW moves each element by at most about lr: a sign of a tiny gradient may differ, three steps of it
            worst = float((values - reference).abs().max())
            assert worst < 200 * tolerance, f"{name} expert {expert}: {worst:.2e}"
            seen[name] += values.numel()
    assert seen == {name: p.numel() for name, p in params.items()}, "every element exactly once"


LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("world", "expert"), LAYOUTS)
def test_qwen3_moe_at_every_stage_and_layout(world, expert, stage):
    recipe = recipe_for("qwen3_moe", stage, batch={"micro_size": 1})
    compare(run_distributed(train, world, recipe, world, expert), oracle(recipe), 2e-6)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
@pytest.mark.parametrize(("world", "expert", "stage"), [(2, 2, 1), (4, 4, 3)])
def test_every_family(family, world, expert, stage):
    recipe = recipe_for(family, stage)
    compare(run_distributed(train, world, recipe, world, expert), oracle(recipe), 2e-6)


@pytest.mark.parametrize("stage", [1, 3])
def test_activation_checkpointing(stage):
    recipe = recipe_for("qwen3_moe", stage, model={"activation_checkpointing": True})
    compare(run_distributed(train, 2, recipe, 2, 2), oracle(recipe), 2e-6)


def test_experts_on_three_ranks_leave_uneven_slices():
    fields = FAMILIES["qwen3_moe"] | {"num_experts": 8}
    recipe = recipe_for("qwen3_moe", 2, model={"config": fields}, batch={"global_size": 9, "micro_size": 1})
    results = run_distributed(uneven_counts, 3, recipe)
    assert [r[0] for r in results] == [3, 3, 2]
    one = run_distributed(uneven_counts, 1, recipe)
    assert results[0][1] == pytest.approx(one[0][1], rel=1e-6)


def uneven_counts(rank: int, recipe):
    """9 sequences on 3 ranks or on 1: (local experts, losses and norms)."""
    import torch.distributed as dist

    world = dist.get_world_size()
    run = resolve(recipe, world, world)
    groups = build_groups(run.topology)
    built, store = build_sharded_model(run, groups, CPU)
    engine = Engine(built.model, store, optimizer_factory(recipe.optimizer, CPU), recipe, groups, run.accumulation)
    scale = ObjectiveScale(tokens=9 * 16, sequences=9, num_moe_layers=2, aux_coef=AUX, z_coef=Z)
    data = torch.randint(0, 61, (2, 9, 17), generator=torch.Generator().manual_seed(4))
    found = []
    for batch in data:
        total = torch.zeros((), dtype=torch.float64)
        for number in range(run.accumulation):
            part = batch[number * world + rank][None]
            with built.context.micro_batch():
                loss = engine(input_ids=part[:, :-1], labels=part[:, 1:]).loss
                objective = scale.objective(loss, built.context.losses)
                engine.backward(objective * world, last=number == run.accumulation - 1)
            total += objective.detach()
        groups.world.all_reduce_(total)
        found += [float(total), engine.step(0.01).grad_norm]
    return run.plan.home(groups.expert.rank_in_group)[1], found


def test_bfloat16_at_every_stage():
    """bf16 is another DeepSpeed class below stage 2, with another norm: all four agree, and stay near float32.

    Every token has every expert: where rounding chooses others, the norm is another function's.
    """
    found = {}
    config = FAMILIES["qwen3_moe"] | {"num_experts_per_tok": FAMILIES["qwen3_moe"]["num_experts"]}
    for stage in range(4):
        recipe = recipe_for("qwen3_moe", stage, precision={"compute": "bf16"}, model={"config": config})
        assert compute_dtype(recipe) == torch.bfloat16
        results = run_distributed(train, 2, recipe, 2, 2)
        assert [r[1] for r in results[0][0]] == [r[1] for r in results[1][0]], "all ranks see one norm"
        found[stage] = results[0][0]
    expected, _ = oracle(recipe)
    for step, (e_loss, e_norm, _) in enumerate(expected):
        for stage, records in found.items():
            loss, norm, clip, skipped, _ = records[step]
            where = f"stage {stage}, step {step}"
            assert not skipped, where
            assert loss == pytest.approx(e_loss, rel=5e-3), where
            assert norm == pytest.approx(e_norm, rel=1e-2), where
            # the experts' share is smaller than that, so the stages are held against each other
            assert norm == pytest.approx(found[2][step][1], rel=1e-5), where
            assert clip == pytest.approx(0.1 / (norm + 1e-6), rel=1e-6), where


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_states(stage):
    recipe = recipe_for("qwen3_moe", stage, zero={"stage": stage, "offload": "cpu"})
    compare(run_distributed(train, 2, recipe, 2, 2), oracle(recipe), 2e-6)


def train_fp16(rank: int, recipe):
    """First moments after two steps between which the loss scale doubles."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # torch computes it on a CPU; DeepSpeed only asks for its speed
    run = resolve(recipe, 2, 2)
    groups = build_groups(run.topology)
    built, store = build_sharded_model(run, groups, CPU)
    engine = Engine(built.model, store, optimizer_factory(recipe.optimizer, CPU), recipe, groups, run.accumulation)
    engine.wrapper.loss_scaler.cur_scale = 2.0**8
    engine.wrapper.loss_scaler.scale_window = 1
    scale = ObjectiveScale(tokens=8 * 16, sequences=8, num_moe_layers=2, aux_coef=0.0, z_coef=0.0)
    scales = []
    for batch in tokens()[:2]:
        for number in range(run.accumulation):
            start = (number * 2 + rank) * recipe.batch.micro_size
            part = batch[start : start + recipe.batch.micro_size]
            with built.context.micro_batch():
                loss = engine(input_ids=part[:, :-1], labels=part[:, 1:]).loss
                engine.backward(scale.objective(loss, {}) * 2, last=number == run.accumulation - 1)
        result = engine.step(0.0)  # the weights stay: only the moments tell
        assert not result.skipped
        scales.append(float(engine.wrapper.loss_scale))
    engine.wrapper.loss_scaler.cur_scale, engine.wrapper.loss_scaler.cur_hysteresis = 1.0, 1
    with pytest.raises(TrainingError, match=r"smallest loss scale.*optimizer\.lr"):
        engine.update_loss_scale(overflow=True)
    fragments = [*engine.dense_fragments(), *engine.store.fragments()]
    return scales, [(f.name, f.expert, f.start, f.views["exp_avg"].clone()) for f in fragments if f.owner]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp16_unscales_dense_and_experts_by_the_scale_of_their_gradients(stage):
    fields = {"optimizer": {"grad_clip": 0.0}, "moe": {"aux_loss_coef": 0.0, "z_loss_coef": 0.0}}
    half = small_recipe("qwen3_moe", zero={"stage": stage}, precision={"compute": "fp16"}, **fields)
    results = run_distributed(train_fp16, 2, half)
    scales = results[0][0]
    assert scales[1] > 2.0**8, "the scale must have grown, or the test shows nothing"
    stock, _ = stock_model(half)
    moments = {name: torch.zeros_like(p) for name, p in stock.named_parameters()}
    for batch in tokens()[:2]:
        stock.zero_grad()
        F.cross_entropy(stock(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        for name, p in stock.named_parameters():
            moments[name].mul_(0.9).add_(p.grad, alpha=0.1)  # type: ignore[arg-type]
    for kind in ("dense", "experts"):
        pairs = [
            (
                values,
                (moments[name] if expert is None else moments[name][expert]).flatten()[start : start + len(values)],
            )
            for _, pieces in results
            for name, expert, start, values in pieces
            if (expert is None) == (kind == "dense")
        ]
        ours, theirs = (torch.cat(part).double() for part in zip(*pairs, strict=True))
        ratio = float((ours @ theirs) / (theirs @ theirs))
        assert ratio == pytest.approx(1.0, abs=0.02), f"{kind}: moments are {ratio:.3f} times what they should be"
