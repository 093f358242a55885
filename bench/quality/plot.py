"""The Pareto picture: accuracy against tokens kept, one panel per task."""

import io
from collections.abc import Sequence
from typing import Any

from bench.quality.cells import OFF
from bench.quality.report import Row

Point = tuple[float, float, float, float]

# distinct without colour vision too (Okabe and Ito); a method keeps its colour in every picture
_STYLES = {
    "random": ("#999999", "o"),
    "uniform": ("#0072B2", "s"),
    "transprune": ("#D55E00", "^"),
}
_SPARE = (("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"))
_LABELS = {
    "visual": "visual tokens kept, mean over layers",
    "kv": "KV tokens kept, mean over layers",
    "channels": "KV tokens kept, mean over layers",
}


def pareto(rows: Sequence[Row], axis: str) -> dict[str, dict[str, list[Point]]]:
    """Return `(kept, accuracy, low, high)` per task and method, ascending by what is kept.

    Each method's line ends at the unpruned model, its limit as the ratio goes to 1. A task that
    has nothing but the unpruned row is left out.
    """
    panels: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        if row.axis == axis:
            point = (row.kept, row.accuracy, *row.interval)
            panels.setdefault(row.task, {}).setdefault(row.method, []).append(point)
    return {
        task: {
            method: sorted(points if method == OFF else points + lines.get(OFF, []))
            for method, points in lines.items()
        }
        for task, lines in panels.items()
        if lines.keys() - {OFF}
    }


def draw(panels: dict[str, dict[str, list[Point]]], axis: str) -> dict[str, bytes]:
    """Return the picture as PNG and SVG, by ending."""
    import matplotlib as mpl

    # no display is needed, and equal data gives equal bytes
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "tokenprune"
    from matplotlib import pyplot as plt

    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(max(2.6 * columns, 4.5), 2.4 * lines + 0.7),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, (task, methods) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(panel, task, methods)
    for panel in list(grid.flat)[len(panels) :]:
        panel.set_axis_off()
    most = max(
        kept for methods in panels.values() for line in methods.values() for kept, *_ in line
    )
    # the axes are shared, and a little room shows the markers at the edges whole
    grid[0][0].set(xlim=(0, 1.05 * most), ylim=(-3, 103))
    figure.supxlabel(_LABELS[axis], fontsize=9)
    figure.supylabel("right answers, % (bars: 95 %)", fontsize=9)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    files = {}
    for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending, dpi=150, metadata=metadata)
        files[ending] = buffer.getvalue()
    plt.close(figure)
    return files


def _draw_panel(panel: Any, task: str, methods: dict[str, list[Point]]) -> None:
    spare = iter(_SPARE)
    for method, points in methods.items():
        kept, middle, low, high = (list(values) for values in zip(*points, strict=True))
        if method == OFF:
            panel.axhline(100 * middle[0], color="black", linewidth=0.8, linestyle=":", label=OFF)
            continue
        colour, marker = _STYLES.get(method) or next(spare, ("#000000", "."))
        below = [100 * (m - x) for m, x in zip(middle, low, strict=True)]
        above = [100 * (x - m) for m, x in zip(middle, high, strict=True)]
        panel.errorbar(
            kept,
            [100 * m for m in middle],
            yerr=(below, above),
            color=colour,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=method,
        )
    panel.set_title(task, fontsize=9)
    panel.grid(alpha=0.25, linewidth=0.5)
    panel.tick_params(labelsize=8)
