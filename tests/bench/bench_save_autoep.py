"""What DeepSpeed's own `save_checkpoint` of an AutoEP model costs training; our saves: `ckpt/pause_s` of a run.

    python tests/bench/bench_save_autoep.py recipes/moe_1b_a200m.yaml [--folder PLACE] [--saves 3]

One process; the recipe's model in bf16 with fp32 master weights, ZeRO-1, two steps, then saves. AutoEP starts with
transformers 5.17, not with 5.23 (deepspeed 0.19.8).
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import deepspeed
import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from moe_train.train.check import resolve_run

PRESETS = ("mixtral", "qwen3_moe", "deepseek_v3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("bench_save_autoep"))
    parser.add_argument("--saves", type=int, default=3)
    arguments = parser.parse_args()
    model_config = resolve_run(arguments.recipe, (), 1, 1).model_config
    if model_config.model_type not in PRESETS:
        sys.exit(f"{arguments.recipe}: AutoEP has no preset for model_type ({model_config.model_type})")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    os.environ.update(alone)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "expert_parallel": {"enabled": True, "autoep_size": 1, "preset_model": model_config.model_type},
        },
    )
    ids = torch.randint(0, model_config.vocab_size, (1, 256), device=engine.device)
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    for number in range(arguments.saves):
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        engine.save_checkpoint(str(arguments.folder), tag=f"t{number}")
        seconds = time.perf_counter() - began
        nbytes = sum(path.stat().st_size for path in (arguments.folder / f"t{number}").rglob("*") if path.is_file())
        print(f"save {number}: training waited {seconds:.2f} s; {nbytes / 2**30:.2f} GiB", flush=True)
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
