"""Runs of every family whose weights depend on nothing but their names, saved as any layout would."""

import hashlib
import io
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from small_configs import FAMILIES
from tiny_run import VOCAB, TinyRun, start, tiny_recipe, train_until
from transformers import AutoModelForCausalLM

from moe_train.hub.export import export, plan_export
from moe_train.train.state import _fragments


def model_of(family: str, **fields: Any) -> dict[str, Any]:
    """The `model` section of a recipe."""
    sizes = {"vocab_size": VOCAB, "max_position_embeddings": 32}
    return {"model_type": family, "config": FAMILIES[family] | sizes | fields}


def drawn(name: str, expert: int | None, shape: tuple[int, ...]) -> torch.Tensor:
    """A logical tensor in float32: norms near 1, all else small and never 0."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {expert}".encode()).digest()[:4], "little")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1
    return values + 1 if "norm" in name else values


@torch.no_grad()
def write_drawn(run: TinyRun) -> None:
    """Replace every weight and correction bias by what its name says."""
    engine, built = run.assembly.engine, run.assembly.built
    for fragment in _fragments(engine):
        full = drawn(fragment.name, fragment.expert, fragment.shape)
        local = full if fragment.part is None else fragment.part.take(full)
        fragment.views["master"].copy_(local.reshape(-1)[fragment.start : fragment.stop])
    names = {id(buffer): name for name, buffer in built.model.named_buffers()}
    for bias in built.all_biases():
        bias.copy_(drawn(names[id(bias)], None, tuple(bias.shape)))
    engine.publish()


def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(run: TinyRun) -> torch.Tensor:
    """Of the training model. Collective."""
    run.assembly.engine.deepspeed.eval()
    with run.assembly.built.context.micro_batch():
        found = run.assembly.engine(input_ids=ids()).logits
    return found.float().clone()


def save_drawn(rank: int, recipe: dict, run_dir: str) -> torch.Tensor:
    """In a worker: a run at step 0, saved. Returns its logits."""
    run = start(recipe, run_dir)
    write_drawn(run)
    logits = logits_of(run)
    run.trainer.save()
    assert not run.trainer.saver.failed, run.recorder.events
    return logits


def save_as_started(rank: int, recipe: dict, run_dir: str, steps: int = 0) -> tuple[torch.Tensor, dict[int, float]]:
    """In a worker: a run as it starts, trained for `steps`, saved. Returns its first logits and its losses."""
    run = start(recipe, run_dir)
    logits = logits_of(run)
    run.assembly.engine.deepspeed.train()
    train_until(run, steps)
    return logits, run.recorder.losses()


def exported(source: Path, out: Path, **options: Any):
    """(fingerprint, what `from_pretrained` needs): a checkpoint or a run's newest, exported."""
    return export(plan_export(source, out, **options))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@torch.no_grad()
def stock_logits(folder: Path) -> torch.Tensor:
    with redirect_stderr(io.StringIO()):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()(input_ids=ids()).logits.float()


def recipe_of(corpus: Path, family: str = "qwen3_moe", **sections: Any) -> dict[str, Any]:
    fields = sections.pop("fields", {})
    return tiny_recipe(corpus, model_of(family, **fields), **sections)
