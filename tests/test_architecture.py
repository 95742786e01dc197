"""The tree as a rule: which room may import which, and how long a file or a function may be."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 100

BELOW_TRAIN = {"diagnostics", "hub", "checkpoint", "optim", "model", "data", "moe", "parallel"}
ARROWS: dict[str, set[str]] = {
    "launch": {"cli", "verify", "train", "checkpoint", "parallel"},
    "cli": {"verify", "budget", "train", "diagnostics", "hub", "checkpoint", "model", "data", "parallel"},
    "pytest_plugin": {"verify"},
    "verify": {"train", *BELOW_TRAIN, "testing"},
    "budget": {"train", "diagnostics", "optim", "model", "moe", "parallel"},
    "train": BELOW_TRAIN,
    "diagnostics": set(),
    "hub": {"checkpoint", "model", "data", "parallel", "disk"},
    "checkpoint": {"moe", "parallel", "disk"},
    "optim": {"kernels", "moe", "parallel"},
    "model": {"kernels", "moe", "parallel"},
    "data": {"disk"},
    "moe": {"kernels", "parallel"},
    "kernels": set(),
    "parallel": set(),
    "disk": set(),
    "config": set(),
    "errors": set(),
    "testing": set(),
}
"""Room -> rooms it may import, beside itself, errors and (all but errors) config."""

ONLY_IN = {
    "torch.distributed": ("moe_train/parallel/", "moe_train/testing.py"),
    "deepspeed": ("moe_train/optim/",),
    "wandb": ("moe_train/diagnostics/tracker.py",),
    "torch.utils.tensorboard": ("moe_train/diagnostics/tensorboard.py",),
}
"""Library -> the places that may import it, at the top of a file or inside a function."""


def sources() -> list[Path]:
    return sorted([*ROOT.glob("moe_train/**/*.py"), *ROOT.glob("launch/**/*.py")])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room_of(path: str) -> str:
    """moe_train/optim/norm.py -> optim; moe_train/errors.py -> errors; launch/reshard.py -> launch."""
    parts = path.removesuffix(".py").split("/")
    return parts[0] if parts[0] == "launch" or len(parts) == 1 else parts[1]


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports, functions included; `from a import b` is both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module or "", node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def problems_of(path: str, text: str) -> list[str]:
    """Every rule that one file breaks."""
    tree, room = ast.parse(text), room_of(path)
    found = []
    if room not in ARROWS and path != "moe_train/__init__.py":
        found.append(f"{path}: room {room} is in no picture")
    allowed = {*ARROWS.get(room, ()), room, "errors"} | ({"config"} if room != "errors" else set())
    for name, line in imports(tree):
        if name.startswith("moe_train.") and not name.startswith("moe_train.__"):
            target = name.split(".")[1]
            if target not in allowed:
                found.append(f"{path}:{line}: {room} imports {target}")
        if is_inside(name, "tests") or is_inside(name, "launch"):
            found.append(f"{path}:{line}: imports {name}")
        for library, places in ONLY_IN.items():
            if is_inside(name, library) and not path.startswith(places):
                found.append(f"{path}:{line}: imports {library}, which only {' and '.join(places)} may")
    for node in ast.walk(tree):
        if isinstance(node, ast.Global):
            found.append(f"{path}:{node.lineno}: global statement")
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed" and room != "parallel":
            found.append(f"{path}:{node.lineno}: uses torch.distributed")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    if text.count("\n") > MAX_FILE_LINES:
        found.append(f"{path}: {text.count(chr(10))} lines, more than {MAX_FILE_LINES}")
    return found


def test_no_file_breaks_a_rule():
    assert sources(), ROOT
    found = [problem for path in sources() for problem in problems_of(name_of(path), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("moe_train/moe/route.py", "from moe_train.optim import Engine", "moe imports optim"),
        ("moe_train/moe/route.py", "import moe_train.train.loop", "moe imports train"),
        ("moe_train/config/load.py", "from moe_train.parallel import Ranks", "config imports parallel"),
        ("moe_train/errors.py", "from moe_train.config import Recipe", "errors imports config"),
        ("moe_train/data/open.py", "def f():\n    from moe_train import model", "data imports model"),
        ("moe_train/train/loop.py", "from moe_train import verify", "train imports verify"),
        ("moe_train/train/loop.py", "from moe_train.cli import app", "train imports cli"),
        ("moe_train/parallel/groups.py", "import moe_train.moe", "parallel imports moe"),
        ("moe_train/moe/layer.py", "import torch.distributed as dist", "imports torch.distributed"),
        ("moe_train/moe/layer.py", "from torch import distributed", "imports torch.distributed"),
        ("moe_train/moe/layer.py", "import torch\ntorch.distributed.barrier()", "uses torch.distributed"),
        ("moe_train/train/run.py", "def f():\n    import deepspeed", "imports deepspeed"),
        ("moe_train/config/deepspeed.py", "from deepspeed.runtime import config", "imports deepspeed"),
        ("moe_train/train/run.py", "from wandb import init", "imports wandb"),
        ("moe_train/diagnostics/load.py", "import wandb", "imports wandb"),
        ("moe_train/moe/layer.py", "x = 1\ndef f():\n    global x", "global statement"),
        ("moe_train/moe/layer.py", "def f():\n" + "    x = 1\n" * 100, "f has 101 lines"),
        ("moe_train/moe/layer.py", "x = 1\n" * 601, "601 lines"),
        ("moe_train/extra/layer.py", "x = 1", "room extra is in no picture"),
        ("moe_train/moe/layer.py", "import tests.reference", "imports tests.reference"),
    ],
)
def test_a_broken_rule_is_found(path, text, complaint):
    assert any(complaint in problem for problem in problems_of(path, text))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "moe_train/model/build.py",
            "from moe_train.moe import SlotPlan\nfrom moe_train.parallel import ParallelGroup",
        ),
        ("moe_train/config/deepspeed.py", "from moe_train.config.schema import Recipe"),
        ("moe_train/parallel/groups.py", "import torch.distributed as dist"),
        ("moe_train/optim/engine.py", "import deepspeed"),
        ("moe_train/train/run.py", "from moe_train.config.deepspeed import deepspeed_config"),
        ("moe_train/moe/layer.py", "def f():\n" + "    x = 1\n" * 99),
    ],
)
def test_what_is_allowed_passes(path, text):
    assert problems_of(path, text) == []


def test_arrows_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(ARROWS):
        ready = {room for room, targets in ARROWS.items() if targets <= done} - done
        assert ready, f"a cycle among {set(ARROWS) - done}"
        done |= ready


def test_config_needs_neither_torch_nor_deepspeed():
    heavy = ("torch", "deepspeed", "transformers", "numpy")
    code = f"import sys, moe_train.config; print([name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_package_folder_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {name_of(path.parent).replace("/", ".") for path in ROOT.glob("moe_train/**/*.py")}
    assert sorted(listed) == sorted(found)
    assert all((ROOT / package.replace(".", "/") / "__init__.py").is_file() for package in found)


def test_no_tracked_file_names_a_place_of_one_machine():
    """Work folders of whoever wrote it, and addresses of package mirrors."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    # written in pieces, so that this file does not find itself
    place = re.compile("|".join(["/wo" + r"rk/\w", "/tmp/" + r"w\b", r"index-" + r"url\s*=?\s*http"]))
    found = []
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # a picture or another binary
        found += [f"{name}:{number}: {line.strip()[:80]}" for number, line in enumerate(lines, 1) if place.search(line)]
    assert not found, "\n".join(found)
