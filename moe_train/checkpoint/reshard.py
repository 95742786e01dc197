"""Write a checkpoint anew as another layout would have saved it. No process group, no GPU; memory for a few megabytes.

1. The source's manifest is read. What each rank of the new layout owns is worked out from sizes alone. 2. Nothing is
written before the numbers say that it fits. 3. The source's files are hashed, and new ones written to `DST.tmp` at the
same time, several at once: a disk waits for no hash. A new file gets its name only when the hash of every file that
went into it was found to be right, and is then noted in a journal: the same command after a kill hashes those, keeps
them and goes on. A damaged source ends it, and removes what was begun for it. 4. The manifest, and one rename. The same
layout gives the same files, byte for byte, whatever layout they come from.

Step, scalars, the trainer's state and the recipe stay. So do the random states of the ranks that saved them: a run with
as many ranks goes on with them, others never read them. Redundant copies are weights of experts that are stored once:
their number is noted, and where they lay stays in the state, which a run heeds where it fits.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from moe_train.checkpoint.journal import JOURNAL, Journal
from moe_train.checkpoint.manifest import FILE_NAME, FORMAT, MANIFEST, FileEntry, Manifest, verify_file
from moe_train.checkpoint.source import DamagedError, Source, candidates
from moe_train.checkpoint.stream import (
    Buffers,
    OutFile,
    files_of,
    slices_of,
    sources_of,
    unfinished,
    write_file,
)
from moe_train.checkpoint.target import Cuts, Layout, owned
from moe_train.checkpoint.threads import Crew, Meter, Report, Step
from moe_train.disk import sync_folder
from moe_train.errors import CheckpointError

SLICE_BYTES = 512
"""About what one slice takes in a manifest."""

Changes = dict[str, int | bool | None]
"""Fields of a `Layout`; None or left out: as in the source."""
CutsOf = Callable[[Manifest], Cuts]


@dataclass(frozen=True, kw_only=True)
class ReshardPlan:
    """What is to be written: files of each rank, in rank order. passed_over: newer checkpoints that are not whole."""

    source: Source
    layout: Layout
    destination: Path
    files: list[OutFile]
    passed_over: list[str]

    @property
    def temporary(self) -> Path:
        return self.destination.with_name(f"{self.destination.name}.tmp")

    @property
    def nbytes(self) -> int:
        """Of all files and about the manifest."""
        slices = sum(len(file.items) for file in self.files)
        return sum(file.nbytes for file in self.files) + SLICE_BYTES * slices + (1 << 16)

    @property
    def identity(self) -> dict:
        """What an unfinished folder must agree with to be finished."""
        names = [(file.name, file.nbytes) for file in self.files]
        return {
            "source": self.source.digest,
            "layout": str(self.layout),
            "files": hashlib.sha256(repr(names).encode()).hexdigest(),
        }

    def describe(self) -> str:
        """What would be done, in a few lines."""
        source, manifest = self.source, self.source.manifest
        held: dict[str, list[OutFile]] = {}
        for file in self.files:
            held.setdefault(file.name[:10], []).append(file)
        kinds: dict[str, int] = {}
        for key in source.tensors:
            kinds[key.kind] = kinds.get(key.kind, 0) + 1
        lines = [
            f"source       {source.directory}: step {manifest.step}, {manifest.model_type}, "
            f"{len(manifest.files)} files, {_size(source.nbytes)}",
            f"its layout   {', '.join(f'{name} {value}' for name, value in manifest.layout.items())}",
            f"new layout   {self.layout}",
            f"tensors      {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}",
            f"destination  {self.destination}: {len(self.files)} files, {_size(self.nbytes)}; "
            f"{_size(_free(self.destination))} are free",
        ]
        for rank, files in list(held.items())[:16]:
            experts = sorted({item.key.expert for file in files for item in file.items if item.key.expert is not None})
            which = f", experts {experts[0]} to {experts[-1]}" if experts else ""
            lines.append(f"  {rank}  {len(files)} files, {_size(sum(file.nbytes for file in files))}{which}")
        if len(held) > 16:
            lines.append(f"  and {len(held) - 16} more ranks")
        if self.temporary.exists():
            lines.append(f"{self.temporary} is there: its finished files would be hashed and kept")
        return "\n".join(lines)


def plan_reshard(
    source: Path,
    destination: Path,
    changes: Changes,
    cuts: CutsOf | None = None,
    verify: Callable[[Source], None] | None = None,
) -> ReshardPlan:
    """Everything that can be refused without writing.

    Args:
        source: a checkpoint, or a folder of them: the newest that is whole.
        destination: the new checkpoint's folder, which must not exist.
        cuts: of a checkpoint's model family; see `target.owned`.
        verify: hashes a source. Called for those of a folder, before one of them is taken.

    Raises:
        CheckpointError: the source is damaged, the destination exists. TopologyError: the layout does not fit.
    """
    if os.path.lexists(destination):
        raise CheckpointError(
            f"{destination} exists: a checkpoint is never overwritten; give another name or remove it"
        )
    passed_over: list[str] = []
    folders = candidates(source)
    for folder in folders:
        try:
            found = Source(folder)
            if folder.resolve() in (destination.resolve(), *destination.resolve().parents):
                raise CheckpointError(f"{destination} lies inside of {folder}, the source: give another place")
            layout = Layout.changed(found.manifest.layout, changes)
            ranks = owned(layout, found.tensors, partial(cuts, found.manifest) if cuts else None)
            files = [file for rank, items in enumerate(ranks) for file in files_of(rank, items, found)]
            if verify and len(folders) > 1:
                verify(found)
        except CheckpointError as error:
            if len(folders) == 1:
                raise
            passed_over.append(str(error))
            continue
        return ReshardPlan(source=found, layout=layout, destination=destination, files=files, passed_over=passed_over)
    raise CheckpointError(f"none of the {len(folders)} checkpoints in {source} is whole: {passed_over[0]}")


def reshard(
    source: Path,
    destination: Path,
    changes: Changes,
    cuts: CutsOf | None = None,
    jobs: int | None = None,
    report: Report | None = None,
) -> ReshardPlan:
    """Returns what was done. Raises as `plan_reshard` does, and for a disk that is full or fails.

    Args:
        jobs: files at once.
        report: told of the bytes done.
    """
    crew = Crew(jobs, report)
    plan = plan_reshard(source, destination, changes, cuts, partial(verify_source, crew=crew))
    folder = plan.temporary
    begun = not os.path.lexists(folder)
    if begun:
        _check_space(plan, set())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from None
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link; it is not written to")
    journal = Journal(folder, plan.identity)
    try:
        finished = _keep_finished(plan, journal, crew)
        _check_space(plan, finished)
        _write(plan, journal, finished, crew)
        _commit(plan, journal.finished)
    except DamagedError:
        if begun:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: {error.strerror}") from None
    finally:
        journal.close()
    return plan


def _write(plan: ReshardPlan, journal: Journal, finished: set[str], crew: Crew) -> None:
    """Hash what is not hashed of the source, write what is not finished, and give it its name when it may have it."""
    source, folder, buffers = plan.source, plan.temporary, Buffers()
    todo = [file for file in plan.files if file.name not in finished]
    writing = Meter(crew, "writing", sum(file.nbytes for file in todo))
    checks = source.verifications(_hashing(source, crew).advance)
    entries: dict[str, FileEntry] = {}
    steps: list[Step] = []

    def write(file: OutFile) -> None:
        entries[file.name] = write_file(folder / file.name, file, source, buffers, writing)

    def finish(file: OutFile) -> None:
        unfinished(folder / file.name).rename(folder / file.name)
        journal.add(file.name, entries[file.name])

    hashed: set[str] = set()
    for file in todo:
        needed = sources_of(file, source) & checks.keys()
        steps += [Step(("hash", name), checks[name]) for name in sorted(needed - hashed)]
        steps.append(Step(("write", file.name), partial(write, file)))
        before = frozenset({("write", file.name), *(("hash", name) for name in needed)})
        steps.append(Step(("finish", file.name), partial(finish, file), before))
        hashed |= needed
    steps += [Step(("hash", name), checks[name]) for name in sorted(checks.keys() - hashed)]
    crew.run_graph(steps)
    source.refuse_changes()


def verify_source(source: Source, crew: Crew) -> None:
    """Hash every file. Raises `CheckpointError` naming the first bad one."""
    crew.run(source.verifications(_hashing(source, crew).advance).values())


def _hashing(source: Source, crew: Crew) -> Meter:
    return Meter(crew, f"hashing {source.directory.name}", source.nbytes)


def _check_space(plan: ReshardPlan, finished: set[str]) -> None:
    """Raises `CheckpointError` with the numbers."""
    needed = plan.nbytes - sum(file.nbytes for file in plan.files if file.name in finished)
    free = _free(plan.destination)
    if needed > free:
        raise CheckpointError(
            f"{plan.destination}: {needed} bytes ({_size(needed)}) are needed and {free} ({_size(free)}) are free: "
            "nothing was written; make room or give another place"
        )


def _free(path: Path) -> int:
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    return shutil.disk_usage(place).free


def _keep_finished(plan: ReshardPlan, journal: Journal, crew: Crew) -> set[str]:
    """Files that an earlier try has finished and that are still whole; other data files are removed."""
    sizes = {file.name: file.nbytes for file in plan.files}
    found = {name: entry for name, entry in journal.finished.items() if sizes.get(name) == entry.bytes}
    meter, whole = Meter(crew, "hashing what is finished", sum(entry.bytes for entry in found.values())), set()

    def check(name: str, entry: FileEntry) -> None:
        with suppress(CheckpointError, OSError):  # then it is written again
            verify_file(plan.temporary / name, entry, meter.advance)
            whole.add(name)

    crew.run(partial(check, name, entry) for name, entry in found.items())
    for path in plan.temporary.iterdir():
        name = path.name.removesuffix(".part")
        if FILE_NAME.fullmatch(name) and path.name not in whole:
            path.unlink()
    return whole


def _commit(plan: ReshardPlan, written: dict[str, FileEntry]) -> None:
    """The manifest, then the rename that makes the checkpoint exist."""
    folder, final = plan.temporary, plan.destination
    manifest = replace(
        plan.source.manifest,
        layout=plan.layout.to_manifest(),
        files={file.name: written[file.name] for file in plan.files},
        slices=tuple(item for file in plan.files for item in slices_of(file, plan.source)),
        format=FORMAT,
    )
    with (folder / MANIFEST).open("wb") as stream:
        stream.write(manifest.to_json().encode())
        stream.flush()
        os.fsync(stream.fileno())
    sync_folder(folder)
    if os.path.lexists(final):  # a rename would replace an empty folder
        raise CheckpointError(f"{final} has come to exist: the new checkpoint stays in {folder}")
    folder.rename(final)
    sync_folder(final.parent)
    (final / JOURNAL).unlink(missing_ok=True)


def _size(nbytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"
