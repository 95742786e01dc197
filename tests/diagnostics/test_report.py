"""`moe-train report`: the page holds what metrics.jsonl says, nothing of it runs, and nothing is lost unsaid."""

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from moe_train.cli import app
from moe_train.diagnostics.report import MAX_FRAMES, MAX_POINTS, report_html, run_data
from moe_train.diagnostics.routing_files import RoutingFiles
from moe_train.diagnostics.run_record import read_run

COUNTS = [[[4, 0, 2], [3, 3, 0]], [[1, 0, 5], [2, 2, 2]], [[2, 0, 4], [0, 6, 0]]]


def load_line(step, counts):
    return {"event": "load", "step": step, "first_step": step - 9, "time": 100.0 + step, "counts": counts}


def lines_of_a_run():
    start = {"event": "start", "step": 0, "time": 100.0, "about": ["model  qwen3_moe, tiny"], "steps": 40, "world": 2}
    metrics = [
        {"step": s, "time": 100.0 + s, "train/loss": 4.0 - s / 10, "perf/tokens_per_s": 1000 + s} for s in (10, 20, 30)
    ]
    loads = [load_line(10 * (n + 1), counts) for n, counts in enumerate(COUNTS)]
    return [start, {"step": 0, "time": 101.0, "val/untrained": 5.5}, *metrics, *loads]


def write_run(folder: Path, lines, tail="") -> Path:
    folder.mkdir(parents=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + tail)
    return folder


class Page(HTMLParser):
    """Elements of a page, and what stands in its scripts and its title."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.title, self._open = [], [], [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._open = ""

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open == "title":
            self.title += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


def run_report(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def report_of(*arguments, out: Path) -> Page:
    result = run_report(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    return Page(out.read_text())


def test_figures_of_the_page_are_those_of_the_counts(tmp_path):
    (run,) = report_of(write_run(tmp_path / "r", lines_of_a_run()), out=tmp_path / "r.html").data["runs"]
    assert [frame["counts"] for frame in run["frames"]] == COUNTS
    for frame, counts in zip(run["frames"], COUNTS, strict=True):
        for layer, row in enumerate(counts):
            mean = sum(row) / len(row)
            assert frame["max_vio"][layer] == pytest.approx((max(row) - mean) / mean, rel=1e-5)
            shares = [n / sum(row) for n in row if n]
            entropy = -sum(p * math.log(p) for p in shares) / math.log(3)
            assert frame["entropy"][layer] == pytest.approx(entropy, rel=1e-5)
    assert run["curves"]["train/loss"] == [[10, 3.0], [20, 2.0], [30, 1.0]]
    assert (run["last_step"], run["setting"]["steps"], run["seconds"], run["finished"]) == (30, 40, 30.0, False)


def test_experts_without_a_token_and_since_when(tmp_path):
    data = run_data(read_run(write_run(tmp_path / "r", lines_of_a_run())))
    # expert 1 of layer 0 from the start; experts 0 and 2 of layer 1 in the last record only, though 2 was empty before
    assert data["dead"] == [
        {"layer": 0, "expert": 1, "since": 1},
        {"layer": 1, "expert": 0, "since": 21},
        {"layer": 1, "expert": 2, "since": 21},
    ]


def test_the_command_writes_into_the_run_and_says_so(tmp_path):
    run = write_run(tmp_path / "r", [*lines_of_a_run(), {"event": "end", "step": 30, "time": 131.0, "val/loss": 1.1}])
    result = run_report(run)
    assert (result.exit_code, f"{run}/report.html: 0.0" in result.output) == (0, True)
    assert Page((run / "report.html").read_text()).data["runs"][0]["finished"]
    assert list(run.glob("*.tmp")) == []


def test_two_runs_side_by_side(tmp_path):
    one = write_run(tmp_path / "one", lines_of_a_run())
    two = write_run(tmp_path / "two", lines_of_a_run()[:4])
    page = report_of(one, "--vs", two, out=tmp_path / "both.html")
    assert [run["name"] for run in page.data["runs"]] == ["one", "two"]
    assert [len(run["frames"]) for run in page.data["runs"]] == [3, 0]
    assert page.title == "one and two"


HOSTILE = "</script ><!--</script><script>alert(1)</script><img src=x onerror=alert(2)>&{{data}}"


def test_nothing_that_a_run_says_becomes_markup(tmp_path):
    name = "<script>alert(0)<!--{{script}}{{data}}"
    event = {"event": HOSTILE, "step": 3, "time": 1.0, HOSTILE: HOSTILE}
    run = write_run(tmp_path / name, [*lines_of_a_run(), {"step": 4, HOSTILE: 1.0}, event])
    page = report_of(run, out=tmp_path / "r.html")
    assert page.tags.count("script") == 2
    assert set(page.tags) == {"html", "head", "meta", "title", "style", "body", "main", "noscript", "script"}
    assert not [key for key, _ in page.attributes if key.startswith("on") or key in ("src", "href")]
    assert not set(page.scripts[0]) & set("<>&"), "what could end the script or open a comment"
    assert page.title == name
    (data,) = page.data["runs"]
    assert data["name"] == name
    assert data["events"][-1]["kind"] == HOSTILE or data["events"][0]["kind"] == HOSTILE
    assert data["curves"][HOSTILE] == [[4, 1.0]]


def test_the_page_asks_for_nothing(tmp_path):
    report_of(write_run(tmp_path / "r", lines_of_a_run()), out=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text().replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in text
    for word in ("http:", "https:", "@import", "url(", "innerHTML", "outerHTML", "insertAdjacent", "eval(", "fetch("):
        assert word not in text, word


def test_secrets_and_home_folders_stay_out(tmp_path):
    note = {
        "event": "note",
        "step": 1,
        "time": 1.0,
        "api_key": "PLANTED",
        "path": "/home/ann/x",
        "at": "https://a:PLANTED@h",
    }
    text = report_html([run_data(read_run(write_run(tmp_path / "r", [*lines_of_a_run(), note])))])
    assert "PLANTED" not in text
    assert "/home/ann" not in text
    assert "~/x" in text


# ---- what was looked at in single steps


def test_rows_of_ranks_are_over_the_mean_of_their_group(tmp_path):
    """Two EP groups of three ranks, the first of each for the shared expert: its rows are no part of the mean."""
    start, *rest = lines_of_a_run()[:5]
    start |= {"expert_groups": [[0, 1, 2], [3, 4, 5]], "shared_expert_ranks": 1}
    figures = {"received": [[90, 30, 10, 80, 5, 15], [9, 0, 0, 8, 4, 4]], "skew_ms": [1.5, "NaN"]}
    data = run_data(read_run(write_run(tmp_path / "r", [start, *rest, load_line(10, COUNTS[0]) | figures])))
    (frame,) = data["frames"]
    assert frame["rank_share"] == [[None, 1.5, 0.5, None, 0.5, 1.5], [None, 0.0, 0.0, None, 1.0, 1.0]]
    assert frame["skew_ms"] == [1.5, None]


@pytest.mark.parametrize("groups", [None, [[0, 7]], "x", [["a"]]])
def test_rows_of_ranks_without_their_groups_are_left_out(tmp_path, groups):
    start, *rest = lines_of_a_run()[:5]
    start |= {"expert_groups": groups, "shared_expert_ranks": 0}
    line = load_line(10, COUNTS[0]) | {"received": [[3, 3], [3, 3]]}
    data = run_data(read_run(write_run(tmp_path / "r", [start, *rest, line])))
    assert data["frames"][0]["rank_share"] is None


def test_experts_chosen_together_are_of_the_newest_record(tmp_path):
    old, new = [[[2, 2], [2, 2]]], [[[4, 1], [1, 2]]]
    lines = [{"event": "coactivation", "step": step, "pairs": pairs} for step, pairs in ((10, old), (20, new))]
    damaged = [{"event": "coactivation", "step": 30, "pairs": pairs} for pairs in ([[[1, 2]]], "x", None)]
    data = run_data(read_run(write_run(tmp_path / "r", [*lines_of_a_run(), *lines, *damaged])))
    assert data["coactivation"] == {"step": 20, "layers": [0], "thousandths": [[[1000, 250], [500, 1000]]]}
    assert data["num_damaged"] == 3


def test_saturation_is_that_of_the_files_beside(tmp_path):
    run = write_run(tmp_path / "r", lines_of_a_run())
    for step, ids in ((0, [[[0, 1], [2, 3]]]), (30, [[[1, 2], [3, 2]]])):
        RoutingFiles(run).save(step, np.array(ids))
    assert run_data(read_run(run))["saturation"] == [{"step": 0, "layers": [0.75]}, {"step": 30, "layers": [1.0]}]


# ---- what is wrong with a file


def test_damaged_lines_are_counted_and_said(tmp_path):
    ragged = load_line(40, [[1, 2, 3], [4, 5]])
    other_shape, negative, odd = (
        load_line(40, [[1, 2]]),
        load_line(40, [[1, 2, -3], [4, 5, 6]]),
        {**load_line(40, COUNTS[0]), "step": "x"},
    )
    damaged = ['{"step": 11, "train/lo', "[1, 2]", "\x00\x01", {"train/loss": 1.0}, ragged, other_shape, negative, odd]
    run = write_run(tmp_path / "r", [*lines_of_a_run(), *damaged], tail='{"step": 41, "train/loss": 2')
    result = run_report(run)
    assert "warning: r: 9 damaged lines of metrics.jsonl were left out" in result.output
    (data,) = Page((run / "report.html").read_text()).data["runs"]
    assert data["num_damaged"] == 9
    assert len(data["frames"]) == 3
    assert data["curves"]["train/loss"] == [[10, 3.0], [20, 2.0], [30, 1.0]]


def test_what_is_not_finite_is_left_out_of_the_curves(tmp_path):
    more = [{"step": 40, "train/loss": "NaN"}, {"step": 50, "train/loss": "Infinity"}, {"step": 60, "train/loss": 0.5}]
    data = run_data(read_run(write_run(tmp_path / "r", [*lines_of_a_run(), *more])))
    assert data["curves"]["train/loss"][-2:] == [[30, 1.0], [60, 0.5]]
    assert (data["num_damaged"], data["last_step"]) == (0, 60)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (None, "metrics.jsonl: cannot be read (No such file or directory): give the folder of a run"),
        ([], "metrics.jsonl: holds no metrics: nothing to report"),
        (["{", "x"], "metrics.jsonl: holds no metrics (2 damaged lines)"),
    ],
)
def test_a_folder_without_a_run(tmp_path, lines, complaint):
    folder = tmp_path / "r"
    if lines is not None:
        write_run(folder, lines)
    result = run_report(folder)
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert complaint in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize("option", ["--out", "--png"])
def test_a_place_that_cannot_be_written(tmp_path, option):
    run = write_run(tmp_path / "r", lines_of_a_run())
    (tmp_path / "file").write_text("")
    result = run_report(run, option, tmp_path / "file" / "x")
    assert result.exit_code == 2
    assert f"error: {option} ({tmp_path}/file/x): cannot be written (" in result.output
    assert "Traceback" not in result.output


# ---- long runs


def test_a_long_run_keeps_its_spikes_and_every_token(tmp_path):
    steps = range(1, 20_001)
    losses = {step: 2.0 + 1e-6 * step for step in steps} | {7777: 9.0, 15_000: 0.5}
    lines = [{"step": step, "train/loss": loss} for step, loss in losses.items()]
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 50, size=(500, 2, 3))
    loads = [load_line(10 * (n + 1), each.tolist()) for n, each in enumerate(counts)]
    data = run_data(read_run(write_run(tmp_path / "r", [*lines, *loads])))
    curve = data["curves"]["train/loss"]
    assert len(curve) <= 2 * MAX_POINTS
    assert [step for step, _ in curve] == sorted(step for step, _ in curve)
    assert [7777, 9.0] in curve
    assert [15_000, 0.5] in curve
    frames = data["frames"]
    assert MAX_FRAMES / 2 <= len(frames) <= MAX_FRAMES
    assert np.sum([frame["counts"] for frame in frames], axis=0).tolist() == counts.sum(axis=0).tolist()
    assert [frames[0]["first_step"], frames[-1]["step"]] == [1, 5000]
    starts, ends = [f["first_step"] for f in frames], [f["step"] for f in frames]
    assert starts[1:] == [end + 1 for end in ends[:-1]]


def test_lines_written_again_after_a_resume_count_once(tmp_path):
    again = [{"step": 20, "train/loss": 1.75}, load_line(20, COUNTS[0])]
    run = read_run(write_run(tmp_path / "r", [*lines_of_a_run(), *again]))
    assert run.curves["train/loss"] == [(10, 3.0), (20, 1.75), (30, 1.0)]
    assert [record.step for record in run.loads] == [10, 20]
    assert run.loads[1].counts_LE.tolist() == COUNTS[0]


def test_pictures_on_request(tmp_path):
    run = write_run(tmp_path / "a run", lines_of_a_run())
    result = run_report(run, "--out", tmp_path / "r.html", "--png", tmp_path / "png")
    assert result.exit_code == 0, result.output
    assert imread(tmp_path / "png" / "a_run.png").std() > 0.05, "an empty picture"
    assert "a_run.png" in result.output
