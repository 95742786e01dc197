"""Wire, time and the command: numbers that a step really moves, and arithmetic that can be done by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from small_configs import FAMILIES, small_recipe
from transformers import Qwen3MoeConfig
from typer.testing import CliRunner

from moe_train.budget import Hardware, compare_with_run, plan_run
from moe_train.budget.traffic import flows_of, visits_per_rank
from moe_train.cli import app
from moe_train.errors import ConfigError
from moe_train.model.build import meta_model
from moe_train.model.held import held_by
from moe_train.parallel import build_groups, resolve_topology
from moe_train.testing import run_distributed
from moe_train.train.assemble import build_sharded_model
from moe_train.train.check import ResolvedRun

HARDWARE = Hardware(name="a machine", flops=1e12, efficiency=0.5, link=1e9, network=1e8)


def run_of(world: int, parallel: dict, **sections) -> ResolvedRun:
    config = FAMILIES["qwen3_moe"] | {"num_experts_per_tok": 6}  # every token to every expert: even on any ranks
    sections = {"batch": {"global_size": 8, "micro_size": 2}} | sections
    model = {"config": config} | sections.pop("model", {})
    recipe = small_recipe("qwen3_moe", parallel=parallel, model=model, **sections)
    return ResolvedRun.at(recipe, resolve_topology(parallel["expert"], world, 6, world))


def rows_sent(rank: int, checkpointing: bool) -> int:
    """Bytes of rows, and what goes with them, that this rank hands to others in one step."""
    run = run_of(2, {"expert": 2}, model={"activation_checkpointing": checkpointing})
    built, _ = build_sharded_model(run, build_groups(run.topology), torch.device("cpu"))
    sent, original = [], dist.all_to_all_single

    def counted(output, input, output_split_sizes=None, input_split_sizes=None, **options):
        if input_split_sizes is not None:  # not the numbers of rows
            others = sum(size for other, size in enumerate(input_split_sizes) if other != rank)
            sent.append(others * input[:1].nbytes)
        return original(output, input, output_split_sizes, input_split_sizes, **options)

    dist.all_to_all_single = counted
    try:
        for _ in range(run.accumulation):
            with built.context.micro_batch():
                built.model(input_ids=torch.randint(0, 61, (2, 16))).logits.square().mean().backward()
    finally:
        dist.all_to_all_single = original
    return sum(sent)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_on_the_wire_are_those_of_a_real_step(checkpointing):
    run = run_of(2, {"expert": 2}, model={"activation_checkpointing": checkpointing})
    held = held_by(0, meta_model(run.recipe, run.model_config), run.recipe, run.plan, run.topology)
    flows = {flow.what: flow.nbytes for flow in flows_of(run, held, 2)}
    assert run_distributed(rows_sent, 2, checkpointing) == [flows["dispatch and combine"]] * 2


def test_gradients_and_weights_on_the_wire():
    """By hand, for 4 ranks that all hold the same: rings send 3/4 of the bytes, twice for an all_reduce."""
    expected = {0: 2 * 4, 1: 4 + 4, 2: 2 * 4 + 4, 3: 2 * (4 + 2 * 4)}  # bytes of an element, 2 micro-batches
    for stage, per_element in expected.items():
        run = run_of(4, {"expert": 1}, zero={"stage": stage}, batch={"global_size": 16, "micro_size": 2})
        held = held_by(0, meta_model(run.recipe, run.model_config), run.recipe, run.plan, run.topology)
        flows = {flow.what: flow.nbytes for flow in flows_of(run, held, 2)}
        assert flows["expert gradients and weights"] == 0.75 * per_element * held.num_stored
        assert flows["dense gradients and weights"] == 0.75 * per_element * held.num_dense
        assert "dispatch and combine" not in flows


def test_time_follows_load_peak_and_links():
    plan = plan_run(run_of(2, {"expert": 2}), HARDWARE, (1.0, 2.0))
    fair, twice = plan.loads
    tokens = 8 * 16 / 2
    assert fair.compute_s == pytest.approx(tokens * plan.flops_per_token / 0.5e12)
    assert twice.compute_s - fair.compute_s == pytest.approx(tokens * 2 * 6 * 6 * 3 * 24 * 32 / 0.5e12)
    sent = {flow.what: flow.nbytes / 1e9 for flow in plan.flows}
    assert fair.wire_s == pytest.approx(sum(sent.values()))
    assert twice.wire_s == fair.wire_s, "every token goes to both ranks already"
    assert fair.memory == plan.experts.total + plan.dense.total + plan.temporary + plan.bucket + fair.activations


@pytest.mark.parametrize(("length", "larger"), [(16, "activations"), (1, "gradients")])
def test_gradients_of_one_micro_batch_come_as_its_activations_go(length, larger):
    batch, data = {"global_size": 1, "micro_size": 1}, {"sequence_length": length}
    plan = plan_run(run_of(1, {"expert": 1}, batch=batch, data=data, precision={"compute": "bf16"}), HARDWARE, (1.0,))
    experts, load = plan.experts, plan.loads[0]
    at_the_step, before = experts.gradients // 2, load.activations + plan.temporary  # in bf16, as they came
    assert (before > at_the_step) == (larger == "activations")
    held = experts.weights + experts.states + plan.dense.total + plan.bucket
    assert load.memory == held + max(before, at_the_step)


@pytest.mark.parametrize("other", [{"optimizer": {"lr": 1e-3, "name": "deepspeed_fused_adam"}}, {"ranks": 2}], ids=str)
def test_gradients_that_are_added_up_or_converted_are_wide_at_the_step(other):
    world = other.pop("ranks", 1)
    batch, data = {"global_size": world, "micro_size": 1}, {"sequence_length": 1}
    run = run_of(world, {"expert": 1}, batch=batch, data=data, precision={"compute": "bf16"}, **other)
    plan = plan_run(run, HARDWARE, (1.0,))
    held = plan.experts.weights + plan.experts.states + plan.dense.total + plan.bucket
    assert plan.loads[0].memory == held + plan.experts.gradients


@pytest.mark.parametrize(
    ("experts", "chosen", "ranks", "shared", "expected"),
    [
        (6, 6, 2, 0, 1.0),
        (6, 2, 2, 0, 1 - 3 / 6 * 2 / 5),
        (6, 1, 3, 0, 2 / 6),
        (5, 2, 2, 0, 1 - 2.5 / 5 * 1.5 / 4),  # as if both held two and a half
        (6, 2, 3, 1, 1 - 3 / 6 * 2 / 5),
        (4, 2, 4, 0, 1 - 3 / 4 * 2 / 3),
    ],
)
def test_part_of_the_tokens_that_visit_a_rank(experts, chosen, ranks, shared, expected):
    run = SimpleNamespace(
        model_config=Qwen3MoeConfig(num_experts=experts, num_experts_per_tok=chosen),
        topology=SimpleNamespace(expert=ranks),
        plan=SimpleNamespace(shared_ranks=shared),
    )
    assert visits_per_rank(run) == pytest.approx(expected)  # type: ignore[arg-type]


def test_more_load_takes_more_of_the_tokens_along_until_it_has_all():
    config = FAMILIES["qwen3_moe"] | {"num_experts_per_tok": 2}
    plan = plan_run(run_of(2, {"expert": 2}, model={"config": config}), HARDWARE, (1.0, 1.1, 2.0))
    exchange = next(flow.nbytes for flow in plan.flows if flow.with_load) / HARDWARE.link
    fair, more, twice = plan.loads
    assert more.wire_s - fair.wire_s == pytest.approx(0.1 * exchange)
    assert twice.wire_s - fair.wire_s == pytest.approx(0.25 * exchange), "0.8 of all tokens come at even choices"


def test_flash_attention_is_planned_where_it_is_not_installed():
    plans = [
        plan_run(run_of(2, {"expert": 2}, model={"attention": a}), HARDWARE) for a in ("sdpa", "flash_attention_2")
    ]
    assert plans[0] == plans[1]
    assert plan_run(run_of(2, {"expert": 2}, model={"attention": "eager"}), HARDWARE) != plans[0]


def test_a_run_is_compared_in_percent(tmp_path):
    plan = plan_run(run_of(2, {"expert": 2}), HARDWARE, (1.0,))
    speed, memory = plan.tokens / plan.loads[0].seconds, plan.loads[0].memory
    with pytest.raises(ConfigError, match=r"there is no metrics\.jsonl"):
        compare_with_run(plan, tmp_path)
    lines = [{"step": 1, "perf/tokens_per_s": 1.0}, {"step": 2}]
    lines += [{"step": n, "perf/tokens_per_s": 2 * speed, "perf/peak_memory_bytes": memory / 4} for n in (3, 4, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    errors = {item.what: item.error_percent for item in compare_with_run(plan, tmp_path)}
    assert errors == pytest.approx({"tokens/s": -50.0, "step, s": 100.0, "memory, bytes": 300.0})


def test_the_command(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(run_of(2, {"expert": 2}).recipe.model_dump(mode="json") | {"data": {
        "corpora": [{"text": "python-stdlib"}], "sequence_length": 16}}))  # fmt: skip
    options = ["--world", "2", "--set", "model.config.vocab_size=257"]
    result = CliRunner().invoke(app, ["plan", str(recipe), *options, "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    tree = json.loads((tmp_path / "out.json").read_text())
    assert [load["skew"] for load in tree["loads"]] == [1.0, 1.5, 2.0]
    assert tree["hardware"]["flops"] == 67e12  # of an H200 in fp32
    assert "67 TFLOP/s of which 17% are reached" in " ".join(result.output.split())
    for wrong, message in (
        (["--skew", "1,x"], "--skew (1,x) must be numbers above 0"),
        (["--gpu", "abacus"], "--gpu (abacus): its peak in fp32 is not known: give --peak-tflops"),
        (["--run", str(tmp_path)], "there is no metrics.jsonl in it"),
    ):
        result = CliRunner().invoke(app, ["plan", str(recipe), *options, *wrong])
        assert result.exit_code == 2
        assert message in result.output
