"""YAML file -> `Recipe`, and every complaint a file can earn, all at once, each with its line."""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moe_train.config.schema import Recipe
from moe_train.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `dotted.key=value` as given to `--set`.

    Raises `ConfigError` with one line per problem: file, line, dotted key (value), the rule.
    """
    path = Path(path)
    tree = _read_yaml(path)
    lines = _line_numbers(tree)
    plain = _to_plain(tree, path)
    for override in overrides:
        _apply_override(plain, override)
    return parse_recipe(plain, source=str(path), lines=lines)


def parse_recipe(tree: dict[str, Any], source: str = "recipe", lines: dict[str, int] | None = None) -> Recipe:
    """A plain dictionary -> `Recipe`; `lines` maps dotted keys to line numbers for messages."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        problems = []
        items = error.errors()
        for item in items:
            inside = [other for other in items if len(other["loc"]) > len(item["loc"])]
            if item["type"] == "too_short" and any(other["loc"][: len(item["loc"])] == item["loc"] for other in inside):
                continue  # pydantic counts only the entries that were valid
            dotted = ".".join(str(part) for part in item["loc"] if part not in ("int", "literal['auto']"))
            line = (lines or {}).get(dotted)
            where = f"{source}:{line}" if line else source
            problems += [f"{where}: {text}" for text in _explain(dotted, item)]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text: every key, defaults included."""
    import io

    yaml = YAML()
    yaml.default_flow_style = False
    out = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), out)
    return out.getvalue()


def _read_yaml(path: Path) -> CommentedMap:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path}: the recipe {kind}; give the path of a YAML file")
    if path.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size} bytes is no recipe (limit {MAX_BYTES})")
    try:
        tree = YAML(typ="rt").load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{place}: {str(error.problem or error.context).strip()}") from None
    except YAMLError as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, CommentedMap):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (model:, data:, ...), not {_kind(tree)}")
    return tree


def _kind(value: Any) -> str:
    return "an empty file" if value is None else "a list" if isinstance(value, list) else f"a {type(value).__name__}"


def _line_numbers(node: Any, prefix: str = "") -> dict[str, int]:
    lines: dict[str, int] = {}
    if isinstance(node, CommentedMap):
        items: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, CommentedSeq):
        items = enumerate(node)
    else:
        return lines
    for key, value in items:
        dotted = f"{prefix}.{key}" if prefix else str(key)
        position = node.lc.data.get(key) if node.lc.data else None
        if position is not None:
            lines[dotted] = position[0] + 1
        lines.update(_line_numbers(value, dotted))
    return lines


def _to_plain(node: Any, path: Path, budget: list[int] | None = None) -> Any:
    """Ruamel's node types -> dict, list and scalars; refuses tags and alias bombs."""
    budget = [MAX_NODES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0:
        raise ConfigError(f"{path}: more than {MAX_NODES} values; aliases that multiply are refused")
    tag = getattr(getattr(node, "tag", None), "value", None)
    if tag is not None and not str(tag).startswith("tag:yaml.org,2002:"):
        raise ConfigError(f"{path}: the tag {tag} is refused; a recipe holds plain values")
    if isinstance(node, dict):
        return {str(key): _to_plain(value, path, budget) for key, value in node.items()}
    if isinstance(node, list):
        return [_to_plain(value, path, budget) for value in node]
    if node is None or isinstance(node, bool):
        return node
    for scalar in (int, float, str):
        if isinstance(node, scalar):
            return scalar(node)
    raise ConfigError(f"{path}: a value of type {type(node).__name__} ({node}) is refused; write it as text")


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise ConfigError(f"--set {override}: write it as dotted.key=value, for example --set optimizer.lr=3e-4")
    try:
        value = _to_plain(YAML(typ="rt").load(text), Path("--set"))
    except YAMLError:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        node = node[int(part)] if isinstance(node, list) and part.isdigit() else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        if not last.isdigit() or int(last) >= len(node):
            raise ConfigError(f"--set {override}: {'.'.join(parents)} has {len(node)} entries; name one by its number")
        node[int(last)] = value
    else:
        node[last] = value


def _explain(dotted: str, item: Any) -> list[str]:
    kind, value = item["type"], item.get("input")
    if kind == "extra_forbidden":
        legal = _legal_keys(dotted)
        near = difflib.get_close_matches(dotted.rpartition(".")[2], legal, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"legal keys here: {', '.join(sorted(legal))}"
        return [f"unknown key {dotted}; {hint}"]
    if kind == "missing":
        return [f"{dotted} is required"]
    if kind == "value_error":
        return str(item["ctx"]["error"]).splitlines()
    return [f"{dotted} ({value!r}): {item['msg'][0].lower()}{item['msg'][1:]}"]


def _legal_keys(dotted: str) -> list[str]:
    """Keys of the section that `dotted` was written in."""
    section: Any = Recipe
    for part in dotted.split(".")[:-1]:
        if part.isdigit():
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
