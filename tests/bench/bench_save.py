"""What a save costs training: one that waits for the disk, and one that is written in the background.

    python tests/bench/bench_save.py [--gib 2] [--folder PLACE] [--saves 3]

Tensors of a made-up run on the GPU, or in memory where there is none, and matrix products as training. Printed of each
save: what training waited for, what the writing took, and how much slower the products are while a thread writes. The
first copy is dearer: its memory is new, on a GPU page-locked too. Leaves nothing behind.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from moe_train.checkpoint import Manifest, Piece  # noqa: E402
from moe_train.checkpoint.commit import Retention  # noqa: E402
from moe_train.checkpoint.save import Save  # noqa: E402
from moe_train.checkpoint.snapshot import Snapshot  # noqa: E402
from moe_train.parallel import ParallelGroup  # noqa: E402

SHAPE = (2048, 2048)


def state(nbytes: int, device: str) -> list[Piece]:
    found = []
    for number in range(nbytes // (4 * SHAPE[0] * SHAPE[1])):
        data = torch.randn(SHAPE[0] * SHAPE[1], device=device)
        found.append(Piece(name=f"layer.{number}", expert=None, kind="master", shape=SHAPE, start=0, data=data))
    return found


def product_s(weights: torch.Tensor) -> float:
    """Seconds of one step of made-up training."""
    begun = time.perf_counter()
    for _ in range(20):
        weights @ weights
    if weights.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def save(root: Path, step: int, pieces: list[Piece], snapshot: Snapshot | None, weights: torch.Tensor) -> str:
    begun = time.perf_counter()
    manifest = Manifest(step=step, model_type="made_up", layout={}, recipe={}, scalars={}, state={})
    on_its_way = Save(root, manifest, ParallelGroup.single(), Retention(keep=2))
    if snapshot is None:
        on_its_way.write(pieces)
        meanwhile = []
    else:
        on_its_way.start(snapshot.take(pieces))
        waited = time.perf_counter() - begun
        meanwhile = []
        while on_its_way.busy:
            meanwhile.append(product_s(weights))
        begun = time.perf_counter() - waited
    on_its_way.commit()
    pause = time.perf_counter() - begun
    alone = sum(product_s(weights) for _ in range(5)) / 5
    slower = f", products {sum(meanwhile) / len(meanwhile) / alone - 1:+.0%} meanwhile" if meanwhile else ""
    gigabytes = on_its_way.nbytes / 1e9
    return f"{gigabytes:.2f} GB: training waited {pause:.2f} s, written in {on_its_way.write_s:.2f} s{slower}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=Path("bench_save"))
    parser.add_argument("--saves", type=int, default=3)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads of a CPU"
    print(f"{name}, torch {torch.__version__}")
    pieces = state(int(arguments.gib * (1 << 30)), device)
    weights = torch.randn(4096 if device == "cuda" else 512, 4096 if device == "cuda" else 512, device=device)
    arguments.folder.mkdir()
    try:
        for way, snapshot in (("waits", None), ("background", Snapshot())):
            for step in range(1, arguments.saves + 1):
                print(f"{way:<10} {save(arguments.folder, step, pieces, snapshot, weights)}", flush=True)
    finally:
        shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
