"""What is run by hand on a GPU runs to its end here at toy sizes, so that no GPU hour is lost to a typing error."""

import runpy
import sys
from pathlib import Path

import pytest

from moe_train.kernels import has_triton

BENCH = Path(__file__).parents[1] / "bench"


def run(name: str, *arguments: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", [name, "--toy", *arguments])
    monkeypatch.syspath_prepend(str(BENCH))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCH / name), run_name="__main__")
    return ended.value.code  # type: ignore[return-value]


def test_check_gpu_kernels(monkeypatch, capsys):
    assert run("check_gpu_kernels.py", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all ok"
    assert sum(line.endswith(" ok") for line in lines) >= 25


def test_check_gpu_kernels_fails_for_a_wrong_kernel(monkeypatch, capsys):
    from moe_train.kernels import choose
    from moe_train.kernels.reference import activation

    original = activation.forward
    monkeypatch.setattr(choose, "runs_triton", lambda device: False)
    monkeypatch.setattr(activation, "forward", lambda *args: original(*args) * 1.05)
    assert run("check_gpu_kernels.py", monkeypatch=monkeypatch) == 1
    assert "FAILED {'y'" in capsys.readouterr().out


def test_check_gpu_layer(monkeypatch, capsys):
    assert run("check_gpu_layer.py", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ok"
    assert [line.split()[5] for line in lines[-3:-1]] == ["grouped", "fused"]


def test_bench_mirror_ranks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_mirror_ranks.py", "--toy", "--ranks", "4"])
    monkeypatch.syspath_prepend(str(BENCH))
    runpy.run_path(str(BENCH / "bench_mirror_ranks.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split()[0] for line in lines[1:]] == ["grouped", "fused"] * 2


def test_check_gpu_verify(monkeypatch, capsys):
    assert run("check_gpu_verify.py", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == "nothing planted [grouped]: equal"
    assert lines[-2].startswith("gate detached from the output [grouped]: gradient of ")
    assert lines[-1] == "all ok"


@pytest.mark.skipif(not has_triton(), reason="the test extra installs it on Linux")
def test_bench_kernels(monkeypatch, capsys):
    assert run("bench_kernels.py", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("\n| toy") == 48


def test_bench_fp8_products(monkeypatch, capsys):
    assert run("bench_fp8_products.py", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.count("\n| 16 |") == 1


def test_bench_fp8_training_draws_again_what_it_wrote(monkeypatch, capsys, tmp_path):
    """The curves of a run of 20 steps; FP8 ends 1 % higher, which is too much."""
    path = tmp_path / "curves.csv"
    lines = [f"{step},{3 - step / 20},{(3 - step / 20) * 1.01}," for step in range(1, 20)]
    path.write_text(
        "\n".join(["step,train_bf16,train_fp8,val_bf16,val_fp8", *(f"{x}," for x in lines), "20,2,2.02,2,2.02\n"])
    )
    assert run("bench_fp8_training.py", "--from", str(path), "--results", str(tmp_path), monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().out.count("| +1.00 % |") == 2
    assert (tmp_path / "fp8_training.png").stat().st_size > 1000


@pytest.mark.skipif(not has_triton(), reason="the test extra installs it on Linux")
def test_check_gpu_dense(monkeypatch, capsys):
    assert run("check_gpu_dense.py", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all ok"
    assert sum(line.endswith(" ok") for line in lines) == 6


@pytest.mark.skipif(not has_triton(), reason="the test extra installs it on Linux")
def test_check_gpu_dense_fails_for_a_wrong_kernel(monkeypatch, capsys):
    from moe_train.kernels.triton import rotary

    monkeypatch.setattr(rotary, "backward", rotary.forward)
    assert run("check_gpu_dense.py", monkeypatch=monkeypatch) == 1
    assert "rotary, 3 heads" in next(x for x in capsys.readouterr().out.splitlines() if "FAILED {'y'" in x)


@pytest.mark.slow
def test_bench_train_step(monkeypatch, capsys):
    """AutoEP starts with another transformers."""
    arguments = ("--steps", "5", "--peers", "ours,transformers", "--profile", "--set", "optimizer.name=one_pass_adamw")
    assert run("bench_train_step.py", *arguments, monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    assert "losses differ by 0.000" in out
    assert "a step's kernels" in out


@pytest.mark.slow
def test_bench_moe_layer(monkeypatch, capsys):
    assert run("bench_moe_layer.py", monkeypatch=monkeypatch) == 0
    out = capsys.readouterr().out
    for peer in ("ours_loop", "ours_grouped", "ours_fused", "transformers", "deepspeed_autoep"):
        lines = [line.split("|") for line in out.splitlines() if line.startswith(f"| {peer} |")]
        assert len(lines) == 2
        assert all(float(line[7]) < 2e-2 for line in lines), peer
