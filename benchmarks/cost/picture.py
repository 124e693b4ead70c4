"""The picture of the scaling runs: time and memory of every method along each axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .methods import METHODS

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = {"products": "#6E6E6E", "full": "#222222", "lora": "#009E73", "autograd": "#D55E00", "ours": "#0072B2"}
TITLES = {
    "width": "width of the layers",
    "batch": "sequences a step",
    "layers": "layers",
    "accumulate": "micro-batches a step",
    "mask_interval": "steps a selection",
}
ROWS = (("step_over_full", "step time over full fine-tuning"), ("memory_over_lora", "memory over LoRA"))


def draw_scaling(axes: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, subtitle: str) -> None:
    """Write a PNG with one column an axis: results of `measure` in the order of the axis's values."""
    figure = Figure(figsize=(3.1 * len(axes), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"What a training step costs\n{subtitle}", fontsize=11, x=0.01, ha="left")
    panels = figure.subplots(len(ROWS), len(axes), squeeze=False)
    for row, (field, label) in zip(panels, ROWS, strict=True):
        for panel, (axis, results) in zip(row, axes.items(), strict=True):
            _draw_panel(panel, axis, results, field)
        row[0].set_ylabel(label)
    handles = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    order = [name for name in METHODS.values() if name in handles]
    figure.legend([handles[name] for name in order], order, loc="outside lower left", ncols=3, frameon=False)
    figure.savefig(path, dpi=160)


def _draw_panel(panel: Axes, axis: str, results: Sequence[Mapping[str, Any]], field: str) -> None:
    for method, label in METHODS.items():
        points = [
            (result["settings"][axis], row[field])
            for result in results
            for row in result["rows"]
            if row["method"] == method and row[field] is not None
        ]
        if points:
            panel.plot(*zip(*points, strict=True), color=COLORS[method], marker="o", markersize=4, label=label)
    values = [result["settings"][axis] for result in results]
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [str(value) for value in values])
    if not panel.get_lines():
        panel.set_axis_off()  # memory is not measured along this axis
        return
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter("{x:g}")
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 0.5), max(high, 2))
    panel.set_xlabel(TITLES[axis])
    panel.minorticks_off()
    panel.grid(axis="y", color="#E9ECEF")
    panel.spines[["top", "right"]].set_visible(False)
