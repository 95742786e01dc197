"""YAML file -> `Recipe`, and every complaint a file can earn, all at once, each with its line."""

import difflib
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moe_train.config.schema import Recipe
from moe_train.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_NODES = 20_000
MAX_DEPTH = 32
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null")}


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `dotted.key=value` as given to `--set`.

    Raises `ConfigError` with one line per problem: file, line, dotted key (value), the rule.
    """
    path = Path(path)
    reader = _Plain(str(path))
    plain = reader.convert(_read_yaml(path))
    for override in overrides:
        key = _apply_override(plain, override)
        reader.places = {k: v for k, v in reader.places.items() if k != key and not k.startswith(f"{key}.")}
        reader.places[key] = f"--set {override}"
    return parse_recipe(plain, source=str(path), places=reader.places)


def parse_recipe(tree: dict[str, Any], source: str = "recipe", places: dict[str, str] | None = None) -> Recipe:
    """A plain dictionary -> `Recipe`; `places` maps dotted keys to where they were written, for messages."""
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
            where = _place(dotted, places or {}, source)
            problems += [f"{where}: {text}" for text in _explain(dotted, item)]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


def _place(dotted: str, places: dict[str, str], source: str) -> str:
    """Where a key was written; of a key that is missing, where its section was."""
    while dotted and dotted not in places:
        dotted = dotted.rpartition(".")[0]
    return places.get(dotted, source)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML text: every key, defaults included."""
    yaml = YAML()
    yaml.default_flow_style = False
    out = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), out)
    return out.getvalue()


def _read_yaml(path: Path) -> CommentedMap:
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path}: the recipe {kind}; give the path of a YAML file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: {path.stat().st_size} bytes is no recipe (limit {MAX_BYTES})")
        tree = _parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(tree, CommentedMap):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (model:, data:, ...), not {_kind(tree)}")
    return tree


def _parse(text: str, source: str) -> Any:
    try:
        return YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        text = str(error.problem or error.context).strip()
        if text.startswith("but "):
            text = f"{error.context} {text}"
        hint = ": indent with spaces" if "'\\t'" in text else ""
        raise ConfigError(f"{source}{place}: {text}{hint}") from None
    except YAMLError as error:
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ConfigError(f"{source}: values nested deeper than {MAX_DEPTH} levels are refused") from None
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from None


def _kind(value: Any) -> str:
    return "an empty file" if value is None else "a list" if isinstance(value, list) else f"a {type(value).__name__}"


class _Plain:
    """Ruamel's node types -> dict, list and scalars; refuses tags, cycles and alias bombs.

    `places` tells where each dotted key was written.
    """

    def __init__(self, source: str):
        self.source = source
        self.places: dict[str, str] = {}
        self._left = MAX_NODES

    def convert(self, node: Any, dotted: str = "", depth: int = 0) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ConfigError(f"{self.source}: more than {MAX_NODES} values; aliases that multiply are refused")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{self.source}: values nested deeper than {MAX_DEPTH} levels are refused")
        where = ": ".join(filter(None, (_place(dotted, self.places, self.source), dotted)))
        tag = getattr(getattr(node, "tag", None), "value", None)
        if tag is not None and tag not in PLAIN_TAGS:
            raise ConfigError(f"{where}: the tag {tag} is refused; a recipe holds plain values")
        if isinstance(node, dict):
            items = [(key, str(key), value) for key, value in node.items()]
            return {name: self._child(node, key, dotted, value, depth) for key, name, value in items}
        if isinstance(node, list):
            return [self._child(node, index, dotted, value, depth) for index, value in enumerate(node)]
        if node is None or isinstance(node, bool):
            return node
        for scalar in (int, float, str):
            if isinstance(node, scalar):
                return scalar(node)
        raise ConfigError(f"{where}: a value of type {type(node).__name__} ({node}) is refused; write it as text")

    def _child(self, node: Any, key: Any, dotted: str, value: Any, depth: int) -> Any:
        name = f"{dotted}.{key}" if dotted else str(key)
        position = node.lc.data.get(key) if hasattr(node, "lc") and node.lc.data else None
        if position is not None:
            self.places[name] = f"{self.source}:{position[0] + 1}"
        return self.convert(value, name, depth + 1)


def _apply_override(tree: dict[str, Any], override: str) -> str:
    """Set a key in `tree`; returns the dotted key."""
    key, separator, text = override.partition("=")
    if not separator or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise ConfigError(f"--set {override}: write it as dotted.key=value, for example --set optimizer.lr=3e-4")
    value = _Plain(f"--set {override}").convert(_parse(text, f"--set {override}"))
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = node[_entry(node, part, parents[:depth], override)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    if isinstance(node, list):
        node[_entry(node, last, parents, override)] = value
    else:
        node[last] = value
    return key


def _entry(node: list, part: str, parents: list[str], override: str) -> int:
    if not part.isdecimal() or int(part) >= len(node):
        raise ConfigError(
            f"--set {override}: {'.'.join(parents)} has {len(node)} entries; name one by its number, from 0"
        )
    return int(part)


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
    if kind == "model_type":
        return [f"{dotted} ({value!r}): must be a section, a mapping of keys"]
    if "literal['auto']" in item["loc"]:
        return []  # the other half of the union has said it
    if "int" in item["loc"]:
        return [f"{dotted} ({value!r}): must be a whole number or auto"]
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
