"""Saves that are written while training goes on: the same bytes as a save that waits, and never half a checkpoint."""

import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_run import DEEPSEEK, TinyRun, start, tiny_recipe, train_until, write_corpus

from moe_train.checkpoint import newest_complete, read_manifest, steps_in
from moe_train.checkpoint import save as saving
from moe_train.checkpoint import snapshot as snapshots
from moe_train.checkpoint.save import Save
from moe_train.diagnostics.progress import NullProgress
from moe_train.errors import CheckpointError, TrainingError
from moe_train.testing import run_distributed
from moe_train.train import saver


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


class Held:
    """While it is open, what a rank writes in the background waits for `release`."""

    def __init__(self, hold: bool = True):
        self.released, self._write_files = threading.Event(), saving._write_files
        if not hold:
            self.released.set()

    def __enter__(self) -> "Held":
        saving._write_files = self.write_files
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        saving._write_files = self._write_files

    def write_files(self, folder, rank, pieces, go_on):
        if threading.current_thread() is not threading.main_thread():
            while not self.released.wait(0.001):
                go_on()  # as between two chunks
        return self._write_files(folder, rank, pieces, go_on)

    def release(self) -> None:
        self.released.set()


class Messages(NullProgress):
    """Keeps them."""

    def __init__(self):
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def listen(run: TinyRun) -> list[str]:
    messages = Messages()
    run.trainer.progress = run.trainer.saver.progress = messages
    return messages.texts


def saved(folder: str | Path) -> list[int]:
    return [step for step, _ in steps_in(Path(folder) / "checkpoints")]


# ---- the same bytes


def save_both_ways(rank: int, recipe: dict, folder: str) -> list[tuple[bool, list[int]]]:
    """Step 2, waited for and then in the background, which is held until step 4: (writing, saved) after each step."""
    run = start(recipe, f"{folder}/waited")
    trainer, there = run.trainer, f"{folder}/background"
    train_until(run, 2)
    trainer.saver.saved_step, trainer.saver.root = None, Path(there) / "checkpoints"
    seen = []
    with Held() as held:
        trainer.save(wait=False)
        for step in (3, 4, 5):
            if step == 5:
                held.release()
                while trainer.saver.busy:
                    time.sleep(0.001)
            sums, _ = trainer.train_step()
            trainer.counts_since_log += sums.counts_LE
            torch.rand(3)  # as dropout would
            seen.append((sums.writing, saved(there)))
        trainer.saver.finish()
    return [*seen, (trainer.saver.busy, saved(there))]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_the_background_writes_what_a_save_that_waits_writes(tmp_path, corpus, stage, precision):
    recipe = tiny_recipe(
        corpus, DEEPSEEK, zero={"stage": stage}, precision={"compute": precision}, parallel={"expert": 2},
        moe={"bias_update_rate": 1e-2},
    )  # fmt: skip
    for seen in run_distributed(save_both_ways, 2, recipe, str(tmp_path)):
        assert seen == [(True, []), (True, []), (False, []), (False, [2])]
    found = [read_manifest(tmp_path / name / "checkpoints" / "step_00000002") for name in ("waited", "background")]
    assert found[0] == found[1]
    assert len(found[0].files) == 2
    assert newest_complete(tmp_path / "background" / "checkpoints")[1] == []


# ---- in the loop


def train_held(rank: int, recipe: dict, folder: str) -> tuple[list[str], dict, list[tuple[int, list[int]]]]:
    """Rank 1's thread writes nothing before the main thread asks for it: messages, logged, what is saved by step."""
    run = start(recipe, folder)
    trainer, texts, seen = run.trainer, listen(run), []
    step_of = trainer.train_step

    def step():
        seen.append((trainer.step, saved(folder)))
        return step_of()

    trainer.train_step = step
    commit, saver.WORTH_TELLING_S = Save.commit, 0.0
    with Held(hold=rank == 1) as held:

        def asked(save: Save) -> Path:
            held.release()
            return commit(save)

        Save.commit = asked
        try:
            assert trainer.train()
        finally:
            Save.commit, saver.WORTH_TELLING_S = commit, 1.0
    return texts, run.recorder.logged, seen


def test_a_save_that_is_due_waits_for_the_one_on_its_way(tmp_path, corpus):
    """Due at 2, 4 and 6; the one of step 2 is not done on rank 1 before it is asked for, which is at step 4."""
    recipe = tiny_recipe(corpus, checkpoint={"interval": 2, "keep": 3})
    for texts, logged, seen in run_distributed(train_held, 2, recipe, str(tmp_path)):
        assert [steps for step, steps in seen if step < 4] == [[]] * 4
        assert dict(seen)[4] == [2]
        assert [text for text in texts if text.startswith("step 4: waited")]
        assert len([text for text in texts if text.startswith("saved ")]) == 3
        for step in (2, 4, 6):
            costs = {key: value for key, value in logged[step].items() if key.startswith("ckpt/")}
            directory = tmp_path / "checkpoints" / f"step_{step:08d}"
            sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
            assert costs["ckpt/bytes"] == sum(sizes)
            assert costs.keys() == {"ckpt/pause_s", "ckpt/write_s", "ckpt/bytes"}
            assert min(costs.values()) > 0
    assert saved(tmp_path) == [2, 4, 6]


def train_while_rank_0_commits(rank: int, recipe: dict, folder: str) -> list[tuple[bool, list[int]]]:
    """The rename is held until the main thread asks, at step 6: (all have written, saved) as each step begins."""
    run = start(recipe, folder)
    trainer, seen, asked = run.trainer, [], threading.Event()
    step_of, commit, wait_for_all = trainer.train_step, saving.commit, Save.commit

    def step():
        while trainer.step == 3 and trainer.saver.busy:
            time.sleep(0.001)
        save = trainer.saver._save
        seen.append((save is not None and save.gathered, saved(folder)))
        return step_of()

    def held(*args):
        if threading.current_thread() is not threading.main_thread():
            asked.wait()
        commit(*args)

    def ask(save: Save) -> Path:
        asked.set()
        return wait_for_all(save)

    trainer.train_step = step
    saving.commit, Save.commit = held, ask
    try:
        assert trainer.train()
    finally:
        saving.commit, Save.commit = commit, wait_for_all
    return seen


def test_training_goes_on_while_rank_0_makes_the_checkpoint_exist(tmp_path, corpus):
    """Begun at step 3, written by all at step 4; nobody waits for the rename before the next save, at step 6."""
    recipe = tiny_recipe(corpus, checkpoint={"interval": 3})
    for seen in run_distributed(train_while_rank_0_commits, 2, recipe, str(tmp_path)):
        assert seen == [(False, [])] * 4 + [(True, [])] * 2
    assert saved(tmp_path) == [3, 6]


def fail_to_commit(rank: int, recipe: dict, folder: str) -> tuple[str, dict]:
    """Rank 0's disk is full when it makes the first checkpoint exist: outcome, failures logged by step."""
    run = start(recipe, folder)
    commit, calls = saving.commit, []

    def failing(*args):
        calls.append(0)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        commit(*args)

    saving.commit = failing
    try:
        outcome = str(run.trainer.train())
    finally:
        saving.commit = commit
    logged = {step: metrics["ckpt/failed"] for step, metrics in run.recorder.logged.items() if "ckpt/failed" in metrics}
    return outcome, logged


def test_a_commit_that_fails_warns_on_all_ranks(tmp_path, corpus):
    recipe = tiny_recipe(corpus, checkpoint={"interval": 2, "keep": 9})
    assert run_distributed(fail_to_commit, 2, recipe, str(tmp_path)) == [("True", {2: 1})] * 2
    assert saved(tmp_path) == [4, 6]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def stop_with_one_on_its_way(rank: int, recipe: dict, folder: str) -> tuple[bool, int, int | None]:
    """A signal to rank 1 in step 3, while rank 0 is writing step 2."""
    run = start(recipe, folder)
    trainer = run.trainer
    forward = trainer.forward_loss

    def spy(*args):
        trainer.stop.requested |= rank == 1 and trainer.step == 2
        return forward(*args)

    trainer.forward_loss = spy
    commit = Save.commit
    with Held(hold=rank == 0) as held:

        def asked(save: Save) -> Path:
            held.release()
            return commit(save)

        Save.commit = asked
        try:
            finished = trainer.train()
        finally:
            Save.commit = commit
    return finished, trainer.step, trainer.saved_step


def test_a_signal_finishes_the_one_on_its_way_and_saves_its_own_step(tmp_path, corpus):
    recipe = tiny_recipe(corpus, checkpoint={"interval": 2})
    assert run_distributed(stop_with_one_on_its_way, 2, recipe, str(tmp_path)) == [(False, 3, 3)] * 2
    assert saved(tmp_path) == [2, 3]
    assert newest_complete(tmp_path / "checkpoints")[1] == []


def fail_in_the_background(rank: int, recipe: dict, folder: str, failures: int) -> tuple[str, dict, int]:
    """Rank 1's first writes fail: outcome, failures logged by step, the step reached."""
    run = start(recipe, folder)
    original, calls = saving._write_files, []

    def failing(*args):
        calls.append(0)
        if rank == 1 and len(calls) <= failures:
            assert threading.current_thread() is not threading.main_thread()
            raise OSError(28, "No space left on device")
        return original(*args)

    saving._write_files = failing
    try:
        outcome = str(run.trainer.train())
    except CheckpointError as error:
        outcome = str(error)
    finally:
        saving._write_files = original
    logged = {step: metrics["ckpt/failed"] for step, metrics in run.recorder.logged.items() if "ckpt/failed" in metrics}
    return outcome, logged, run.trainer.step


def test_a_writer_that_fails_warns_on_all_ranks_and_three_in_a_row_end_the_run(tmp_path, corpus):
    recipe = tiny_recipe(corpus, checkpoint={"interval": 1, "keep": 9}, train={"steps": 5})
    assert run_distributed(fail_in_the_background, 2, recipe, str(tmp_path), 2) == [("True", {1: 1, 2: 2}, 5)] * 2
    assert saved(tmp_path) == [3, 4, 5]
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()}
    longer = {**recipe, "train": {**recipe["train"], "steps": 12}}
    for outcome, logged, step in run_distributed(fail_in_the_background, 2, longer, str(tmp_path), 3):
        assert "checkpoint not written (rank 1)" in outcome
        assert "No space left" in outcome
        assert logged == {6: 1, 7: 2, 8: 3}
        assert step < 12
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").rglob("*") if path.is_file()} == before


def end_by_error(rank: int, recipe: dict, folder: str, error: str) -> tuple[str, list[int], int]:
    """In step 4, with the save of step 2 on its way on all ranks: what is raised, what is saved, threads left."""
    run = start(recipe, folder)
    trainer = run.trainer
    step_of = trainer.train_step

    def step():
        if trainer.step == 3:
            if error == "on all ranks":
                held.release()
                raise TrainingError("the loss is nan")
            raise RuntimeError("Connection reset by peer")
        return step_of()

    trainer.train_step = step
    raised = ""
    with Held() as held:
        try:
            with trainer.saver:
                trainer.train()
        except (TrainingError, RuntimeError) as caught:
            raised = str(caught)
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("write step_")]
    return raised, saved(folder), len(threads)


@pytest.mark.parametrize(("error", "steps"), [("on all ranks", [2]), ("of a dead peer", [])])
def test_what_ends_a_run_on_all_ranks_finishes_the_save_and_what_ends_one_rank_gives_it_up(
    tmp_path, corpus, error, steps
):
    """A rank whose peers are gone must not wait for them, nor leave a thread that reads memory as the process ends."""
    recipe = tiny_recipe(corpus, checkpoint={"interval": 2})
    text = "the loss is nan" if steps else "Connection reset by peer"
    assert run_distributed(end_by_error, 2, recipe, str(tmp_path), error) == [(text, steps, 0)] * 2


def train_with_little_memory(rank: int, recipe: dict, folder: str) -> tuple[list[str], list[int | None]]:
    """Rank 1's host has none to spare: the messages, and the last saved step when each step begins."""
    run = start(recipe, folder)
    texts, seen, step_of = listen(run), [], run.trainer.train_step

    def step():
        seen.append(run.trainer.saved_step)
        return step_of()

    run.trainer.train_step = step
    original = saving.available_memory
    saving.available_memory = lambda: 10 if rank == 1 else 1 << 50
    try:
        run.trainer.train()
    finally:
        saving.available_memory = original
    return texts, seen


def test_without_memory_for_a_copy_training_waits(tmp_path, corpus):
    recipe = tiny_recipe(corpus, checkpoint={"interval": 2}, train={"steps": 4})
    for texts, seen in run_distributed(train_with_little_memory, 2, recipe, str(tmp_path)):
        assert seen == [None, None, 2, 2]
        assert sum("does not fit in host memory" in text for text in texts) == 1


def test_memory_that_can_be_taken(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\nHugePages_Total: 0\n")
    assert snapshots._of_host(tmp_path / "meminfo") == 5000 * 1024
    assert snapshots._of_container(tmp_path) > 1 << 60
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 250\nfile_mapped 9\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert snapshots._of_container(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("1000\n")
    assert snapshots._of_container(tmp_path) == 1000 - 700 + 250
    assert 0 < snapshots.available_memory() < 1 << 60


# ---- the best ones


LOSSES = {1: 5.0, 2: 1.0, 3: 1.0, 4: float("nan"), 5: 2.0, 6: 3.0, 7: 4.0}


def train_to(rank: int, recipe: dict, folder: str, last: int) -> list[int]:
    """With evaluations that say LOSSES, stopped after step `last`."""
    run = start(recipe, folder)
    trainer = run.trainer

    def evaluate() -> float:
        trainer.stop.requested = trainer.step >= last - 1  # seen in the next step
        return LOSSES[trainer.step]

    trainer.evaluate = evaluate
    trainer.train()
    return saved(folder)


def test_the_best_checkpoints_stay_also_after_a_restart(tmp_path, corpus):
    recipe = tiny_recipe(
        corpus, train={"steps": 7, "eval_interval": 1}, checkpoint={"interval": 1, "keep": 2, "keep_best": 2}
    )
    best = tmp_path / "checkpoints" / "best"
    assert run_distributed(train_to, 1, recipe, str(tmp_path), 4) == [[2, 3, 4]]
    assert best.read_text() == "step_00000002\n"
    assert run_distributed(train_to, 1, recipe, str(tmp_path), 9) == [[2, 3, 6, 7]]
    assert best.read_text() == "step_00000002\n"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000007\n"
