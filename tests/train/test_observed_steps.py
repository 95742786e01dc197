"""What a run logs of its routing, against naive counts over the decisions that were really made, at every layout."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import DEEPSEEK, QWEN3, start, tiny_recipe, train_until, write_corpus

from moe_train.diagnostics.metrics_file import read_lines
from moe_train.diagnostics.report import run_data
from moe_train.diagnostics.routing_files import RoutingFiles
from moe_train.diagnostics.run_record import read_run
from moe_train.moe import ExpertClock, assign_experts
from moe_train.parallel import build_groups, collectives
from moe_train.testing import run_distributed
from moe_train.train.check import resolve_run
from moe_train.train.run import run_one
from moe_train.train.stop import StopRequest

EXPERTS, TOP_K, STEPS = 6, 2, 2
WANTED = {"batch": {"global_size": 8, "micro_size": 2}, "train": {"steps": STEPS, "eval_sequences": 3}}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


def observed(rank: int, recipe: dict, folder: str) -> dict:
    """Two steps and their evaluations; what was logged, and what was seen from outside: each routing decision as the
    router made it, and each byte that left this rank."""
    run = start(recipe, folder)
    trainer, context = run.trainer, run.assembly.built.context
    decisions: list[tuple] = []  # (step, evaluating, layer, scores, ids)
    for layer in run.assembly.built.layers:

        def route(gate, x, ids=None, chosen=None, sequences=None, layer=layer, original=layer.gate_router.route):
            routing = original(gate, x, ids, chosen, sequences)
            if not context._recomputing and layer.context.watcher is not None:
                decided = [t.detach().double().numpy() for t in (routing.logits_TE, routing.scores_TE)]
                decisions.append((trainer.step, not layer.training, layer.index, *decided, routing.topk_ids_TK.numpy()))
            return routing

        layer.gate_router.route = route
    sent: Counter = Counter()
    exchange = collectives._exchange

    def counting(x, group, outputs, inputs):
        row = x[0].numel() * x.element_size() if len(x) else 0
        sent[trainer.step] += row * sum(n for r, n in enumerate(inputs) if r != group.rank_in_group)
        return exchange(x, group, outputs, inputs)

    collectives._exchange = counting
    try:
        logged = []
        for _ in range(STEPS):
            sums, result = trainer.train_step()
            trainer.counts_since_log += sums.counts_LE
            trainer.evaluate()
            trainer.log(sums, result, None)
            logged.append((run.recorder.logged[trainer.step], trainer.observer.figures, trainer.observer.pairs))
    finally:
        collectives._exchange = exchange
    return {"decisions": decisions, "sent": sent, "logged": logged, "counts": sums.counts_LE.tolist()}


LAYOUTS = {
    "one": (1, {"expert": 1}),
    "ep2": (2, {"expert": 2}),
    "dp2": (2, {"expert": 1}),
    "tp2": (2, {"expert": 2, "tensor": 2}),
    "tp2_after": (2, {"expert": 2, "tensor": 2}),
    "expert_tp2": (2, {"expert": 1, "expert_tensor": 2}),
}


def recipe_of(corpus: Path, layout: str, **more) -> dict:
    moe = {"route_after_dp_transform": layout.endswith("after"), "aux_loss_coef": 0.01}
    sections = {
        "parallel": LAYOUTS[layout][1],
        "moe": moe,
        "diagnostics": {"coactivation_interval": 1},
        **WANTED,
        **more,
    }
    model = {**QWEN3, "config": {**QWEN3["config"], "num_key_value_heads": 2}, "activation_checkpointing": True}
    return tiny_recipe(corpus, model, **sections)


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """By layout: what each rank observed. The folders hold the files of the evaluations."""
    made: dict[str, tuple] = {}

    def of(layout: str):
        if layout not in made:
            folder = tmp_path_factory.mktemp(layout)
            made[layout] = run_distributed(observed, LAYOUTS[layout][0], recipe_of(corpus, layout), str(folder)), folder
        return made[layout]

    return of


def tokens_of(decisions, step: int, layer: int, evaluating: bool = False):
    """logits, scores, ids of every token of a step, as one process saw them."""
    parts = [d[3:] for d in decisions if d[:3] == (step, evaluating, layer)]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def naive_router(logits, scores, ids) -> dict[str, float]:
    """One token after another."""
    figures = {"confidence": 0.0, "topk_mass": 0.0, "logit_rms": 0.0, "logsumexp": 0.0}
    for logit, score, chosen in zip(logits, scores, ids, strict=True):
        share = score / score.sum()
        figures["confidence"] += max(share) / len(ids)
        figures["topk_mass"] += sum(share[e] for e in chosen) / len(ids)
        figures["logit_rms"] += sum(v * v for v in logit) / len(logit) / len(ids)
        figures["logsumexp"] += float(np.log(np.exp(logit).sum())) / len(ids)
    return figures | {"logit_rms": figures["logit_rms"] ** 0.5}


def naive_pairs(ids) -> list[list[int]]:
    pairs = np.zeros((EXPERTS, EXPERTS), int)
    for chosen in ids.tolist():
        for i in chosen:
            for j in chosen:
                pairs[i, j] += 1
    return pairs.tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_router_figures_are_those_of_all_tokens(runs, layout):
    """Four micro-batches, recomputed in backward, evaluations in between: none of it is seen twice or left out."""
    (alone,), _ = runs("one")
    for rank in runs(layout)[0]:
        for step, (metrics, figures, pairs) in enumerate(rank["logged"]):
            counts = []
            for layer in range(2):
                logits, scores, ids = tokens_of(alone["decisions"], step, layer)
                assert len(ids) == 8 * 16
                for name, value in naive_router(logits, scores, ids).items():
                    assert figures[name][layer] == pytest.approx(value, rel=2e-5), (name, layer, step)
                assert pairs[layer] == naive_pairs(ids)
                counts.append([int((ids == expert).sum()) for expert in range(EXPERTS)])
                assert [pairs[layer][e][e] for e in range(EXPERTS)] == counts[-1]
                mean = len(ids) * TOP_K / EXPERTS
                assert figures["max_vio_batch"][layer] == pytest.approx(max(counts[-1]) / mean - 1)
            assert metrics["moe/max_vio_batch"] == pytest.approx(max(figures["max_vio_batch"]))
            assert metrics["moe/drop_rate"] == 0.0
        assert rank["counts"] == counts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_held_out_tokens_are_counted_apart(runs, layout):
    """Three sequences: what fills the last micro-batch up is left out."""
    (alone,), one_folder = runs("one")
    ranks, folder = runs(layout)
    for step in range(STEPS):
        worst = 0.0
        saved = RoutingFiles(folder).load(step + 1)
        for layer in range(2):
            ids = tokens_of(alone["decisions"], step + 1, layer, evaluating=True)[2][: 3 * 16]
            counts = np.bincount(ids.ravel(), minlength=EXPERTS)
            worst = max(worst, counts.max() / counts.mean() - 1)
            assert saved is not None
            assert np.sort(saved[layer]).tolist() == np.sort(ids).tolist()
        for rank in ranks:
            assert rank["logged"][step][0]["moe/max_vio_global"] == pytest.approx(worst)
    first, second = (RoutingFiles(one_folder).load(step) for step in (1, 2))
    kept = [set(a) & set(b) for a, b in zip(first.reshape(-1, 2).tolist(), second.reshape(-1, 2).tolist(), strict=True)]
    assert ranks[0]["logged"][1][0]["moe/saturation"] == pytest.approx(sum(map(len, kept)) / (len(kept) * TOP_K))
    assert "moe/saturation" not in ranks[0]["logged"][0][0]


def test_rows_of_each_rank_and_what_sending_once_saves(runs):
    """Micro-batch by micro-batch, token by token: who owns the expert, which ranks a token goes to."""
    ranks, _ = runs("ep2")
    homes = [assign_experts(EXPERTS, 2, rank) for rank in range(2)]
    owner = {first + n: rank for rank, (first, count) in enumerate(homes) for n in range(count)}
    row = 32 * 4 * 3  # hidden size, float32; forward, recompute and backward
    there, back = row + 3 * TOP_K * 4, row + TOP_K * 4  # weights of copies, twice; their numbers; gradients of weights
    for step in range(STEPS):
        figures = ranks[0]["logged"][step][1]
        for layer in range(2):
            forwards = [[d[5] for d in rank["decisions"] if d[:3] == (step, False, layer)] for rank in ranks]
            rows = np.zeros((2, 2), int)  # micro-batch, receiving rank
            sent, saved = [0, 0], [0, 0]
            for number, both in enumerate(zip(*forwards, strict=True)):
                for source, ids in enumerate(both):
                    for chosen in ids.tolist():
                        goes = [owner[expert] for expert in chosen]
                        for rank in goes:
                            rows[number, rank] += 1
                        away = [rank for rank in goes if rank != source]
                        sent[source] += len(set(away))
                        saved[source] += len(away) - len(set(away))
            assert figures["received"][layer] == rows.sum(axis=0).tolist()
            assert figures["peak_rows"][layer] == pytest.approx(rows.max() / (rows.sum() / 4))
            one, other = sent  # of two ranks, each returns the other's
            assert figures["sent_bytes"][layer] == [one * there + other * back, other * there + one * back]
            assert figures["saved_bytes"][layer] == [n * (there + back) for n in saved]
            assert 0 < sum(saved) < sum(sent)


@pytest.mark.parametrize("aux_loss", ["sequence", "global_batch"])
def test_wire_bytes_are_those_that_left_the_rank(corpus, tmp_path, aux_loss):
    """A load that is counted ahead takes another forward; evaluations are not part of a step."""
    moe = {"aux_loss": aux_loss, "aux_loss_coef": 0.01}
    recipe = recipe_of(corpus, "ep2", moe=moe)
    for number, rank in enumerate(run_distributed(observed, 2, recipe, str(tmp_path))):
        # the first step is all that is sent while the trainer stands at 0
        first = rank["logged"][0][1]
        assert sum(layer[number] for layer in first["sent_bytes"]) == rank["sent"][0]


def losses(rank: int, recipe: dict, folder: str) -> tuple:
    run = start(recipe, folder)
    found = []
    for _ in range(4):
        sums, result = run.trainer.train_step()
        found.append((sums.loss, sums.aux_loss, result.grad_norm, sums.counts_LE.tolist()))
    return found, run.trainer.observer.context.watcher, run.trainer.observer.context.clock


def test_looking_changes_nothing(corpus, tmp_path):
    """To the bit: every step watched and timed, against none but the last."""
    seen = []
    for interval in (1, 100):
        recipe = tiny_recipe(corpus, DEEPSEEK, diagnostics={"log_interval": interval, "coactivation_interval": 1})
        seen.append(run_distributed(losses, 2, recipe, str(tmp_path / str(interval))))
    assert seen[0] == seen[1]
    assert all(rank[1:] == (None, None) for rank in seen[0])


def test_figures_are_those_of_the_log_steps(corpus, tmp_path):
    """With a line every third step, another step's routing is never in it, and the time is of the step before."""
    recipe = tiny_recipe(corpus, diagnostics={"log_interval": 3})
    (every,) = run_distributed(logged_figures, 1, tiny_recipe(corpus), str(tmp_path / "every"))
    (third,) = run_distributed(logged_figures, 1, recipe, str(tmp_path / "third"))
    assert set(third) == {3, 6}
    for step, figures in third.items():
        for name in ("confidence", "received", "max_vio_batch", "logit_rms"):
            assert figures[name] == every[step][name]
        assert min(map(min, figures["expert_ms"])) > 0


def logged_figures(rank: int, recipe: dict, folder: str) -> dict:
    run = start(recipe, folder)
    found = {}
    for step in range(1, 7):
        train_until(run, step, save=False)
        if step in run.recorder.logged:
            found[step] = run.trainer.observer.figures
    return found


def test_the_clock_takes_forward_and_backward_and_leaves_the_gradient(monkeypatch):
    ticks = iter(float(n * n) for n in range(100))
    monkeypatch.setattr("moe_train.moe.statistics.time.perf_counter", lambda: next(ticks))
    clock = ExpertClock(2, torch.device("cpu"))
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    y = clock.measure(1, x * 2, lambda rows: rows.square())
    assert clock.milliseconds() == [0.0, 1e3 * (1 - 0)]
    y.sum().backward()
    assert clock.milliseconds() == [0.0, 1e3 * (1 - 0) + 1e3 * (9 - 4)]
    assert torch.equal(x.grad, 8 * x.detach())
    with torch.no_grad():
        clock.measure(0, x, lambda rows: rows)
    assert clock.milliseconds()[0] == 1e3 * (25 - 16)


def whole_run(rank: int, recipe: str, run_dir: str) -> bool:
    run = resolve_run(Path(recipe), (), world=2, per_node=2)
    return run_one(run, build_groups(run.topology), torch.device("cpu"), Path(run_dir), StopRequest())


def test_a_run_leaves_records_of_every_layer_and_a_report(corpus, tmp_path):
    """Records at the first log step at or after each multiple, and at the end: of all tokens trained on."""
    diagnostics = {"log_interval": 2, "heatmap_interval": 3, "coactivation_interval": 4}
    tree = tiny_recipe(corpus, train={"steps": 6, "eval_interval": 3}, diagnostics=diagnostics)
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    run_dir = tmp_path / "run"
    assert run_distributed(whole_run, 2, str(tmp_path / "recipe.yaml"), str(run_dir)) == [True, True]
    lines = [line for line in read_lines(run_dir / "metrics.jsonl") if line is not None]
    loads = [line for line in lines if line.get("event") == "load"]
    assert [(line["first_step"], line["step"]) for line in loads] == [(1, 3), (4, 6)]
    assert [np.sum(line["counts"], axis=1).tolist() for line in loads] == [[3 * 8 * 16 * TOP_K] * 2] * 2
    (pairs,) = [line for line in lines if line.get("event") == "coactivation"]
    assert (pairs["step"], np.trace(pairs["pairs"][0])) == (4, 8 * 16 * TOP_K)
    assert RoutingFiles(run_dir).steps() == [0, 3, 6]
    (start,) = [line for line in lines if line.get("event") == "start"]
    assert (start["world"], start["expert_groups"]) == (2, [[0, 1]])
    data = run_data(read_run(run_dir))
    assert [frame["counts"] for frame in data["frames"]] == [line["counts"] for line in loads]
    assert data["finished"]
    assert (run_dir / "report.html").stat().st_size > 20_000


def test_expert_choice_whose_tokens_have_any_number_of_experts(tmp_path, corpus):
    recipe = tiny_recipe(corpus, QWEN3, **WANTED, moe={"router": "expert_choice"})
    (found,) = run_distributed(observed, 1, recipe, str(tmp_path / "run"))
    for step, (_, figures, _) in enumerate(found["logged"]):
        for layer, share in enumerate(figures["confidence"]):
            seen = [d for d in found["decisions"] if d[0] == step and not d[1] and d[2] == layer]
            scores = np.concatenate([d[4] for d in seen])
            assert abs(share - (scores / scores.sum(axis=1, keepdims=True)).max(axis=1).mean()) < 1e-6
