"""What a process does before its first step, which every run pays for."""

import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML
from tiny_run import tiny_recipe, write_corpus

RUN = """
import gc, runpy, sys
from deepspeed.runtime import engine
engine.is_deepcompile_supported = lambda: True  # as on a GPU
frozen = []
gc.callbacks.append(lambda phase, about: frozen.append(gc.get_freeze_count()) if phase == "start" else None)
sys.argv = ["launch", *sys.argv[1:]]
try:
    runpy.run_path("launch/__main__.py", run_name="__main__")
finally:
    print("compiler", {"torch._inductor.compile_fx", "deepspeed.compile.backend"} & set(sys.modules))
    print("collected", gc.isenabled() and len(frozen) > 0, "before modules were frozen", min(frozen) < 100_000)
"""


def test_no_compiler_is_loaded_and_no_garbage_looked_for_among_modules(tmp_path):
    recipe = tmp_path / "tiny.yaml"
    YAML().dump(tiny_recipe(write_corpus(tmp_path / "tiny"), train={"steps": 1}), recipe)
    command = [sys.executable, "-c", RUN, str(recipe), "--run-dir", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-2:] == ["compiler set()", "collected True before modules were frozen False"]
