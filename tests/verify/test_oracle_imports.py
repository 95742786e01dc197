"""The oracle shares no arithmetic with what it judges: its imports, followed through this package."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
JUDGED = ("moe", "kernels", "parallel", "optim", "model", "train", "data", "config")


def imported(path: Path) -> set[str]:
    """Modules that a file imports, functions included; `from a import b` is both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def closure(start: str) -> set[str]:
    """Modules of the package that `start` imports, directly or through others (packages' __init__ files left out)."""
    seen, todo = set(), [start]
    while todo:
        for name in imported(ROOT / (todo.pop().replace(".", "/") + ".py")):
            if name.startswith("moe_train.") and name not in seen:
                seen.add(name)
                if (ROOT / (name.replace(".", "/") + ".py")).is_file():
                    todo.append(name)
    return seen


def test_oracle_imports_nothing_that_it_judges():
    found = closure("moe_train.verify.oracle")
    rooms = {name.split(".")[1] for name in found}
    assert "verify" in rooms, "the walk finds something"
    assert not rooms & set(JUDGED), sorted(found)


def test_the_walk_would_find_it():
    assert "moe_train.optim" in closure("moe_train.verify.worker")
    assert "moe_train.moe" in closure("moe_train.verify.truth")
