"""Speed and memory of a reshard, against copying, syncing and hashing the same bytes with as many threads.

    python tests/bench/bench_reshard.py [--gib 8] [--folder PLACE] [--jobs N] [--repeats 1] [--warm]

Writes a made-up checkpoint (experts of [1536, 2048] and [2048, 768], fp32 weights and two moments, an embedding), then
in turn reshards it, with the command as a user starts it, and copies it: `cp` of each file, fsync of the copy, SHA-256
of the copy. Before each the source is dropped from the page cache, unless --warm. A reshard hashes every byte twice,
once as it was stored and once as it is written. Needs three times the size on disk; leaves nothing behind.
"""

import argparse
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from moe_train.checkpoint import Manifest, Piece, read_manifest, save_checkpoint  # noqa: E402
from moe_train.checkpoint.threads import default_jobs  # noqa: E402
from moe_train.parallel import ParallelGroup  # noqa: E402

EXPERT = {"gate_up_proj": (1536, 2048), "down_proj": (2048, 768)}
EXPERTS_PER_LAYER = 64
EMBEDDING = (65536, 2048)
KINDS = ("master", "exp_avg", "exp_avg_sq")
LAYOUTS = {
    "EP 3, ZeRO-3 of 6 ranks": "--world 6 --expert-parallel 3 --zero 3",
    "EP 2, expert TP 2, ZeRO-1 of 8 ranks": "--world 8 --expert-parallel 2 --expert-tensor 2 --zero 1",
}
CHILD = """
import sys
from moe_train.cli import app
try:
    app(["reshard", *sys.argv[1:]])
except SystemExit as end:
    assert not end.code, end.code
print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def pieces(nbytes: int) -> Iterator[Piece]:
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(0, 1 << 30, shape, generator=generator, dtype=torch.int32).view(-1).view(torch.float32)

    for kind in KINDS:
        name = "model.embed_tokens.weight"
        yield Piece(name=name, expert=None, kind=kind, shape=EMBEDDING, start=0, data=drawn(EMBEDDING))
    written = len(KINDS) * EMBEDDING[0] * EMBEDDING[1] * 4
    number = 0
    while written < nbytes:
        layer, expert = divmod(number, EXPERTS_PER_LAYER)
        for name, shape in EXPERT.items():
            for kind in KINDS:
                full = f"model.layers.{layer}.mlp.experts.{name}"
                yield Piece(name=full, expert=expert, kind=kind, shape=shape, start=0, data=drawn(shape))
                written += shape[0] * shape[1] * 4
        number += 1


def make(root: Path, nbytes: int) -> Path:
    manifest = Manifest(step=1, model_type="made_up", layout={"world": 1}, recipe={}, scalars={}, state={})
    return save_checkpoint(root, manifest, pieces(nbytes), ParallelGroup.single(), 2)


def drop(folder: Path) -> None:
    """From the page cache."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, destination: Path, jobs: int) -> float:
    """Seconds."""

    def one(path: Path) -> None:
        target = destination / path.name
        subprocess.run(["cp", str(path), str(target)], check=True)
        with target.open("rb") as file:
            os.fsync(file.fileno())
            hashlib.file_digest(file, "sha256")

    destination.mkdir()
    begun = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, source.iterdir()))
    return time.monotonic() - begun


def cpu_seconds() -> float:
    """Of this process and those that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def reshard(source: Path, destination: Path, options: list[str]) -> tuple[float, int]:
    """(seconds, the start of Python included; peak resident bytes)."""
    begun = time.monotonic()
    command = [sys.executable, "-c", CHILD, str(source), str(destination), *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return time.monotonic() - begun, int(result.stdout.split("peak")[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8)
    parser.add_argument("--folder", type=Path, default=Path("bench_reshard.tmp"))
    parser.add_argument("--jobs", type=int, default=default_jobs())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--layouts", default="", help="only those whose name contains this")
    arguments = parser.parse_args()
    needed, free = int(arguments.gib * 3.3 * 2**30), shutil.disk_usage(arguments.folder.absolute().parent).free
    if needed > free:
        sys.exit(f"{needed} bytes are needed, {free} are free")
    arguments.folder.mkdir()
    try:
        source = make(arguments.folder, int(arguments.gib * 2**30))
        nbytes = sum(path.stat().st_size for path in source.iterdir())
        slices = len(read_manifest(source).slices)
        print(f"{nbytes} bytes in {len(list(source.iterdir()))} files, {slices} tensors; {arguments.jobs} threads, "
              f"{len(os.sched_getaffinity(0))} cores, {'warm' if arguments.warm else 'cold'}", flush=True)  # fmt: skip
        for name, options in LAYOUTS.items():
            for _ in range(arguments.repeats if arguments.layouts in name else 0):
                measure(source, arguments.folder, name, options.split(), nbytes, arguments)
    finally:
        shutil.rmtree(arguments.folder)


def measure(source: Path, folder: Path, name: str, options: list[str], nbytes: int, arguments) -> None:
    if not arguments.warm:
        drop(source)
    before = cpu_seconds()
    copied = copy(source, folder / "copy", arguments.jobs)
    copied_cpu = cpu_seconds() - before
    shutil.rmtree(folder / "copy")
    if not arguments.warm:
        drop(source)
    before = cpu_seconds()
    seconds, peak = reshard(source, folder / "made", [*options, "--jobs", str(arguments.jobs)])
    cpu = cpu_seconds() - before
    check = [sys.executable, "-c", CHILD, str(source), str(folder / "made"), "--check"]
    subprocess.run(check, cwd=ROOT, check=True, capture_output=True)
    shutil.rmtree(folder / "made")
    print(
        f"{name}: {seconds:.1f} s ({cpu:.1f} of a core) = {nbytes / seconds / 1e6:.0f} MB/s, peak {peak / 2**20:.0f} "
        f"MiB resident; copy, sync and hash {copied:.1f} s ({copied_cpu:.1f} of a core) = "
        f"{nbytes / copied / 1e6:.0f} MB/s; ratio {copied / seconds:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
