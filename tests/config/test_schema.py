"""The schema as a document: every key explained, nothing changeable, no DeepSpeed key decided twice."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from moe_train.config import Recipe, parse_recipe, schema
from moe_train.config.schema import OWNED_DEEPSPEED_KEYS, Section
from moe_train.errors import ConfigError


def minimal(**extra) -> dict:
    return {
        "model": {"model_type": "qwen3_moe"},
        "optimizer": {"lr": 1e-4},
        "data": {"corpora": [{"text": "python-stdlib"}], "sequence_length": 8},
        "batch": {"global_size": 4, "micro_size": 2},
        "train": {"steps": 3},
        **extra,
    }


def undocumented() -> Iterator[str]:
    tree = ast.parse(Path(schema.__file__).read_text())
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        if ast.get_docstring(node) is None:
            yield node.name
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                name = ast.unparse(field.target)
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                is_section = name in SECTIONS and node.name == "Recipe"  # the section's own docstring
                if not is_text and not is_section:
                    yield f"{node.name}.{name}"


SECTIONS = {
    name
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


def test_every_key_has_a_line_of_meaning():
    assert list(undocumented()) == []


def test_every_section_is_strict_and_frozen():
    for section in (Recipe, *Section.__subclasses__()):
        config = section.model_config
        assert (config.get("frozen"), config.get("extra"), config.get("strict")) == (True, "forbid", True), section


def test_a_recipe_cannot_be_changed():
    recipe = parse_recipe(minimal())
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        recipe.optimizer.lr = 1.0


@pytest.mark.parametrize("key", OWNED_DEEPSPEED_KEYS)
def test_deepspeed_key_that_is_ours_is_refused_by_our_name(key):
    raw: dict = {}
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = {}
    with pytest.raises(ConfigError) as caught:
        parse_recipe(minimal(deepspeed=raw))
    ours = OWNED_DEEPSPEED_KEYS[key]
    assert str(caught.value) == f"recipe: deepspeed.{key} is decided by {ours}: set that key instead"


def test_owners_are_keys_of_the_recipe():
    for owner in OWNED_DEEPSPEED_KEYS.values():
        for dotted in owner.split(" and "):
            section: type[BaseModel] = Recipe
            for part in dotted.split("."):
                assert part in section.model_fields, dotted
                annotation = section.model_fields[part].annotation
                section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else Section


def test_deepspeed_section_of_another_type_cannot_replace_ours():
    with pytest.raises(ConfigError, match=r"deepspeed.zero_optimization \(True\) must be a mapping"):
        parse_recipe(minimal(deepspeed={"zero_optimization": True}))


def test_other_deepspeed_keys_pass():
    raw = {"zero_optimization": {"reduce_bucket_size": 1000}, "comms_logger": {"enabled": True}}
    assert parse_recipe(minimal(deepspeed=raw)).deepspeed == raw


@pytest.mark.parametrize(
    ("fraction", "every", "interval", "problem"),
    [
        (0.0, 10, 20, r"data.validation_fraction \(0.0\) must be above 0"),
        (0.1, 0, 20, r"train.eval_interval \(0\) and checkpoint.interval \(20\) must be at least 1"),
        (0.1, 10, 0, r"train.eval_interval \(10\) and checkpoint.interval \(0\) must be at least 1"),
        (0.1, 10, 15, r"checkpoint.interval \(15\) must be a multiple of train.eval_interval \(10\)"),
        (0.1, 10, 20, None),
    ],
)
def test_the_best_checkpoints_need_a_validation_loss_each(fraction, every, interval, problem):
    recipe = minimal(train={"steps": 40, "eval_interval": every})
    recipe["data"]["validation_fraction"] = fraction
    parse_recipe({**recipe, "checkpoint": {"interval": interval}})
    recipe["checkpoint"] = {"interval": interval, "keep_best": 3}
    if problem is None:
        assert parse_recipe(recipe).checkpoint.keep_best == 3
        return
    with pytest.raises(ConfigError, match=rf"checkpoint.keep_best \(3\) .* validation loss: {problem}"):
        parse_recipe(recipe)


def test_experts_in_fp8_need_bf16_and_the_backend_that_has_it():
    recipe = parse_recipe(minimal(precision={"experts": "fp8"}))
    assert recipe.moe.backend == "auto"
    parse_recipe(minimal(precision={"experts": "fp8"}, moe={"backend": "fused"}))
    parse_recipe(minimal(precision={"experts": "bf16"}, moe={"backend": "loop"}))
    with pytest.raises(
        ConfigError, match=r"precision.experts \(fp8\) is computed by moe.backend \(fused\), not grouped"
    ):
        parse_recipe(minimal(precision={"experts": "fp8"}, moe={"backend": "grouped"}))
    for experts in ("fp8", "bf16"):
        with pytest.raises(ConfigError, match=rf"experts \({experts}\) needs precision.compute \(bf16\), not fp32"):
            parse_recipe(minimal(precision={"compute": "fp32", "experts": experts}))
