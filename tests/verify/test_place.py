"""Where layouts run: worlds that fit on the GPUs, what is said about the rest, and what is computed there."""

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from small_configs import small_recipe

from moe_train.errors import ConfigError
from moe_train.verify import Certificate, Layout, certificate, full_grid, parse_precisions, place_for, shrink
from moe_train.verify.certificate import as_json, certify_shrunk, table
from moe_train.verify.compare import Comparison
from moe_train.verify.grid import PRECISIONS, Traits
from moe_train.verify.place import backends_left_out, not_covered
from moe_train.verify.shrink import traits_of
from moe_train.verify.truth import Case

GPU = Traits(num_experts=6, has_shared=True, tensors=(1, 2, 4), width=96, device="cuda")


@pytest.fixture
def gpus(monkeypatch):
    """A machine with as many GPUs as a test says, as far as torch can tell."""

    def have(number: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: number)

    return have


def test_a_cpu_takes_every_world_and_precision(gpus):
    gpus(8)
    place = place_for("cpu", (1, 2, 3))
    assert (place.device, place.worlds, place.precisions, place.sharing) == ("cpu", (1, 2, 3), PRECISIONS, ())


def test_worlds_without_a_gpu_per_rank_share_them(gpus):
    gpus(2)
    place = place_for("cuda", (1, 2, 3, 4))
    assert (place.device, place.worlds, place.precisions) == ("cuda", (1, 2, 3, 4), ("fp32", "bf16"))
    assert place.sharing == (3, 4)
    assert place_for("cuda", (1, 2)).sharing == ()


def test_what_is_not_covered():
    assert not_covered("cpu", (1, 2), ()) == "GPUs and NCCL, offload, fp16, fp8"
    assert not_covered("cuda", (1, 2, 4), (4,)) == "offload, fp16, fp8"
    assert not_covered("cuda", (1, 2, 4), (2, 4)) == "NCCL, offload, fp16, fp8", "one rank says nothing to anybody"


@pytest.mark.parametrize(
    ("number", "arguments", "sentence"),
    [
        (0, ("cuda", (1,)), r"--device \(cuda\): torch finds no GPU on this machine"),
        (
            1,
            ("cuda", (1,), ("fp64",)),
            r"--precision \(fp64\): on GPUs layouts compute in fp32, bf16; --device cpu has fp64",
        ),
        (1, ("tpu", (1,)), r"--device \(tpu\) must be cpu or cuda"),
    ],
)
def test_what_cannot_run_is_refused(number, arguments, sentence, gpus):
    gpus(number)
    with pytest.raises(ConfigError, match=sentence):
        place_for(*arguments)


def test_precisions_by_name():
    assert parse_precisions(None) is None
    assert parse_precisions("bf16, fp64") == ("fp64", "bf16")
    with pytest.raises(ConfigError, match=r"--precision \(fp16\): some of fp64, fp32, bf16"):
        parse_precisions("fp16")


def test_gpus_run_the_backends_that_train_there():
    def computed(traits):
        return {(g.precision, g.backend) for g in full_grid(12, (1, 2, 4), traits)}

    plain = {("bf16", "loop"), ("bf16", "grouped"), ("fp32", "loop")}
    assert computed(GPU) == plain
    assert computed(replace(GPU, fused=True)) == plain | {("bf16", "fused")}
    assert computed(replace(GPU, fused=True, precisions=("fp32",))) == {("fp32", "loop")}
    ways = {(g.tensor, g.expert_tensor, g.expert, g.shared, g.redundant, g.stage) for g in full_grid(12, (4,), GPU)}
    on_cpu = full_grid(12, (4,), replace(GPU, device="cpu"))
    assert ways == {(g.tensor, g.expert_tensor, g.expert, g.shared, g.redundant, g.stage) for g in on_cpu}


def test_fused_is_run_on_gpus_where_triton_is_there_and_said_to_be_left_out_elsewhere(monkeypatch):
    recipe = shrink(small_recipe("olmoe"), (1,))
    assert not traits_of(recipe).fused, "a CPU runs it if it is asked for"
    pytest.importorskip("triton", reason="the test extra installs it on Linux")
    traits = traits_of(recipe, "cuda")
    assert traits.fused
    assert backends_left_out(recipe, traits) == ()
    monkeypatch.setattr("moe_train.kernels.runs_triton", lambda device: False)
    traits = traits_of(recipe, "cuda")
    assert not traits.fused
    (sentence,) = backends_left_out(recipe, traits)
    assert sentence.startswith("backend fused: moe.backend (fused) is made of Triton kernels and needs")


def test_the_certificate_says_where_it_ran_and_what_did_not(gpus, monkeypatch):
    gpus(1)
    seen = []

    def passes(case: Case, layout: Layout, modified, device: str):
        seen.append((layout.world, layout.precision, device))
        return certificate.LayoutResult(layout=layout, comparison=Comparison())

    monkeypatch.setattr(certificate, "check_layout", passes)
    monkeypatch.setattr("moe_train.kernels.runs_triton", lambda device: False)
    console = Console(file=io.StringIO(), width=200)
    place = place_for("cuda", (1, 4))
    found: Certificate = certify_shrunk("r", shrink(small_recipe("olmoe"), place.worlds), place, console=console)
    console.print(table(found))
    assert {world for world, _, _ in seen} == {1, 4}
    assert {precision for _, precision, _ in seen} == {"fp32", "bf16"}
    assert {device for _, _, device in seen} == {"cuda"}
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "equal at every layout that was run on GPUs" in text
    assert "  not run: backend fused: moe.backend" in text
    shared = "world of 4: more ranks than GPUs, which NCCL does not take; they share GPUs, over gloo"
    assert " ".join(text.split()).count(shared) == 2, "before the layouts and under the table"
    assert as_json(found)["left_out"] == list(found.left_out)
    assert (as_json(found)["device"], as_json(found)["not_covered"]) == ("cuda", "NCCL, offload, fp16, fp8")
    assert as_json(found)["sharing_gpus"] == [4]
