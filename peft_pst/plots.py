"""Pictures: sparsity by layer, kept weights of one layer, a training run, latencies. Needs matplotlib (extra `cli`).

Every function draws one PNG through Agg, without a display and without matplotlib's global state. Colours are Okabe
and Ito's, which stay apart for colour-blind readers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .report import LayerSparsity, SparsityReport
from .tables import by_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, TRACK = "#222222", "#6E6E6E", "#E9ECEF"
_LINE_COLORS = (BLUE, VERMILLION, GREEN, INK)

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#B0B0B0",
    "axes.labelcolor": GREY,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.unicode_minus": False,
    "xtick.color": "#B0B0B0",
    "ytick.color": "#B0B0B0",
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "savefig.facecolor": "white",
}
_WIDTH = 8.0  # inches
_DPI = 160
_MOST_NAMED_LAYERS = 24
_MOST_KINDS = 14
_MOST_CELLS = 384  # on a side of the mask picture; larger matrices are shown as the share kept in small tiles


def plot_layer_sparsity(report: SparsityReport, path: str | Path) -> Path:
    """Draw the sparsity of every layer against its target.

    Up to 24 layers get a bar and a name each; larger models get one strip per kind of layer, over the blocks.

    Args:
        report: of a model or a checkpoint, with at least one layer.
        path: PNG file to write.

    Raises:
        ValueError: if the report has no layers.
        ImportError: if matplotlib is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> layer = LayerSparsity("layers.0.up", (4, 8), zeros=24, promised=24, target_sparsity=0.75)
        >>> with TemporaryDirectory() as folder:
        ...     plot_layer_sparsity(SparsityReport("tiny", (layer,)), f"{folder}/layers.png").name
        'layers.png'
    """
    if not report.layers:
        raise ValueError(f"The report on {report.source} has no layers, so there is nothing to draw.")
    kinds = by_kind(report.layers)
    with _styled():
        if len(report.layers) <= _MOST_NAMED_LAYERS:
            figure = _draw_named_bars(report.layers)
        else:
            figure = _draw_strips(kinds if len(kinds) <= _MOST_KINDS else [("all layers", list(report.layers))])
        _add_title(figure, "Sparsity by layer", _summary(report))
        return _write(figure, path)


def plot_kept_weights(mask: Tensor, path: str | Path, *, title: str = "Kept weights") -> Path:
    """Draw which weights of one layer are kept, with the kept share of each row and column beside it.

    Args:
        mask: boolean, (out, in), True = keep. Above 384 rows or columns the picture shows the share that is kept in
            tiles.
        path: PNG file to write.
        title: such as the name of the layer.

    Raises:
        ValueError: if `mask` is not a matrix with at least one entry.
        ImportError: if matplotlib is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     plot_kept_weights(torch.eye(8, dtype=torch.bool), f"{folder}/eye.png").name
        'eye.png'
    """
    if mask.ndim != 2 or not mask.numel():
        raise ValueError(f"mask has the shape {tuple(mask.shape)}; pass a matrix (out_features, in_features).")
    kept = mask.detach().to("cpu", torch.float32)
    with _styled():
        figure = _draw_kept(kept)
        kept_share = (
            f"{int(mask.sum()):,} of {mask.numel():,} weights kept ({100 * float(kept.mean()):.1f} %), drawn dark"
        )
        _add_title(figure, title, kept_share)
        return _write(figure, path)


def plot_training(log_history: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Draw the loss, the evaluation metrics and the sparsity of a training run over its steps.

    Args:
        log_history: the Trainer's (`trainer.state.log_history`, or that list in `trainer_state.json`); with
            `PSTCallback` its entries have a "sparsity".
        path: PNG file to write.

    Raises:
        ValueError: if no entry has a loss, a metric or a sparsity.
        ImportError: if matplotlib is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> history = [{"step": step, "loss": 1 / step, "sparsity": 0.1 * step} for step in (1, 2, 3)]
        >>> with TemporaryDirectory() as folder:
        ...     plot_training(history, f"{folder}/training.png").name
        'training.png'
    """
    panels = [panel for panel in _training_panels(log_history) if any(series for series in panel[1].values())]
    if not panels:
        raise ValueError("log_history has neither loss nor sparsity; pass trainer.state.log_history after training.")
    with _styled():
        figure = _draw_training(panels)
        steps = max(int(entry.get("step", 0)) for entry in log_history)
        _add_title(figure, "Training", f"{steps:,} optimizer steps")
        return _write(figure, path)


def plot_latency(
    panels: Mapping[str, Sequence[tuple[str, float, bool]]], path: str | Path, *, subtitle: str = ""
) -> Path:
    """Draw how long each form of a model takes, with the best dense one as a line through the others.

    Args:
        panels: by title, (name, milliseconds, whether the form is dense) from top to bottom, with at least one dense.
        path: PNG file to write.
        subtitle: such as the machine.

    Raises:
        ValueError: if there are no panels, or one has no dense form.
        ImportError: if matplotlib is missing.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     plot_latency({"1 token": [("dense", 2.0, True), ("sparse", 1.0, False)]}, f"{folder}/bench.png").name
        'bench.png'
    """
    if not panels or not all(any(is_dense for _, _, is_dense in bars) for bars in panels.values()):
        raise ValueError("Every panel needs a dense form, which the others are compared with.")
    with _styled():
        figure = _draw_latency(panels)
        _add_title(figure, "Latency, and the best dense choice as a line", subtitle)
        return _write(figure, path)


# Frame


@contextmanager
def _styled() -> Iterator[None]:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ImportError("Pictures need the package matplotlib; run: pip install 'peft-pst[cli]'") from error
    with matplotlib.rc_context(_STYLE):
        yield


def _new_figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), dpi=_DPI)


def _add_title(figure: Figure, title: str, subtitle: str) -> None:
    """Two lines at the top left; every drawing leaves 0.75 inches for them."""
    height = figure.get_figheight()
    figure.text(0.2 / _WIDTH, 1 - 0.18 / height, title, fontsize=13, fontweight="bold", va="top")
    figure.text(0.2 / _WIDTH, 1 - 0.44 / height, subtitle, fontsize=9.5, color=GREY, va="top")


def _write(figure: Figure, path: str | Path) -> Path:
    """Save as PNG of 256 colours, a third of the size; an interrupted write leaves the old file whole."""
    from PIL import Image  # matplotlib needs it too

    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    # Of Pillow's palettes the one whose colours are never far off: rare ones stay as they are, and edges crisp.
    palette = Image.Quantize.MAXCOVERAGE
    try:
        with Image.open(drawn) as image:
            few = image.convert("RGB").quantize(256, palette, dither=Image.Dither.NONE)
            few.save(beside, format="png", optimize=True, dpi=(_DPI, _DPI))
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the lower left corner."""
    total = figure.get_figheight()
    return figure.add_axes((left / _WIDTH, bottom / total, width / _WIDTH, height / total))


# Sparsity by layer


def _summary(report: SparsityReport) -> str:
    text = f"{100 * report.sparsity:.2f} % of {report.weights:,} weights in {len(report.layers)} matrices are zero"
    missed = len(report.misses_target)
    if report.target_sparsity is None:
        return text
    return f"{text}; {missed} below target" if missed else f"{text}; all at target"


def _colors(layers: Sequence[LayerSparsity]) -> list[str]:
    return [VERMILLION if layer.misses_target or layer.lost_zeros else BLUE for layer in layers]


def _add_key(figure: Figure, layers: Sequence[LayerSparsity], left: float, bottom: float) -> None:
    """Name the colours that occur, below the drawing."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = _colors(layers)
    entries: list[Any] = [Patch(color=BLUE, label="zeros")] if BLUE in used else []
    entries += [Patch(color=VERMILLION, label="zeros, below target")] if VERMILLION in used else []
    if any(layer.target_sparsity is not None for layer in layers):
        entries.append(Line2D([], [], color=INK, linewidth=1.6, label="target"))
    figure.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=(left / _WIDTH, bottom / figure.get_figheight()),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        handlelength=1.1,
        columnspacing=1.6,
        borderpad=0,
        borderaxespad=0,
        labelcolor=GREY,
    )


def _draw_named_bars(layers: Sequence[LayerSparsity]) -> Figure:
    names = [layer.name for layer in layers]
    row, label = 0.27, min(0.078 * max(map(len, names)) + 0.35, 4.2)
    height = 0.85 + row * len(layers) + 0.55
    figure = _new_figure(height)
    axes = _place(figure, label, 0.55, _WIDTH - label - 0.85, row * len(layers))
    y = range(len(layers))
    axes.barh(y, [100.0] * len(layers), height=0.62, color=TRACK)
    axes.barh(y, [100 * layer.sparsity for layer in layers], height=0.62, color=_colors(layers))
    for index, layer in enumerate(layers):
        if layer.target_sparsity is not None:
            axes.plot([100 * layer.target_sparsity] * 2, [index - 0.42, index + 0.42], color=INK, linewidth=1.6)
        axes.text(101.5, index, f"{100 * layer.sparsity:.1f} %", va="center_baseline", fontsize=9, color=GREY)
    axes.set(xlim=(0, 100), ylim=(len(layers) - 0.5, -0.5), yticks=list(y))
    axes.set_yticklabels([_shorten(name) for name in names], color=INK)
    axes.tick_params(left=False, bottom=False)
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    _add_key(figure, layers, label, 0.22)
    return figure


def _shorten(name: str, longest: int = 52) -> str:
    return name if len(name) <= longest else "…" + name[-longest + 1 :]


def _draw_strips(kinds: Sequence[tuple[str, list[LayerSparsity]]]) -> Figure:
    """One row of upright bars per kind; the x axis counts the blocks."""
    from matplotlib.ticker import MaxNLocator

    label = min(0.078 * max(len(kind) for kind, _ in kinds) + 0.35, 4.2)
    row = 0.52 if len(kinds) > 1 else 2.2
    gap = 0.14
    height = 0.85 + (row + gap) * len(kinds) + 0.75
    figure = _new_figure(height)
    blocks, axis_label = _block_numbers(kinds)
    first, last = min(map(min, blocks)), max(map(max, blocks))
    width = 0.8 if last - first < 120 else 1.0
    for index, (kind, layers) in enumerate(kinds):
        bottom = height - 0.85 - (row + gap) * (index + 1) + gap
        axes = _place(figure, label, bottom, _WIDTH - label - 0.85, row)
        x = blocks[index]
        axes.bar(x, [100.0] * len(layers), width=width, color=TRACK)
        axes.bar(x, [100 * layer.sparsity for layer in layers], width=width, color=_colors(layers))
        targets = {
            at: row.target_sparsity for at, row in zip(x, layers, strict=True) if row.target_sparsity is not None
        }
        heights = [100 * target for target in targets.values()]
        axes.hlines(heights, [at - 0.5 for at in targets], [at + 0.5 for at in targets], color=INK, linewidth=1.2)
        axes.set(xlim=(first - 0.6, last + 0.6), ylim=(0, 100), yticks=[])
        axes.spines[:].set_visible(False)
        axes.tick_params(bottom=False, labelbottom=index == len(kinds) - 1)
        axes.text(-0.012, 0.5, _shorten(kind), transform=axes.transAxes, ha="right", va="center", fontsize=9)
        mean = 100 * sum(layer.zeros for layer in layers) / sum(layer.weights for layer in layers)
        axes.text(1.01, 0.5, f"{mean:.1f} %", transform=axes.transAxes, va="center_baseline", fontsize=9, color=GREY)
        if index == len(kinds) - 1:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlabel(axis_label, fontsize=9)
    _add_key(figure, [layer for _, layers in kinds for layer in layers], label, 0.14)
    return figure


def _block_numbers(kinds: Sequence[tuple[str, list[LayerSparsity]]]) -> tuple[list[list[int]], str]:
    """Where each layer stands on the x axis: at the number of its block, where that tells the layers apart."""
    numbers = [[_first_number(layer.name) for layer in layers] for _, layers in kinds]
    if all(len(set(row)) == len(row) and min(row) >= 0 for row in numbers):
        return numbers, "block"
    return [list(range(len(layers))) for _, layers in kinds], "layer, in the order of the model"


def _first_number(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


# Kept weights


def _draw_kept(kept: Tensor) -> Figure:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import StrMethodFormatter

    rows, columns = kept.shape
    tile = (-(-rows // _MOST_CELLS), -(-columns // _MOST_CELLS))
    shares = _tile_means(kept, tile)
    # Stretched where it must be, so that a 1 x 4,096 matrix is more than a hairline.
    left, bottom, width, marginal = 0.85, 0.95 if max(tile) > 1 else 0.6, 5.9, 0.75
    height = width * min(max(rows / columns, 0.4), 1.1)
    figure = _new_figure(0.75 + marginal + 0.1 + height + bottom)
    image = _place(figure, left, bottom, width, height)
    ramp = LinearSegmentedColormap.from_list("kept", ["#FFFFFF", "#9CC7E4", BLUE, "#00304D"])
    # A few tiles may be darker than the scale, so that they do not make all others pale.
    highest = max(float(shares.flatten().quantile(0.998)), 1e-12) if max(tile) > 1 else 1.0
    drawn = image.imshow(shares.numpy(), cmap=ramp, vmin=0, vmax=highest, aspect="auto", extent=(0, columns, rows, 0))
    image.spines[:].set(visible=True)
    image.set_xlabel("input feature", fontsize=9)
    image.set_ylabel("output feature", fontsize=9)
    for axis in (image.xaxis, image.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    above = _place(figure, left, bottom + height + 0.1, width, marginal)
    beside = _place(figure, left + width + 0.1, bottom, marginal, height)
    _draw_marginal(above, _tile_means(kept.mean(0, keepdim=True), (1, tile[1]))[0], kept, upright=True)
    _draw_marginal(beside, _tile_means(kept.mean(1, keepdim=True), (tile[0], 1))[:, 0], kept, upright=False)
    if max(tile) > 1:
        extend = "max" if highest < float(shares.max()) else "neither"
        scale = figure.colorbar(
            drawn,
            cax=_place(figure, left, 0.32, 1.5, 0.09),
            orientation="horizontal",
            ticks=[0, highest / 2, highest],
            extend=extend,
        )
        scale.outline.set(visible=False)
        scale.ax.tick_params(length=0)
        scale.ax.xaxis.set_major_formatter(StrMethodFormatter("{x:.0%}"))
        scale.ax.text(1.08, 0.5, f"kept, in tiles of {tile[0]} x {tile[1]} weights", transform=scale.ax.transAxes)
        scale.ax.texts[0].set(va="center_baseline", fontsize=9, color=GREY)
    return figure


def _tile_means(kept: Tensor, tile: tuple[int, int]) -> Tensor:
    """Mean of each tile; at the edges, of what there is of it."""
    return F.avg_pool2d(kept[None], tile, ceil_mode=True, count_include_pad=False)[0]


def _draw_marginal(axes: Axes, share: Tensor, kept: Tensor, *, upright: bool) -> None:
    """The kept share along one side, in percent, with its mean as a line."""
    from matplotlib.ticker import MaxNLocator

    features = kept.shape[1 if upright else 0]
    values = (100 * share).tolist()
    step = -(-features // len(values))
    edges = [min(index * step, features) for index in range(len(values) + 1)]
    axes.stairs(values, edges, fill=True, color=BLUE, orientation="vertical" if upright else "horizontal")
    mean, highest = 100 * float(kept.mean()), max(max(values), 1e-9)
    locator = MaxNLocator(nbins=2, prune="lower")
    if upright:
        axes.axhline(mean, color=VERMILLION, linewidth=1.2)
        axes.set(xlim=(0, features), ylim=(0, highest * 1.05), xticks=[])
        axes.yaxis.set_major_locator(locator)
        axes.set_ylabel("kept, %", fontsize=9)
        axes.annotate("mean", (features, mean), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
        axes.texts[0].set_color(VERMILLION)
    else:
        axes.axvline(mean, color=VERMILLION, linewidth=1.2)
        axes.set(ylim=(features, 0), xlim=(0, highest * 1.05), yticks=[])
        axes.xaxis.set_major_locator(locator)
        axes.set_xlabel("kept, %", fontsize=9)


# Training

Series = dict[str, list[tuple[int, float]]]

_NOT_METRICS = ("eval_loss", "_runtime", "_per_second", "_preparation_time")


def _training_panels(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[str, Series]]:
    """(title, series by name): loss, metrics, sparsity."""

    def series(key: str) -> list[tuple[int, float]]:
        return [(int(entry["step"]), float(entry[key])) for entry in log_history if key in entry and "step" in entry]

    metrics = sorted(
        key
        for entry in log_history
        for key, value in entry.items()
        if key.startswith("eval_") and not key.endswith(_NOT_METRICS) and isinstance(value, (int, float))
    )
    return [
        ("loss", {"training": series("loss"), "evaluation": series("eval_loss")}),
        (
            "evaluation",
            {key.removeprefix("eval_"): series(key) for key in list(dict.fromkeys(metrics))[: len(_LINE_COLORS)]},
        ),
        ("sparsity, %", {"": [(step, 100 * value) for step, value in sorted(set(series("sparsity")))]}),
    ]


def _draw_training(panels: Sequence[tuple[str, Series]]) -> Figure:
    panel, gap = 1.55, 0.38
    height = 0.95 + (panel + gap) * len(panels) + 0.35
    figure = _new_figure(height)
    last_step = max(step for _, panel_series in panels for points in panel_series.values() for step, _ in points)
    for index, (title, all_series) in enumerate(panels):
        axes = _place(figure, 0.75, height - 0.95 - (panel + gap) * (index + 1) + gap, _WIDTH - 2.1, panel)
        axes.set_title(title, color=INK)
        axes.set_xlim(0, last_step)
        axes.grid(axis="y", color=TRACK, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelbottom=index == len(panels) - 1)
        is_sparsity = title.startswith("sparsity")
        named = {name: points for name, points in all_series.items() if points}
        for color, points in zip(_LINE_COLORS, named.values(), strict=False):
            _draw_line(axes, points, color, filled=is_sparsity)
        if is_sparsity:
            axes.set_ylim(0, 100)
        _label_ends(axes, {f"{name} {_text(points[-1][1])}".strip(): points[-1][1] for name, points in named.items()})
        if index == len(panels) - 1:
            axes.set_xlabel("step", fontsize=9)
    return figure


def _draw_line(axes: Axes, points: Sequence[tuple[int, float]], color: str, *, filled: bool) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 12 else None
    axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=3.5, clip_on=False)
    if filled:
        axes.fill_between(steps, values, color=color, alpha=0.15, linewidth=0)


def _text(value: float) -> str:
    return f"{value:.3g}"


def _label_ends(axes: Axes, ends: Mapping[str, float]) -> None:
    """Name each line at its right end, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    spacing, previous = 0.12, -1.0
    colors = dict(zip(ends, _LINE_COLORS, strict=False))
    for label, value in sorted(ends.items(), key=lambda item: item[1]):
        previous = max((value - low) / (high - low), previous + spacing)
        axes.text(
            1.015, previous, label, transform=axes.transAxes, va="center", fontsize=9, color=colors.get(label, INK)
        )


# Latency


def _draw_latency(panels: Mapping[str, Sequence[tuple[str, float, bool]]]) -> Figure:
    row, label, gap = 0.27, 1.9, 0.5
    heights = [row * len(bars) for bars in panels.values()]
    height = 0.75 + sum(heights) + gap * len(panels) + 0.2
    figure = _new_figure(height)
    top = height - 0.75
    for (title, bars), tall in zip(panels.items(), heights, strict=True):
        axes = _place(figure, label, top - gap - tall + 0.2, _WIDTH - label - 1.7, tall)
        top -= gap + tall
        names, values, are_dense = zip(*bars, strict=True)
        y, best = range(len(bars)), min(value for value, is_dense in zip(values, are_dense, strict=True) if is_dense)
        axes.barh(y, values, height=0.62, color=["#B0B0B0" if is_dense else BLUE for is_dense in are_dense])
        axes.axvline(best, color=VERMILLION, linewidth=1.2)
        for index, value in enumerate(values):
            text = f"{value:,.3g} ms, {best / value:.2f}x"
            axes.text(value + 0.01 * max(values), index, text, va="center_baseline", fontsize=9, color=GREY)
        axes.set(xlim=(0, max(values)), ylim=(len(bars) - 0.5, -0.5), yticks=list(y))
        axes.set_yticklabels(names, color=INK)
        axes.set_title(title, color=INK)
        axes.tick_params(left=False, bottom=False)
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
    return figure
