"""Processes that die while they save; what is left must load. A script, so that it can fork: JSON on stdout.

dying_saves.py random FOLDER waited|background KILLS SEED    SIGKILL at random moments; each goes on from the last
dying_saves.py every FOLDER waited|background                once before each call that changes the disk
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from moe_train.checkpoint import CheckpointReader, Manifest, Piece, newest_complete
from moe_train.checkpoint import save as saving
from moe_train.checkpoint.commit import Retention
from moe_train.checkpoint.save import Save
from moe_train.checkpoint.snapshot import Snapshot
from moe_train.parallel import ParallelGroup

CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")
DIED = 10
"""Exit code of a process that died before a call, less the call's place in CALLS."""


def pieces_of(step: int, size: int) -> list[Piece]:
    """Twelve tensors whose every element tells the step."""
    return [
        Piece(
            name=f"layer.{index}.weight",
            expert=index % 4 if index > 3 else None,
            kind=kind,
            shape=(size,),
            start=0,
            data=torch.arange(size, dtype=torch.float32) + 1000 * step + index,
        )
        for index in range(6)
        for kind in ("master", "exp_avg")
    ]


def save_step(root: Path, step: int, size: int, background: bool) -> None:
    """As a trainer does; in the background while the live tensors change."""
    scalars = {"dense": {"step": float(step)}, "experts": {}}
    manifest = Manifest(
        step=step, model_type="tiny", layout={}, recipe={}, scalars=scalars, state={"val_loss": 1 / step}
    )
    live = pieces_of(step, size)
    save = Save(root, manifest, ParallelGroup.single(), Retention(keep=2, keep_best=1))
    if background:
        save.start(Snapshot().take(live))
        for piece in live:
            piece.data.fill_(-1.0)
    else:
        save.write(live)
    save.commit()


def newest_step(root: Path, size: int) -> int:
    """Of the newest whole checkpoint, every element of which is right; nothing that looks like one is damaged."""
    found, reasons = newest_complete(root)
    assert found is not None
    assert not reasons, reasons
    reader = CheckpointReader(found)
    step = reader.manifest.step
    expected, read = pieces_of(step, size), pieces_of(0, size)
    reader.fill(read)
    for mine, right in zip(read, expected, strict=True):
        assert torch.equal(mine.data, right.data), f"{found}: {mine.kind} of {mine.name}"
    return step


def forked(action) -> int:
    """The process's number."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - this process must end here
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child


def kill_at_random(root: Path, background: bool, kills: int, seed: int) -> dict:
    """For each kill: the newest step before it, the last one that the process said was done, the newest afterwards."""
    size, draw, seen = 1 << 18, random.Random(seed), []
    saving.FILE_BYTES = 1 << 22  # four files
    save_step(root, 1, size, background)
    began = time.monotonic()
    save_step(root, 2, size, background)
    seconds = time.monotonic() - began
    for _ in range(kills):
        before = newest_step(root, size)
        told, tell = os.pipe()

        def go_on(first: int = before + 1, tell: int = tell) -> None:
            for step in range(first, first + 1000):
                save_step(root, step, size, background)
                os.write(tell, b".")

        child = forked(go_on)
        os.close(tell)
        moment = draw.uniform(0.1, 3) * seconds
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        done = before + len(os.read(told, 10_000))
        os.close(told)
        unfinished = any((path / "rank_00000_000.safetensors").exists() for path in root.glob("step_*.tmp"))
        seen.append([before, done, newest_step(root, size), unfinished, round(moment, 4)])
    return {"seen": seen, "seed": seed}


def die_before(number: int, torn: bool) -> None:
    """End this process before the call of that number, a torn write half done."""
    count = 0

    def deadly(place: int, original):
        def call(*args, **kwargs):
            nonlocal count
            if count == number:
                if torn:
                    original(args[0], args[1][: len(args[1]) // 2])
                os._exit(DIED + place)
            count += 1
            return original(*args, **kwargs)

        return call

    for place, name in enumerate(CALLS):
        setattr(os, name, deadly(place, getattr(os, name)))


def die_at_every_call(folder: Path, background: bool) -> dict:
    """Step 3 after 1 and 2: (call, torn, the newest step afterwards) of each death; then steps 3 and 4 are saved."""
    size, seen, number, torn = 500, [], 0, False
    saving.FILE_BYTES = 3 * 4 * size
    for step in (1, 2):
        save_step(folder / "before", step, size, background)
    while True:
        root = folder / "now"
        shutil.copytree(folder / "before", root)

        def save(root: Path = root, number: int = number, torn: bool = torn) -> None:
            die_before(number, torn)
            save_step(root, 3, size, background)

        code = os.waitstatus_to_exitcode(os.waitpid(forked(save), 0)[1])
        if code == 0:
            return {"seen": seen, "left": sorted(path.name for path in root.iterdir())}
        call = CALLS[code - DIED]
        seen.append([call, torn, newest_step(root, size)])
        for step in (3, 4):
            save_step(root, step, size, background)
        assert newest_step(root, size) == 4
        assert sorted(path.name for path in root.iterdir()) == ["best", "latest", "step_00000003", "step_00000004"]
        shutil.rmtree(root)
        torn = call == "write" and not torn
        number += not torn


if __name__ == "__main__":
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    what, where, how, *numbers = sys.argv[1:]
    act = {"random": kill_at_random, "every": die_at_every_call}[what]
    print(json.dumps(act(Path(where), how == "background", *map(int, numbers))))
