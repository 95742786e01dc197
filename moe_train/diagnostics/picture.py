"""load.png: where the tokens went, how balanced that was over time, and what the loss did meanwhile.

Shape legend: L MoE layers, E logical experts, S snapshots of the history.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_train.diagnostics.load import LoadHistory, layer_figures

Curve = Sequence[tuple[int, float]]

MAX_ANNOTATED = 160
"""Cells that still get their number written in."""
MAX_NAMED_LAYERS = 8
"""Layers that still get a line of their own colour and a legend entry."""
INK = "#333333"
GRID = "#e6e6e6"


def load_picture(
    history: LoadHistory,
    losses: Curve,
    val_losses: Curve,
    path: Path,
    title: str,
    baselines: Mapping[str, float],
) -> None:
    """Write the figure as a PNG, under its name only when it is whole. Arguments as for `load_figure`."""
    figure = load_figure(history, losses, val_losses, title, baselines)
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png", dpi=140, facecolor="white")
    os.replace(temporary, path)


def load_figure(
    history: LoadHistory, losses: Curve, val_losses: Curve, title: str, baselines: Mapping[str, float]
) -> Figure:
    """Heat map of load over the whole run, MaxVio over steps, loss over steps with `baselines` as dashed lines.

    Curves are (step, loss in nats per token); points that are not finite are left out. Anything may be empty.
    """
    num_layers = history.totals_LE.shape[0]
    heat_height = min(max(1.8, 0.42 * num_layers if num_layers <= 12 else 0.13 * num_layers), 8.0)
    figure = Figure(figsize=(13, heat_height + 5.6), layout="constrained")
    FigureCanvasAgg(figure)  # attaches itself; pyplot's global state is never touched
    figure.suptitle(title, fontsize=14, fontweight="bold", color=INK, parse_math=False)
    top, bottom = figure.add_gridspec(2, 1, height_ratios=[heat_height + 0.7, 3.6], hspace=0.06)
    _draw_heat_map(figure, figure.add_subplot(top), history.totals_LE)
    lower = bottom.subgridspec(1, 2, wspace=0.04)
    _draw_max_vio(figure, figure.add_subplot(lower[0]), history)
    _draw_losses(figure.add_subplot(lower[1]), losses, val_losses, baselines)
    return figure


def load_pixels(counts_LE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The heat map without axes, uint8 [height, width, 3], and what it shows: shares relative to the mean [L, E]."""
    mean_L1 = counts_LE.mean(axis=1, keepdims=True)
    relative_LE = np.where(mean_L1 > 0, counts_LE / np.where(mean_L1 > 0, mean_L1, 1), 0.0)
    colours = colormaps["RdBu_r"](TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=4.0)(relative_LE))
    pixels = (colours[..., :3] * 255).round().astype(np.uint8)
    enlarged = max(1, min(16, 1024 // max(counts_LE.shape)))
    return pixels.repeat(enlarged, axis=0).repeat(enlarged, axis=1), relative_LE


def _draw_heat_map(figure: Figure, axes: Axes, totals_LE: np.ndarray) -> None:
    num_layers, num_experts = totals_LE.shape
    if not totals_LE.size:
        _say_empty(axes, "no expert load was recorded")
        return
    figures = layer_figures(totals_LE)
    mean_L = np.maximum(figures.tokens_L / num_experts, 1e-12)
    relative_LE = totals_LE / mean_L[:, None]
    # at least 0 to 2, so that a balanced run looks balanced; an extreme expert must not wash out all others
    highest = min(max(2.0, float(relative_LE.max())), 4.0)
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=highest)
    image = axes.imshow(relative_LE, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    if relative_LE.size <= MAX_ANNOTATED:
        for (layer, expert), value in np.ndenumerate(relative_LE):
            strong = value < 0.3 or value > 1 + 0.65 * (highest - 1)
            axes.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=9, color="w" if strong else INK)
    dead_layers, dead_experts = np.nonzero((totals_LE == 0) & (figures.tokens_L > 0)[:, None])
    if len(dead_layers) and relative_LE.size > MAX_ANNOTATED:
        axes.scatter(dead_experts, dead_layers, marker="x", s=14, linewidths=0.9, color="white")
    marked = " (×)" if relative_LE.size > MAX_ANNOTATED else ""
    dead = f"{len(dead_layers)} dead experts{marked}" if len(dead_layers) else "no dead expert"
    axes.set_title(
        f"Tokens per expert, relative to the layer's mean, whole run   "
        f"(worst layer: MaxVio {figures.max_vio_L.max():.2f}; {dead})",
        fontsize=11, loc="left", color=INK,
    )  # fmt: skip
    axes.set_xlabel("expert")
    axes.set_ylabel("MoE layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(num_experts, 16), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=min(num_layers, 12), integer=True))
    # a thin white lattice separates cells while there are few
    if relative_LE.size <= 4 * MAX_ANNOTATED:
        axes.set_xticks(np.arange(0.5, num_experts - 1), minor=True)
        axes.set_yticks(np.arange(0.5, num_layers - 1), minor=True)
        axes.grid(which="minor", color="white", linewidth=1.2)
        axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    extend = "max" if relative_LE.max() > highest else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=18, fraction=0.03, extend=extend)
    bar.set_ticks([0.0, 0.5, 1.0, *np.linspace(1.0, highest, 3)[1:]])
    bar.ax.set_yticklabels([f"{tick:.1f}×" for tick in bar.get_ticks()])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - stubs take the spine for a function


def _draw_max_vio(figure: Figure, axes: Axes, history: LoadHistory) -> None:
    _style(axes, "Load balance: MaxVio per layer (0 = even)", "MaxVio = max / mean − 1")
    steps_S, max_vio_SL = history.steps_S, history.max_vio_SL()
    if not max_vio_SL.size:
        _say_empty(axes, "no expert load was recorded")
        return
    num_layers = max_vio_SL.shape[1]
    marker = "o" if len(steps_S) == 1 else None
    palette = colormaps["viridis"]
    named = num_layers <= MAX_NAMED_LAYERS
    for layer in range(num_layers):
        colour = palette(0.92 * layer / max(num_layers - 1, 1))
        label = f"layer {layer}" if named or layer in (0, num_layers - 1) else None
        width, alpha = (1.3, 0.85) if named else (0.7, 0.4)
        line = axes.plot(steps_S, max_vio_SL[:, layer], color=colour, linewidth=width, alpha=alpha, marker=marker)[0]
        if label:
            # the legend shows the colour at full strength
            axes.plot([], [], color=line.get_color(), linewidth=2, label=label)
    if num_layers > 1:
        axes.plot(steps_S, max_vio_SL.mean(axis=1), color=INK, linewidth=2, linestyle=(0, (4, 2)),
                  marker=marker, label="mean of layers")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, ncols=2 if num_layers > 3 else 1, loc="upper right")


def _draw_losses(axes: Axes, losses: Curve, val_losses: Curve, baselines: Mapping[str, float]) -> None:
    _style(axes, "Loss", "nats per token")
    losses, val_losses = _finite(losses), _finite(val_losses)
    if not losses and not val_losses:
        _say_empty(axes, "no loss was recorded")
        return
    if losses:
        steps, values = np.array(losses).T
        smooth = len(values) > 200
        axes.plot(steps, values, color="#4c78a8", linewidth=1.2, alpha=0.35 if smooth else 1.0,
                  label=None if smooth else "train", marker="o" if len(steps) == 1 else None)  # fmt: skip
        if smooth:
            window = max(5, len(values) // 60)
            axes.plot(steps, _moving_mean(values, window), color="#4c78a8", linewidth=1.8,
                      label=f"train (mean of {window} points)")  # fmt: skip
    if val_losses:
        steps, values = np.array(val_losses).T
        axes.plot(steps, values, color="#e45756", linewidth=1.6, marker="o", markersize=4,
                  label=f"validation (last {values[-1]:.3f})")  # fmt: skip
    for (name, value), colour in zip(baselines.items(), _greys(len(baselines)), strict=True):
        if math.isfinite(value):
            axes.axhline(value, color=colour, linestyle="--", linewidth=1.2, label=f"_{name}")
            axes.annotate(f"{name} {value:.3f}", (1, value), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                          textcoords="offset points", ha="right", va="bottom", fontsize=9, color=INK)  # fmt: skip
    # one row of legend in head-room of its own, so that it lies on no line
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.17 * (high - low))
    axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper right")


def _style(axes: Axes, title: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.set_xlabel("step")
    axes.set_ylabel(ylabel)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _say_empty(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#888888")
    axes.set_xticks([])
    axes.set_yticks([])


def _finite(curve: Curve) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the `window` values around each; near the ends of those that exist (a trailing mean would lag)."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    starts = np.maximum(index - window // 2, 0)
    ends = np.minimum(index - window // 2 + window, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _greys(count: int) -> list[str]:
    return [str(level) for level in np.linspace(0.25, 0.6, max(count, 1))[:count]]
