"""A tiny run, assembled inside a test's worker exactly as `train.run` assembles a real one."""

import random
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_train.config.load import parse_recipe
from moe_train.data.indexed import IndexedWriter
from moe_train.diagnostics.progress import NullProgress
from moe_train.diagnostics.throughput import Throughput
from moe_train.diagnostics.tracker import NullTracker
from moe_train.model import load_model_config, num_experts_of
from moe_train.parallel import Groups, build_groups, resolve_topology
from moe_train.train.assemble import Assembly, assemble
from moe_train.train.check import ResolvedRun
from moe_train.train.loop import Trainer
from moe_train.train.run import _resume
from moe_train.train.stop import StopRequest

VOCAB = 257

QWEN3 = {
    "model_type": "qwen3_moe",
    "config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "norm_topk_prob": True,
    },
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "config": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "max_position_embeddings": 32,
    },
}


def write_corpus(prefix: Path) -> Path:
    """Documents of a first-order pattern that a model can learn, ids below VOCAB."""
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.dtype("uint16")) as writer:
        for length in generator.integers(20, 200, size=60):
            steps = generator.integers(1, 4, size=length)
            writer.add_document((generator.integers(0, 250) + np.cumsum(steps)) % 250)
    return prefix


def tiny_recipe(prefix: Path, model: dict[str, Any] = QWEN3, **sections: dict[str, Any]) -> dict[str, Any]:
    """A recipe as a dictionary; `sections` are merged into its sections."""
    tree: dict[str, Any] = {
        "model": deepcopy(model),
        "precision": {"compute": "fp32"},
        "optimizer": {"lr": 3e-3, "grad_clip": 0.5},
        "data": {"corpora": [{"prefix": str(prefix)}], "sequence_length": 16, "validation_fraction": 0.1},
        "batch": {"global_size": 8, "micro_size": 2},
        "train": {"steps": 6, "eval_sequences": 4},
        "tracking": {"mode": "disabled"},
        "diagnostics": {"load_picture": False},
        "zero": {"stage": 1},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section} if isinstance(section, dict) else section
    return tree


class Recorder(NullTracker):
    """Keeps what would be logged, by step."""

    def __init__(self, run_id: str = "tiny"):
        super().__init__(run_id)
        self.logged: dict[int, dict[str, Any]] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        self.logged[step] = self.logged.get(step, {}) | metrics

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))

    def losses(self) -> dict[int, float]:
        return {step: metrics["train/loss"] for step, metrics in self.logged.items() if "train/loss" in metrics}


@dataclass(frozen=True, kw_only=True)
class TinyRun:
    """A trainer at its position, and what it logs."""

    trainer: Trainer
    recorder: Recorder
    assembly: Assembly


def start(recipe: dict[str, Any], run_dir: str | Path, groups: Groups | None = None) -> TinyRun:
    """Assemble, resume if there is a checkpoint, make the trainer. Collective over the whole world."""
    run = resolve(recipe)
    groups = groups or build_groups(run.topology)
    for seed_stream in (random.seed, np.random.seed):
        seed_stream(groups.rank)  # as in a fresh process; a resumed run has to overwrite it
    assembly = assemble(run, groups, torch.device("cpu"))
    position = _resume(assembly, Path(run_dir), lambda *args, **kwargs: None)
    recorder = Recorder()
    throughput = Throughput(flops_per_token=1.0, peak_flops_per_device=None, num_devices=groups.world.world_size)
    trainer = Trainer(assembly, position, Path(run_dir), recorder, NullProgress(), throughput, StopRequest())
    return TinyRun(trainer=trainer, recorder=recorder, assembly=assembly)


def resolve(recipe: dict[str, Any], world: int | None = None) -> ResolvedRun:
    parsed = parse_recipe(recipe)
    config = load_model_config(parsed, VOCAB)
    world = world or (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    parallel = parsed.parallel
    topology = resolve_topology(
        parallel.expert, world, num_experts_of(config), world, parallel.tensor, parallel.expert_tensor
    )
    return ResolvedRun.at(parsed, topology, config)


def train_until(run: TinyRun, step: int, save: bool = True) -> None:
    """Train up to `step`, as the loop would, and save there."""
    while run.trainer.step < step:
        sums, result = run.trainer.train_step()
        for draw in (torch.rand, np.random.rand, random.randrange):  # as dropout and the like would
            draw(3)
        run.trainer.counts_since_log += sums.counts_LE
        run.trainer.rows_since_log += sums.rows_LE
        if run.trainer.step % run.trainer.recipe.diagnostics.log_interval == 0:
            run.trainer.log(sums, result, None)
    if save:
        run.trainer.save()
        assert not run.trainer.saver.failed, run.recorder.events


def weights_of(assembly: Assembly) -> dict[tuple, torch.Tensor]:
    """Copies of this rank's master weights, optimizer states, and the weights that forward uses, by name."""
    engine, built = assembly.engine, assembly.built
    found: dict[tuple, torch.Tensor] = {}
    for fragment in [*engine.dense_fragments(), *engine.store.fragments()]:
        for kind, view in fragment.views.items():
            found[(kind, fragment.name, fragment.expert, fragment.start)] = view.detach().clone()
    for name, parameter in built.model.named_parameters():
        # at stage 3 a parameter comes and goes; what it is gathered from stays
        found["forward", name] = getattr(parameter, "ds_tensor", parameter).detach().clone()
    for tensor in engine.store.tensors:
        found["forward", tensor.name] = tensor.gather().detach().clone()
    for index, bias in enumerate(built.all_biases()):
        found["bias", index] = bias.clone()
    return found


def state_of(run: TinyRun) -> dict[tuple, torch.Tensor]:
    """Copies of everything that decides the rest of this rank's run, by name. Collective at stage 3."""
    engine = run.assembly.engine
    found = weights_of(run.assembly)
    found["rng",] = torch.get_rng_state()
    _, keys, place, *_ = np.random.get_state(legacy=True)
    found["numpy rng",] = torch.tensor([*np.asarray(keys).tolist(), place])
    found["python rng",] = torch.tensor(random.getstate()[1])
    for key, value in (engine.scalars() | {f"experts {k}": v for k, v in engine.store.scalars().items()}).items():
        found["scalar", key] = torch.tensor(value)
    found["counts",] = run.trainer.counts_since_log.clone()
    return found


def differences(one: dict[tuple, torch.Tensor], other: dict[tuple, torch.Tensor]) -> list[str]:
    """Names whose values are not the same to the bit; a NaN equals itself."""
    different = [f"only in one: {key}" for key in one.keys() ^ other.keys()]
    return different + [str(key) for key in one.keys() & other.keys() if not same_bits(one[key], other[key])]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    def as_bytes(value: torch.Tensor) -> torch.Tensor:
        return value.contiguous().view(-1).view(torch.uint8)

    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(as_bytes(one), as_bytes(other))
