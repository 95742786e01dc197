"""What a user can get wrong, from the recipe to the folder of the run: one sentence, an exit code, no traceback.

Most cases call what the command line calls; the last ones start the command itself.
"""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from moe_train.cli import app, guarded
from moe_train.config.schema import OptimizerSection
from moe_train.data.indexed import IndexedWriter
from moe_train.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MoeTrainError,
    RoutingError,
    TopologyError,
)
from moe_train.optim import optimizer_factory
from moe_train.parallel import Ranks, close_process_group
from moe_train.train import resolve_run, run_recipes
from moe_train.train.check import check_hardware
from moe_train.train.stop import StopRequest

ROOT = Path(__file__).parent.parent.parent
ALONE = Ranks(rank=0, local_rank=0, world=1, per_node=1)
RECIPE = """\
model:
  model_type: qwen3_moe
  config: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1, head_dim: 8,
           num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 8, max_position_embeddings: 64}
precision: {compute: fp32}
optimizer: {lr: 1e-3}
data:
  corpora: [{text: TEXT}]
  sequence_length: 16
  validation_fraction: 0.1
  cache_dir: CACHE
batch: {global_size: 4, micro_size: 2}
train: {steps: 1, eval_sequences: 2}
diagnostics: {load_picture: false}
tracking: {mode: disabled}
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A recipe that runs in a second."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 50)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("TEXT", str(text)).replace("CACHE", str(tmp_path / "cache")))
    return path


@pytest.fixture
def run(recipe, tmp_path, monkeypatch):
    """Run the recipe in this process, with overrides; raises what it raises."""
    monkeypatch.setattr(StopRequest, "install", lambda self: None)  # the signals of this process are pytest's

    def run(*overrides: str, run_dir: Path = tmp_path / "run") -> int:
        threads = torch.get_num_threads()
        try:
            return run_recipes([recipe], overrides, run_dir, ALONE)
        finally:
            close_process_group()
            torch.set_num_threads(threads)

    return run


def resolve(recipe: Path, *overrides: str, world: int = 1):
    return resolve_run(recipe, overrides, world, per_node=8)


# ---- the recipe

WRONG_MODEL = {
    "model_type": (
        "model.model_type=llama",
        RoutingError,
        "model.model_type (llama) has no profile; supported: mixtral",
    ),
    "top-k": (
        "model.config.num_experts_per_tok=5",
        RoutingError,
        "top-k (5) must lie between 1 and the number of experts (4)",
    ),
    "top-k 0": ("model.config.num_experts_per_tok=0", RoutingError, "top-k (0) must lie between 1 and the number of"),
    "no experts": ("model.config.num_experts=0", RoutingError, "must lie between 1 and the number of experts (0)"),
    "misspelt": (
        "model.config.hiden_size=8",
        ConfigError,
        "model.config.hiden_size is no field of Qwen3MoeConfig; did you mean hidden_size?",
    ),
    "text for size": (
        "model.config.hidden_size=big",
        ConfigError,
        "Field 'hidden_size' expected int, got str (value: 'big')",
    ),
    "size 0": ("model.config.hidden_size=0", ConfigError, "model.config.hidden_size (0) must be at least 1"),
    "heads 0": ("model.config.num_attention_heads=0", ConfigError, "model.config.num_attention_heads (0) must be at"),
    "expert size 0": (
        "model.config.moe_intermediate_size=0",
        ConfigError,
        "moe_intermediate_size (0) must be at least 1",
    ),
    "kv heads": (
        "model.config.num_key_value_heads=3",
        ConfigError,
        "num_key_value_heads (3) must divide model.config.num_attention_heads (2)",
    ),
    "odd head": ("model.config.head_dim=7", ConfigError, "RoPE requires an even rotary dimension"),
    "activation": ("model.config.hidden_act=sillu", ConfigError, "hidden_act (sillu) is no activation that"),
    "dtype": ("model.config.dtype=bfloat16", ConfigError, "model.config.dtype is decided by precision.compute"),
    "vocabulary": (
        "model.config.vocab_size=100",
        ConfigError,
        "model.config.vocab_size (100) is below the tokenizer's 257",
    ),
    "too long": ("data.sequence_length=65", ConfigError, "exceeds model.config.max_position_embeddings (64)"),
    "no bias": (
        "moe.bias_update_rate=0.001",
        ConfigError,
        "needs a router with a correction bias, which qwen3_moe has not",
    ),
    "balances nothing": (
        "moe.aux_loss=global_batch moe.aux_loss_coef=0",
        ConfigError,
        "moe.aux_loss (global_batch) says what an auxiliary loss balances, and its weight is 0",
    ),
    "bias without rate": (
        "moe.bias_update=proportional",
        ConfigError,
        "moe.bias_update (proportional) says how a correction bias is updated, and moe.bias_update_rate is 0",
    ),
    "aux loss without layers": (
        "moe.aux_loss_coef=0.01 moe.hash_layers=1",
        ConfigError,
        "moe.aux_loss_coef (0.01) acts on layers that route by scores, and moe.hash_layers (1) leaves none of the 1",
    ),
    "batch": (
        "batch.global_size=5",
        ConfigError,
        "set batch.global_size to 4 or 6, or batch.micro_size to one of [1, 5]",
    ),
    "tokenizer": ("data.tokenizer=nowhere", DataError, "nowhere: no such tokenizer; set data.tokenizer to byte"),
    "EP": ("parallel.expert=2", TopologyError, "parallel.expert (2) exceeds the number of ranks (1)"),
}


@pytest.mark.parametrize("name", WRONG_MODEL)
def test_wrong_model_is_refused_before_anything_starts(recipe, name):
    override, kind, expected = WRONG_MODEL[name]
    with pytest.raises(kind) as caught:
        resolve(recipe, *override.split())
    message = str(caught.value)
    assert expected in message
    assert message.startswith(f"{recipe}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("world", "overrides", "expected"),
    [
        (4, ("parallel.expert=5",), "parallel.expert (5) exceeds the number of ranks (4)"),
        (4, ("parallel.expert=3",), "parallel.expert (3) must divide the number of ranks (4): use one of [1, 2, 4]"),
        (2, ("world_sizes=[1, 4]",), "world_sizes ([1, 4]) leaves out 2 ranks"),
    ],
)
def test_world_that_does_not_fit_the_layout(recipe, world, overrides, expected):
    with pytest.raises(TopologyError) as caught:
        resolve(recipe, "batch.global_size=8", *overrides, world=world)
    assert str(caught.value).startswith(f"{recipe}: {expected}")


def test_inconsistent_numbers_are_listed_at_once(recipe):
    with pytest.raises(TopologyError) as caught:
        resolve(
            recipe,
            "world_sizes=[8]",
            "model.config.num_experts_per_tok=5",
            "parallel.expert=2",
            "batch.global_size=7",
            world=3,
        )
    lines = str(caught.value).splitlines()
    assert [line.removeprefix(f"{recipe}: ").split()[0] for line in lines] == [
        "world_sizes",
        "top-k",
        "parallel.expert",
        "batch.global_size",
    ]


def test_several_wrong_fields_are_listed_at_once(recipe):
    with pytest.raises(ConfigError) as caught:
        resolve(recipe, "model.config.hiden_size=8", "model.config.foo=1", "model.config.dtype=x")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no config.json there"),
        ("{", "config.json cannot be read as JSON"),
        ("[]", "config.json names no model_type"),
        ('{"hidden_size": 8}', "config.json names no model_type"),
        ('{"model_type": "bert"}', "model.model_type (bert) has no profile"),
    ],
)
def test_model_path_without_a_usable_config(recipe, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(MoeTrainError) as caught:
        resolve(recipe, f"model={{path: '{tmp_path}'}}")
    assert expected in str(caught.value)


# ---- the machine


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("precision.compute=fp16",), "precision.compute (fp16) cannot run on a CPU: set it to fp32 or bf16"),
        (("model.attention=flash_attention_2",), "model.attention (flash_attention_2) needs a GPU: set it to sdpa"),
        (("optimizer.name=deepspeed_fused_adam",), "optimizer.name (deepspeed_fused_adam) needs a CUDA GPU"),
    ],
)
def test_what_a_cpu_cannot_do(recipe, overrides, expected):
    with pytest.raises(ConfigError) as caught:
        check_hardware(resolve(recipe, *overrides), torch.device("cpu"))
    assert str(caught.value).startswith(expected)


def test_bf16_on_a_gpu_without_it(recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    with pytest.raises(
        ConfigError, match=r"precision.compute \(bf16\) cannot run on Tesla V100: set it to fp16 or fp32"
    ):
        check_hardware(resolve(recipe, "precision.compute=bf16"), torch.device("cuda", 0))


APEX = {  # what is installed under the name apex -> what is said
    "absent": ((), "apex is not installed; build NVIDIA's apex"),
    "PyPI's": (
        ("apex/__init__.py", "apex/views.py"),
        "is another project (the one on PyPI is a web toolkit), not NVIDIA's",
    ),
    "broken": (("apex/__init__.py!",), "is another project (the one on PyPI is a web toolkit), not NVIDIA's"),
    "without CUDA": (
        ("apex/__init__.py", "apex/optimizers/__init__.py", "apex/normalization/__init__.py"),
        "apex was built without its CUDA extension",
    ),
    "on a CPU": (
        ("apex/__init__.py", "apex/optimizers/__init__.py", "apex/normalization/__init__.py", "amp_C.py"),
        "needs a CUDA GPU: set optimizer.name to adamw",
    ),
}


@pytest.mark.parametrize("name", APEX)
def test_apex_that_is_not_the_real_one(tmp_path, monkeypatch, name):
    files, expected = APEX[name]
    for file in files:
        path = tmp_path / file.rstrip("!")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise ImportError('pyramid is missing')" if file.endswith("!") else "")
    elsewhere = [p for p in sys.path if not (Path(p) / "apex").is_dir()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for module in [m for m in sys.modules if m.split(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, module)
    importlib.invalidate_caches()
    section = OptimizerSection(name="apex_fused_adam", lr=1e-3)
    try:
        with pytest.raises(ConfigError) as caught:
            optimizer_factory(section, torch.device("cpu"))
    finally:
        for module in [m for m in sys.modules if m.split(".")[0] in ("apex", "amp_C")]:
            del sys.modules[module]
    assert str(caught.value).startswith("optimizer.name (apex_fused_adam)")
    assert expected in str(caught.value)


# ---- the data and the folder of the run


def test_missing_text(run, tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder; set data\.corpora text to one, or to python-stdlib"):
        run(f"data.corpora=[{{text: '{tmp_path}/nowhere'}}]")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_missing_prefix(run, tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere.idx: no such file; a corpus prefix is the path without .bin and .idx"
    ):
        run(f"data.corpora=[{{prefix: '{tmp_path}/nowhere'}}]")


def test_empty_corpus_leaves_nothing_behind(run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="the corpus is empty"):
        run(f"data.corpora=[{{text: '{tmp_path}/empty.txt'}}]")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_id_outside_the_vocabulary(run, tmp_path):
    with IndexedWriter(tmp_path / "ids", np.dtype(np.uint16)) as writer:
        writer.add_document(np.arange(200, dtype=np.uint16))
        writer.add_document(np.array([1, 2, 257], dtype=np.uint16))
    with pytest.raises(DataError, match=r"ids.bin: token 202 \(byte 404\) has id 257, but the vocabulary has 257 ids"):
        run(f"data.corpora=[{{prefix: '{tmp_path}/ids'}}]")


def test_sequence_longer_than_the_corpus(run, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match=r"data.sequence_length \(16\) needs at least 17; shorten the sequence"):
        run(f"data.corpora=[{{text: '{tmp_path}/short.txt'}}]")


def test_run_folder_that_cannot_be_made(run, recipe):
    with pytest.raises(ConfigError, match=r"--run-dir .*recipe.yaml/run: cannot be written \(Not a directory: "):
        run(run_dir=recipe / "run")


def test_resume_must_without_a_checkpoint(run):
    with pytest.raises(CheckpointError, match=r"checkpoint.resume \(must\): .* holds no complete checkpoint; give its"):
        run("checkpoint.resume=must")


# ---- the command line


def test_error_becomes_one_message_and_its_exit_code(capsys):
    def fail() -> int:
        raise DataError("data.bin: truncated")

    with pytest.raises(SystemExit) as caught:
        guarded(fail)
    assert caught.value.code == DataError.exit_code == 4
    assert capsys.readouterr().err == "error: data.bin: truncated\n"


def test_exit_codes_differ():
    codes = [kind.exit_code for kind in (ConfigError, RoutingError, DataError, CheckpointError)]
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


def test_check_prints_the_layout_and_starts_nothing(recipe, tmp_path):
    done = CliRunner().invoke(app, ["check", str(recipe), "--world", "2", "--set", "parallel.expert=2"])
    assert done.exit_code == 0, done.output
    # embedding and output 257 x 16; attention 16 x 8 x (2 + 1 + 1 + 2), two norms of 8; three of 16; router 16 x 4
    dense, experts = 2 * 257 * 16 + 16 * 8 * 6 + 2 * 8 + 3 * 16 + 16 * 4, 4 * 3 * 16 * 8
    expected = [f"{n / 1e6:.2f} M" for n in (dense + experts, dense + experts // 2, dense + experts // 2)]
    assert "parameters {} total, {} active per token, {} on a rank".format(*expected) in done.output
    assert "2 ranks = 1 x EP 2, ZeRO-1, fp32" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml", "text.txt"]


def test_check_refuses_with_the_exit_code_of_the_error(recipe):
    done = CliRunner().invoke(app, ["check", str(recipe), "--set", "model.model_type=llama"])
    assert done.exit_code == RoutingError.exit_code
    assert done.stderr.startswith(f"error: {recipe}: model.model_type (llama) has no profile")
    assert CliRunner().invoke(app, ["check", str(recipe), "--world", "0"]).exit_code == 2


def command(
    *arguments: str | Path, prefix: tuple[str, ...] = (sys.executable, "launch")
) -> subprocess.CompletedProcess:
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR")
    }
    return subprocess.run(
        [*prefix, *map(str, arguments)], cwd=ROOT, env=clean, capture_output=True, text=True, timeout=120
    )


def check_refusal(done: subprocess.CompletedProcess, code: int, expected: str) -> None:
    """One message, on stderr."""
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, done.stderr
    assert expected in messages[0]
    assert "Traceback" not in done.stderr + done.stdout
    assert done.returncode == code


def test_launch_with_a_missing_recipe(tmp_path):
    done = command(tmp_path / "nowhere.yaml")
    check_refusal(done, 2, f"{tmp_path}/nowhere.yaml: the recipe does not exist")


def test_no_recipe_starts_when_a_later_one_is_wrong(recipe, tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(recipe.read_text().replace("steps: 1", "stepz: 1"))
    done = command(recipe, wrong, "--run-dir", tmp_path / "run")
    check_refusal(done, 2, f"{wrong}:13: train.steps is required")
    assert (
        f"error: {wrong}:13: train.steps is required\n{wrong}:13: unknown key train.stepz; did you mean" in done.stderr
    )
    assert not (tmp_path / "run").exists()


def test_launch_with_an_empty_corpus(recipe, tmp_path):
    (tmp_path / "text.txt").write_text("")
    done = command(recipe, "--run-dir", tmp_path / "run")
    check_refusal(done, 4, "the corpus is empty")


def test_two_ranks_fail_at_once_and_say_it_once(recipe, tmp_path):
    """Through DeepSpeed's own launcher: nobody waits for the other."""
    (tmp_path / "text.txt").write_text("")
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    begin = time.monotonic()
    done = command(recipe, "--run-dir", tmp_path / "run", prefix=(deepspeed, "--num_gpus", "2", "launch"))
    assert time.monotonic() - begin < 240  # most of it is two imports of torch; a collective would wait for 600
    check_refusal(done, 4, "the corpus is empty")
