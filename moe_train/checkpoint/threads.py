"""Work on many files at once, on threads: reading, hashing and writing leave Python's lock alone."""

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

Report = Callable[[str, int, int], None]
"""(what is being done, bytes done, bytes in all), from any thread."""
Task = Callable[[], object]


class Stopped(Exception):
    """Another thread has failed, or the user has had enough."""


def default_jobs() -> int:
    """More threads than cores: some of them wait for the disk."""
    return min(2 * len(os.sched_getaffinity(0)), 16)


class Crew:
    """Args:
    jobs: tasks at once.
    report: told of the bytes of each phase, at most ten times a second, and at its end.
    """

    def __init__(self, jobs: int | None = None, report: Report | None = None):
        self.jobs, self.report, self.stopped = jobs or default_jobs(), report, False

    def run(self, tasks: Iterable[Task]) -> None:
        """Every task; the first error stops them all, and is raised here."""
        self.run_graph(Step(number, task) for number, task in enumerate(tasks))

    def run_graph(self, steps: Iterable["Step"]) -> None:
        """Every step, in this order as far as it may begin."""
        work = _Work(steps)

        def serve() -> None:
            while not self.stopped and (step := work.take()):
                try:
                    step.task()
                except Stopped:
                    return
                except BaseException as error:  # noqa: BLE001 - raised by whoever waits
                    self.stopped = True
                    work.fail(error)
                    return
                work.finish(step)

        threads = [threading.Thread(target=serve, daemon=True) for _ in range(self.jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt must not wait for gigabytes
            self.stopped = True
            work.fail(error)
            for thread in threads:
                thread.join()
            raise
        if work.error is not None:
            raise work.error


class Step(NamedTuple):
    """needs: names of the steps that must be done before."""

    name: Hashable
    task: Task
    needs: frozenset[Hashable] = frozenset()


class _Work:
    """Steps of a crew, and which of them may begin."""

    def __init__(self, steps: Iterable[Step]):
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._ready: deque[Step] = deque()
        self._waiting: dict[Hashable, list[Step]] = defaultdict(list)
        self._missing: dict[Hashable, int] = {}
        self._busy = 0
        for step in steps:
            if not step.needs:
                self._ready.append(step)
            for need in step.needs:
                self._waiting[need].append(step)
                self._missing[step.name] = len(step.needs)

    def take(self) -> Step | None:
        """None: there will be none."""
        with self._changed:
            while not self._ready and self._busy and self.error is None:
                self._changed.wait()
            if not self._ready or self.error is not None:
                return None
            self._busy += 1
            return self._ready.popleft()

    def finish(self, step: Step) -> None:
        with self._changed:
            self._busy -= 1
            for waiting in self._waiting.pop(step.name, ()):
                self._missing[waiting.name] -= 1
                if not self._missing[waiting.name]:
                    self._ready.appendleft(waiting)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()


class Meter:
    """Counts the bytes of one phase over all threads, and stops them with their crew."""

    def __init__(self, crew: Crew, phase: str, total: int):
        self.crew, self.phase, self.total, self.done = crew, phase, total, 0
        self._lock, self._told = threading.Lock(), 0.0

    def advance(self, size: int) -> None:
        if self.crew.stopped:
            raise Stopped
        with self._lock:
            self.done += size
            done, now = self.done, time.monotonic()
            tell = now - self._told > 0.1 or done >= self.total
            if tell:
                self._told = now
        if tell and self.crew.report is not None:
            self.crew.report(self.phase, done, self.total)
