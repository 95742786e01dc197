"""An expert store whose optimizer updates in one pass, against one that runs torch's AdamW after scaling and copies."""

import pytest
import torch
from small_configs import small_recipe

from moe_train.config.schema import OptimizerSection
from moe_train.moe import SlotPlan
from moe_train.optim import ExpertStore, ExpertTensor, ShardOptions, decays, optimizer_factory
from moe_train.optim.adamw import OnePassAdamW
from moe_train.parallel import ParallelGroup, build_groups, resolve_topology
from moe_train.testing import assert_close, run_distributed
from moe_train.train.assemble import assemble_around
from moe_train.train.check import ResolvedRun

SECTION = OptimizerSection(lr=0.05, betas=(0.9, 0.95), weight_decay=0.3)
SHAPES = {"experts.gate_up_proj": (6, 4), "experts.down_proj": (4, 3)}
CPU = torch.device("cpu")


def store_of(kind, compute: torch.dtype, stage: int = 1) -> ExpertStore:
    group = ParallelGroup.single()
    options = ShardOptions(
        stage=stage, compute_dtype=compute, grad_dtype=torch.float32, device=CPU, state_device=CPU
    )  # fmt: skip
    tensors = [ExpertTensor.routed(n, SlotPlan(3, 1), s, group, group, options) for n, s in SHAPES.items()]
    for number, tensor in enumerate(tensors):
        generator = torch.Generator().manual_seed(number)
        for expert in range(3):
            tensor.write_expert(expert, torch.randn(tensor.unit_shape, generator=generator))

    def make(groups):
        settings = [{"params": g["params"], "weight_decay": 0.3 * g["decay"]} for g in groups]
        return kind(settings, lr=SECTION.lr, betas=SECTION.betas)

    store = ExpertStore(tensors, make, decays(SECTION), group, 2)
    store.publish()
    return store


def train(store: ExpertStore, micro_batches: int, steps: int = 4) -> list[float]:
    generator, norms = torch.Generator().manual_seed(9), []
    for step in range(steps):
        for _ in range(micro_batches):
            for tensor in store.tensors:
                weights = tensor.gather()
                tensor.accumulate(torch.randn(weights.shape, generator=generator).to(weights.dtype))
        store.finish_gradients()
        norms.append(float(store.squared_norm()))
        store.set_lr(0.05 / (step + 1))
        store.step(torch.tensor(0.4, dtype=torch.float64))
    return norms


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("compute", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_torch_s(compute, micro_batches):
    ours, theirs = store_of(OnePassAdamW, compute), store_of(torch.optim.AdamW, compute)
    assert train(ours, micro_batches) == train(theirs, micro_batches)
    exact = torch.float64 if compute == torch.float64 else torch.float32
    for mine, their in zip(ours.tensors, theirs.tensors, strict=True):
        assert_close(mine.master.detach(), their.master.detach(), mine.name, dtype=exact)
        assert torch.equal(mine.gather().flatten(), mine.master.detach().to(compute)), "the weights in use are fresh"
        states = [store.optimizer.state[t.master] for store, t in ((ours, mine), (theirs, their))]
        assert states[0].keys() == states[1].keys()
        assert states[0]["step"] == states[1]["step"] == 4
        for name in ("exp_avg", "exp_avg_sq"):
            assert_close(states[0][name], states[1][name], name, dtype=exact)
    assert ours.scalars() == theirs.scalars()


def test_states_of_a_checkpoint_go_on():
    ours, theirs = store_of(OnePassAdamW, torch.float32), store_of(torch.optim.AdamW, torch.float32)
    train(theirs, 1)
    ours.allocate_state({"exp_avg", "exp_avg_sq", "master"}, theirs.scalars())
    for mine, their in zip(ours.fragments(), theirs.fragments(), strict=True):
        for kind, view in mine.views.items():
            view.copy_(their.views[kind])
    for store in (ours, theirs):
        train(store, 1, steps=1)
    for mine, their in zip(ours.tensors, theirs.tensors, strict=True):
        assert_close(mine.master.detach(), their.master.detach(), mine.name)


def test_who_watches_a_step_sees_its_gradients():
    store, seen = store_of(OnePassAdamW, torch.float32), []
    handle = store.optimizer.register_step_post_hook(
        lambda optimizer, args, kwargs: seen.extend(p.grad.clone() for g in optimizer.param_groups for p in g["params"])
    )
    train(store, 1, steps=1)
    handle.remove()
    train(store, 1, steps=1)
    assert len(seen) == 2
    expected = torch.randn(seen[0].shape[0], generator=torch.Generator().manual_seed(9)) * 0.4 / 2
    assert_close(seen[0], expected)
    assert store.scalars()["step"] == 2


def test_gradients_are_not_kept():
    store = store_of(OnePassAdamW, torch.bfloat16)
    train(store, 2)
    assert all(t.master.grad is t.reduced is t.gradient is None for t in store.tensors)


@pytest.mark.parametrize("name", ["adamw", "one_pass_adamw"])
def test_the_experts_of_a_gpu_are_updated_in_one_pass_and_nothing_else(name):
    """DeepSpeed, which has the dense part, knows torch's class alone."""
    section, gpu = SECTION.model_copy(update={"name": name}), torch.device("cuda")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(4))], "decay": True}]
    assert type(optimizer_factory(section, gpu, experts=True)(groups)) is OnePassAdamW
    assert type(optimizer_factory(section, gpu)(groups)) is torch.optim.AdamW
    on_cpu = optimizer_factory(section, torch.device("cpu"), experts=True)(groups)
    assert type(on_cpu) is (torch.optim.AdamW if name == "adamw" else OnePassAdamW)


def kinds(rank: int) -> tuple[str, str]:
    """Optimizers of the experts and of the dense part."""
    recipe = small_recipe("qwen3_moe", optimizer={"lr": 1e-3, "name": "one_pass_adamw"})
    run = ResolvedRun.at(recipe, resolve_topology(1, 1, 6, 1))
    assembly = assemble_around(None, run, build_groups(run.topology), CPU)  # type: ignore[arg-type]
    engine = assembly.engine
    return type(engine.store.optimizer).__name__, type(engine.inner).__name__


def test_a_recipe_that_asks_for_it_has_it_for_its_experts_alone():
    assert run_distributed(kinds, 1) == [("OnePassAdamW", "AdamW")]
