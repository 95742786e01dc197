"""load.png: what is drawn is the data, read back from the figure and from the pixels of the file."""

import numpy as np
import pytest
from matplotlib.image import imread

from moe_train.diagnostics.load import LoadHistory, layer_figures
from moe_train.diagnostics.picture import load_figure, load_picture

LOSSES = [(1, 5.5), (2, 4.0), (3, 3.0)]
VAL = [(0, 5.6), (3, 3.1)]
BASELINES = {"unigram": 3.4, "untrained": 5.6}


def history_of(*counts):
    history = LoadHistory()
    for step, counts_LE in enumerate(counts, start=1):
        history.add(10 * step, np.asarray(counts_LE, dtype=np.int64))
    return history


def heat_map(figure):
    return figure.axes[0].images[0]


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines() if len(line.get_xydata())}


def test_heat_map_holds_the_share_relative_to_the_mean_of_its_layer():
    figure = load_figure(history_of([[1, 2], [5, 5]], [[2, 3], [0, 30]]), LOSSES, VAL, "t", BASELINES)
    image = heat_map(figure)
    # totals [[3, 5], [5, 35]], means 4 and 20
    assert np.asarray(image.get_array()) == pytest.approx(np.array([[0.75, 1.25], [0.25, 1.75]]))
    assert (image.norm.vmin, image.norm(1.0), image.norm.vmax) == (0.0, 0.5, 2.0)
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0.25", "0.75", "1.25", "1.75"]


def test_max_vio_lines_are_those_of_the_snapshots():
    first, second = np.array([[1, 2], [5, 5]]), np.array([[2, 6], [0, 30]])
    axes = panel(load_figure(history_of(first, second), LOSSES, VAL, "t", BASELINES), "Load balance")
    drawn = [line.get_xydata() for line in axes.get_lines() if len(line.get_xydata())]
    vio = np.stack([layer_figures(first).max_vio_L, layer_figures(second).max_vio_L])
    expected = [vio[:, 0], vio[:, 1], vio.mean(axis=1)]
    assert len(drawn) == 3
    for data, values in zip(drawn, expected, strict=True):
        assert data == pytest.approx(np.column_stack([[10, 20], values]))


def test_loss_curves_and_baselines():
    losses = [*LOSSES, (4, float("nan")), (5, float("inf"))]
    figure = load_figure(history_of([[1, 2]]), losses, VAL, "t", {**BASELINES, "none": float("nan")})
    axes = panel(figure, "Loss")
    drawn = lines(axes)
    assert drawn["train"] == pytest.approx(np.array(LOSSES, dtype=float))
    assert drawn["validation (last 3.100)"] == pytest.approx(np.array(VAL))
    assert drawn["_unigram"][:, 1].tolist() == [3.4, 3.4]
    styles = {line.get_label(): line.get_linestyle() for line in axes.get_lines()}
    assert (styles["_unigram"], styles["_untrained"], styles["train"]) == ("--", "--", "-")
    assert {text.get_text() for text in axes.texts} == {"unigram 3.400", "untrained 5.600"}


def test_long_curves_are_smoothed_without_a_shift():
    ramp = [(step, float(step)) for step in range(1000)]
    axes = panel(load_figure(history_of([[1, 2]]), ramp, [], "t", {}), "Loss")
    smooth = lines(axes)["train (mean of 16 points)"]
    # the mean of a ramp over a centred window of even width lies half a step beside it
    assert smooth[100:900, 1] == pytest.approx(np.arange(100, 900) - 0.5)


def test_the_file_shows_the_data(tmp_path):
    """Overloaded cells are red, idle ones blue, at the place of their layer and expert."""
    counts = np.full((4, 8), 100)
    counts[1, 2], counts[1, 5] = 195, 5  # the layer's mean stays 100
    path = tmp_path / "load.png"
    load_picture(history_of(counts), LOSSES, VAL, path, "run $1_a", BASELINES)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["load.png"]

    pixels = imread(path)
    figure = load_figure(history_of(counts), LOSSES, VAL, "run $1_a", BASELINES)
    figure.set_dpi(140)
    figure.canvas.draw()
    transform = figure.axes[0].transData

    def colour(layer, expert):
        x, y = transform.transform((expert - 0.35, layer - 0.3))  # beside the number in the cell's middle
        return pixels[len(pixels) - 1 - int(y), int(x), :3]

    red, _, blue = colour(1, 2)
    assert red > blue + 0.3
    red, _, blue = colour(1, 5)
    assert blue > red + 0.3
    assert np.ptp(colour(3, 7)) < 0.02, "an even cell is grey"


def test_a_large_model_marks_dead_experts_instead_of_writing_numbers():
    counts = np.full((48, 128), 10)
    counts[3, 7] = counts[40, 90] = 0
    counts[5, 1] = 2000
    axes = load_figure(history_of(counts), LOSSES, VAL, "t", BASELINES).axes[0]
    assert not axes.texts
    assert sorted(axes.collections[0].get_offsets().tolist()) == [[7.0, 3.0], [90.0, 40.0]]
    assert heat_map(axes.figure).norm.vmax == 4.0, "one extreme expert must not wash out the others"
    assert "2 dead experts (×)" in axes.get_title(loc="left")


def test_nothing_recorded_says_so(tmp_path):
    figure = load_figure(LoadHistory(), [], [], "t", {})
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["no expert load was recorded", "no expert load was recorded", "no loss was recorded"]
    load_picture(LoadHistory(), [], [], tmp_path / "empty.png", "t", {})
    assert imread(tmp_path / "empty.png").shape[2] == 4
