"""One skewed start, one run per way of balancing: which of them keep all experts in use.

    python tests/bench/bench_balance.py [--steps 150] [--out /tmp/balance] [--picture .assets/balance.png]

The start is a small DeepSeek-V3 whose token embeddings share a direction, which the routers' rows like the more the
lower their number: every token wants the first experts. It is a Hugging Face folder, and `model.weights` of a recipe;
each method is that recipe with other keys. Prints a table; the picture has the MaxVio of every run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS, TOP_K, HIDDEN = 16, 2, 64
RECIPE = """\
model: {{weights: {start}}}
precision: {{compute: fp32}}
optimizer: {{lr: 1.0e-3}}
schedule: {{kind: constant, warmup_steps: 10}}
data: {{corpora: [{{text: python-stdlib}}], sequence_length: 128}}
batch: {{global_size: 16, micro_size: 8}}
train: {{steps: {steps}, eval_sequences: 64}}
checkpoint: {{at_end: false}}
diagnostics: {{load_picture: false}}
tracking: {{mode: disabled}}
seed: 1
"""
METHODS: dict[str, dict[str, object]] = {
    "nothing": {},
    "loss, sequence": {"moe.aux_loss_coef": 0.02},
    "loss, micro-batch": {"moe.aux_loss_coef": 0.02, "moe.aux_loss": "micro_batch"},
    "loss, global batch": {"moe.aux_loss_coef": 0.02, "moe.aux_loss": "global_batch"},
    "bias, sign": {"moe.bias_update_rate": 0.02},
    "bias, zero-mean sign": {"moe.bias_update_rate": 0.02, "moe.bias_update": "zero_mean_sign"},
    "bias, proportional": {"moe.bias_update_rate": 0.02, "moe.bias_update": "proportional"},
    "bias, quantile": {"moe.bias_update_rate": 1.0, "moe.bias_update": "quantile"},
    "sinkhorn": {"moe.router": "sinkhorn"},
    "expert choice": {"moe.router": "expert_choice"},
}


def write_start(folder: Path, skew: float) -> None:
    """The model that every run starts from."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(
        "deepseek_v3",
        vocab_size=257,
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        moe_intermediate_size=64,
        intermediate_size=128,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=256,
    )
    model = AutoModelForCausalLM.from_config(config)
    direction = torch.nn.functional.normalize(torch.randn(HIDDEN), dim=0)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += direction * embedding.norm(dim=1).mean()
        for name, weight in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                likes_E = torch.linspace(1.0, 0.0, EXPERTS)
                weight += skew * likes_E.unsqueeze(1) * direction / HIDDEN**0.5
    model.save_pretrained(folder)


def train(recipe: Path, run_dir: Path, keys: dict[str, object]) -> list[dict]:
    """The lines of a run's metrics.jsonl; a run that is already there is not repeated."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists() or '"event": "end"' not in metrics.read_text():
        sets = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        command = [sys.executable, "-c", "from moe_train.cli import main; main()", "train", str(recipe)]
        subprocess.run([*command, "--run-dir", str(run_dir), *sets], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def picture(curves: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        style = {"color": "black", "linewidth": 2} if name == "nothing" else {"color": f"C{number - 1}"}
        steps, values = zip(*curve, strict=True)
        smooth = [sum(values[max(i - 4, 0) : i + 1]) / len(values[max(i - 4, 0) : i + 1]) for i in range(len(values))]
        axes.plot(steps, smooth, label=name, **style)
    axes.axhline(EXPERTS / TOP_K - 1, color="grey", linestyle=":", linewidth=1)
    axes.text(60, EXPERTS / TOP_K - 1, "all tokens on the same two experts", va="bottom", color="grey", fontsize=8)
    axes.set(xlabel="optimizer step", ylabel="MaxVio, mean of layers and 5 steps", ylim=(-0.2, EXPERTS / TOP_K - 0.4))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--skew", type=float, default=4.0)
    parser.add_argument("--out", type=Path, default=Path("runs/balance"))
    parser.add_argument("--picture", type=Path, default=Path(".assets/balance.png"))
    args = parser.parse_args()
    start, recipe = args.out / "start", args.out / "recipe.yaml"
    write_start(start, args.skew)
    recipe.write_text(RECIPE.format(start=start, steps=args.steps))
    curves = {}
    print(f"{'method':<22} MaxVio: first  last   dead experts  validation loss (chosen by top-k)")
    for name, keys in METHODS.items():
        rows = train(recipe, args.out / name.replace(", ", "-").replace(" ", "_"), keys)
        steps = [row for row in rows if "moe/max_vio_mean" in row]
        curves[name] = [(row["step"], row["moe/max_vio_mean"]) for row in steps]
        last = steps[-10:]
        end = sum(row["moe/max_vio_mean"] for row in last) / len(last)
        dead = sum(row["moe/dead_experts"] for row in last) / len(last)
        validation = [row["val/loss"] for row in rows if "val/loss" in row][-1]
        print(f"{name:<22} {curves[name][0][1]:13.2f} {end:5.2f} {dead:14.1f} {validation:10.4f}", flush=True)
    picture(curves, args.picture)
    print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
