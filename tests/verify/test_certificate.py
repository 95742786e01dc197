"""`moe-train verify` end to end: green for the recipes, red with a reason, JSON, exit codes."""

import io
import json
import re
from pathlib import Path

import planted
import pytest
from rich.console import Console
from small_configs import FAMILIES, small_recipe
from transformers import AutoConfig
from typer.testing import CliRunner

from moe_train.cli import app
from moe_train.config import dump_recipe, load_recipe
from moe_train.verify import certificate, certify, check_layout, prepare_case, quick_grid, shrink
from moe_train.verify.compare import Comparison
from moe_train.verify.shrink import traits_of

RECIPES = Path(__file__).parent.parent.parent / "recipes"
OPTIONS = {
    "mixtral": {"aux_loss_coef": 0.02, "z_loss_coef": 0.01},
    "qwen3_moe": {"aux_loss_coef": 0.02, "z_loss_coef": 0.01},
    "qwen2_moe": {"aux_loss_coef": 0.02, "z_loss_coef": 0.01},
    "olmoe": {"aux_loss_coef": 0.02, "z_loss_coef": 0.01},
    "deepseek_v3": {"aux_loss_coef": 0.02, "z_loss_coef": 0.01, "bias_update_rate": 0.02},
}
FAILS_AT_EP_2 = planted.ERRORS["expert gradients ep times too large"]


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def assert_certified(path: Path, **options) -> None:
    console = quiet()
    code = certify([path], console=console, **options)
    assert code == 0, console.file.getvalue()  # type: ignore[attr-defined]  # which layout, and why


def written(folder: Path, family: str = "qwen3_moe", **sections) -> Path:
    path = folder / f"{family}.yaml"
    path.write_text(dump_recipe(small_recipe(family, **sections)))
    return path


def test_quickstart_is_equal_at_every_layout_of_the_quick_grid(tmp_path):
    out = tmp_path / "certificate.json"
    console = quiet()
    assert certify([RECIPES / "quickstart.yaml"], json_path=out, console=console) == 0
    (found,) = json.loads(out.read_text())
    assert found["passed"]
    assert found["margin"] > 0
    assert found["shrunk_model"]["model_type"] == "qwen3_moe"
    assert {layout["world"] for layout in found["layouts"]} == {1, 2, 3, 4}
    for layout in found["layouts"]:
        assert layout["passed"], layout["verdict"]
        measured = layout["quantities"]
        for quantity in ("initial weights", "loss", "auxiliary loss", "counts", "gradient", "gradient norm"):
            assert measured[quantity]["error"] <= measured[quantity]["bound"]
        assert {"logits", "clip factor", "parameters", "weights in use"} <= set(measured)
        assert ("choices" in measured) == (layout["precision"] == "bf16")
        assert "z-loss" not in measured, "the quickstart has none"
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "quickstart.yaml: equal at every layout" in text
    assert "16 of 16 layouts pass" in text


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
def test_every_other_family(family):
    recipe = shrink(small_recipe(family, moe=OPTIONS[family]), (1, 2))
    case = prepare_case(recipe)
    for layout in quick_grid(recipe.batch.global_size, (1, 2), traits_of(recipe), limit=5):
        result = check_layout(case, layout)
        assert result.passed, f"{layout}: {result.verdict}"
        expected = {"auxiliary loss", "z-loss"} | ({"bias"} if family == "deepseek_v3" else set())
        assert expected <= set(result.comparison.worst)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_config_json_shrinks(family, tmp_path):
    """The family's own defaults, which are a published model's size, as a file."""
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    recipe = shrink(small_recipe(family, model={"path": str(tmp_path), "model_type": None, "config": {}}), (1, 2))
    case = prepare_case(recipe)
    result = check_layout(case, quick_grid(recipe.batch.global_size, (1,), traits_of(recipe), limit=1)[0])
    assert result.passed, result.verdict
    assert sum(array.size for array in case.truth.initial.values()) < 200_000


@pytest.mark.parametrize(
    "path", sorted(set(RECIPES.glob("*.yaml")) - {RECIPES / "quickstart.yaml"}), ids=lambda path: path.stem
)
def test_every_other_recipe_quick(path):
    assert_certified(path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_full():
    assert_certified(RECIPES / "quickstart.yaml", full=True)


def test_a_planted_error_gives_exit_code_1_and_names_parameter_and_cause(tmp_path, monkeypatch):
    real = certificate.check_layout
    monkeypatch.setattr(
        certificate, "check_layout", lambda case, layout, modified, device: real(case, layout, FAILS_AT_EP_2)
    )
    out, console = tmp_path / "certificate.json", quiet()
    assert certify([written(tmp_path)], worlds=(2,), json_path=out, console=console) == 1
    (found,) = json.loads(out.read_text())
    failed = [layout for layout in found["layouts"] if not layout["passed"]]
    # the planted factor is the data-parallel size over the number of copies, 1 where each rank has all experts
    wrong = [g for g in found["layouts"] if 2 // g["tensor"] != 2 // (g["expert"] * g["expert_tensor"])]
    assert failed
    assert failed == wrong
    failed = [layout for layout in failed if layout["expert"] == 2 and layout["tensor"] == 1]
    assert re.match(
        r"gradient of model\.layers\.\d\.mlp\.experts\.\w+\[\d\] differs first, at step 1", failed[0]["verdict"]
    )
    assert re.search(r"(2(\.0\d+)?|1\.99\d+) x what it should be = ep", failed[0]["verdict"])
    # 2 layers of 6 experts with 2 tensors each, and nothing of the rest
    assert re.search(r"in 24 of 24 expert and 0 of \d+ dense tensors$", failed[0]["verdict"])
    assert "NOT EQUAL" in console.file.getvalue()  # type: ignore[attr-defined]


def broken():
    raise RuntimeError("planted crash")


def test_a_layout_that_raises_fails_alone(tmp_path, monkeypatch):
    real, seen = certificate.check_layout, []

    def first_crashes(case, layout, modified, device):
        seen.append(layout)
        return real(case, layout, broken if len(seen) == 1 else None)

    monkeypatch.setattr(certificate, "check_layout", first_crashes)
    monkeypatch.setattr(
        certificate, "quick_grid", lambda size, worlds, traits: quick_grid(size, worlds, traits, limit=2)
    )
    out = tmp_path / "certificate.json"
    assert certify([written(tmp_path)], worlds=(1,), json_path=out, console=quiet()) == 1
    first, second = json.loads(out.read_text())[0]["layouts"]
    assert first["verdict"] == "stopped: RuntimeError: planted crash"
    assert "planted crash" in first["crash"]
    assert second["passed"], second["verdict"]


@pytest.mark.parametrize(
    ("arguments", "sections", "sentence"),
    [
        (["--world", "0,2"], {}, "--world (0,2): numbers of processes, at least 1"),
        (["--world", "two"], {}, "--world (two): numbers of processes"),
        (
            [],
            {"config": {"attention_dropout": 0.1}},
            "model.config.attention_dropout (0.1): a certificate compares numbers",
        ),
        (["--json", "nowhere/found.json"], {}, "--json (nowhere/found.json): there is no folder nowhere"),
        ([], {"config": {"num_expert": 4}}, "model.config.num_expert is no field of Qwen3MoeConfig"),
    ],
)
def test_what_cannot_be_certified_is_refused_with_a_sentence(arguments, sections, sentence, tmp_path):
    path = written(tmp_path, model=sections) if sections else written(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(path), *arguments])
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_a_crash_whose_words_look_like_markup_is_printed_as_it_is():
    recipe = shrink(small_recipe("qwen3_moe"), (1,))
    layout = quick_grid(recipe.batch.global_size, (1,), traits_of(recipe), limit=1)[0]
    words = "RuntimeError: [/gloo/transport/tcp/pair.cc:537] Connection closed by peer"
    console = quiet()
    certificate._report(console, certificate.LayoutResult(layout=layout, comparison=Comparison(), crash=words))
    assert words in console.file.getvalue().replace("\n", "")  # type: ignore[attr-defined]


def test_experts_in_fp8_are_certified_without_it_and_that_is_said(tmp_path):
    path, console = written(tmp_path, precision={"compute": "bf16", "experts": "fp8"}), quiet()
    assert shrink(load_recipe(path), (1,)).precision.experts is None
    assert certify([path], worlds=(1,), console=console) == 0
    said = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
    assert said == f"{path}: precision.experts (fp8) is left out: {LEFT_OUT}"


def test_compiled_attention_is_certified_without_it_and_that_is_said(tmp_path):
    path, console = written(tmp_path, model={"compile": True}), quiet()
    assert certify([path], worlds=(1,), console=console) == 0
    said = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
    assert said == f"{path}: {certificate.UNCOMPILED}"
    assert not shrink(load_recipe(path), (1,)).model.compile


LEFT_OUT = "what is certified computes exactly, and its rounding is no error"
