"""The exact text of plain lines; on a terminal, that the line is drawn and the cursor comes back."""

import io

import pytest

from moe_train.diagnostics.progress import NullProgress, Progress, duration, short_number


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_plain_lines():
    out, clock = io.StringIO(), Clock()
    with Progress(600, start_step=10, file=out, clock=clock) as progress:
        clock.now = 2.0
        progress.update(20, loss=4.12341, lr=3e-4, tokens_per_s=5123.0, max_vio=0.417)
        progress.message("saved checkpoints/step_20")
        clock.now = 4.0
        progress.update(120, loss=3.0, lr=1.24e-3, tokens_per_s=812.4, mfu=0.4125, max_vio=1.5, val_loss=3.25)
        clock.now = 10.0
        progress.update(600, loss=float("nan"), lr=0.0)
    assert out.getvalue() == (
        "step  20/600 | loss 4.1234 | lr 3.0e-04 |  5.1k tok/s | MaxVio 0.42 | ETA 1:56\n"
        "saved checkpoints/step_20\n"
        "step 120/600 | loss 3.0000 | val 3.2500 | lr 1.2e-03 |   812 tok/s | MFU 41.2% | MaxVio 1.50 | ETA 0:17\n"
        "step 600/600 | loss nan | lr 0.0e+00 | ETA 0:00\n"
    )


def test_eta_forgets_a_slow_beginning():
    out, clock = io.StringIO(), Clock()
    progress = Progress(1000, file=out, clock=clock)
    clock.now = 500.0
    for step in range(1, 101):
        clock.now += 1.0
        progress.update(step, loss=1.0, lr=1.0)
    assert out.getvalue().splitlines()[-1].endswith("ETA 15:00")


def test_lines_reach_the_file_at_once():
    class Recorder(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed = len(self.getvalue().splitlines())

    out = Recorder()
    progress = Progress(2, file=out)
    progress.update(1, loss=1.0, lr=1.0)
    assert out.flushed == 1


def test_terminal_shows_the_numbers_and_is_left_clean(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    out = io.StringIO()
    progress = Progress(600, is_terminal=True, file=out)

    def fail_inside():
        with progress:
            progress.update(20, loss=4.12341, lr=3e-4, tokens_per_s=5123.0, max_vio=0.417)
            progress.message("evaluated")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    text = out.getvalue()
    assert "loss 4.1234" in text
    assert "\x1b[0mMaxVio 0.42\x1b[90m" in text, "numbers in the terminal's own colour, separators grey"
    assert "evaluated\n" in text
    assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h"), "the cursor stayed hidden"
    assert text.rindex("\x1b[?25h") > text.rindex("loss 4.1234")


def test_a_narrow_terminal_cuts_the_line_instead_of_wrapping(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    with Progress(600, is_terminal=True, file=out) as progress:
        progress.update(20, loss=4.12341, lr=3e-4, tokens_per_s=5123.0, max_vio=0.417)
    assert "…" in out.getvalue()
    assert out.getvalue().count("\n") == 1


def test_null_progress_writes_nothing(capsys):
    with NullProgress() as progress:
        progress.update(1, loss=1.0, lr=1.0)
        progress.message("x")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1.0k"), (9949, "9.9k"), (9960, "10k"), (512_300, "512k"), (1.24e6, "1.2M"),
     (999_600, "1.0M"), (3e12, "3000G")],
)  # fmt: skip
def test_short_numbers(value, text):
    assert short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?:??"), (0, "0:00"), (83.4, "1:23"), (59.6, "1:00"), (7384, "2:03:04"), (273900, "3d 04:05")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
