"""Two pictures of a table: score over sparsity, and score over trainable parameters.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every line and point carries its name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from peft_pst.plots import BLUE, GREEN, GREY, INK, TRACK, VERMILLION, _add_title, _new_figure, _place, _styled, _write

from .table import Cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ORANGE, SKY, PURPLE = "#E69F00", "#56B4E9", "#CC79A7"
_COLORS = (VERMILLION, GREEN, ORANGE, PURPLE, SKY, INK)
_STYLES = ("-", "--", ":")
_MARKERS = {"-": "o", "--": "s", ":": "^"}

_CONNECTOR = {  # from the middle of a name's left side
    "arrowstyle": "-",
    "linewidth": 0.5,
    "alpha": 0.6,
    "relpos": (0, 0.5),
    "shrinkA": 1,
    "shrinkB": 2,
}

Look = tuple[str, str]


def plot_over_sparsity(cells: Sequence[Cell], path: Path) -> Path:
    """Draw mean and spread of every method that prunes over the sparsity; the others are level lines.

    Args:
        cells: of one task; a score that is not defined, as the correlation of a constant, has no place.
        path: PNG file to write.
    """
    cells = _defined(cells)
    looks = choose_looks(cells)
    with _styled():
        figure = _new_figure(5.6)
        axes = _place(figure, 0.75, 0.6, 4.6, 4.2)
        pruned = [cell for cell in cells if cell.prunes]
        ends: list[tuple[float, str, str]] = []
        for row in dict.fromkeys(cell.row for cell in pruned):
            own = sorted((cell for cell in pruned if cell.row == row), key=lambda cell: cell.sparsity)
            _draw_line(axes, own, looks[row])
            ends.append((_shown(own[-1]), own[-1].title, looks[row][0]))
        for cell in (cell for cell in cells if not cell.prunes):
            axes.axhline(_shown(cell), color=GREY, linewidth=1.0, linestyle=(0, (6, 3)))
            ends.append((_shown(cell), f"{cell.title} (dense)", GREY))
        axes.grid(axis="y", color=TRACK, linewidth=0.8)
        axes.set_axisbelow(True)
        sparsities = sorted({cell.sparsity for cell in pruned})
        axes.set_xticks([100 * sparsity for sparsity in sparsities])
        axes.set_xlabel("zeros in the adapted matrices, %", fontsize=9)
        _name_ends(axes, ends)
        _add_title(
            figure, f"{cells[0].task}: score over sparsity", _subtitle(cells, "; bars are the standard deviation")
        )
        return _write(figure, path)


def plot_over_parameters(cells: Sequence[Cell], path: Path) -> Path:
    """Draw the mean score of every method over the numbers that it trains, one panel a sparsity.

    Args:
        cells: of one task; those that do not prune are in every panel.
        path: PNG file to write.
    """
    cells = _defined(cells)
    looks = choose_looks(cells)
    sparsities = sorted({cell.sparsity for cell in cells if cell.prunes}) or [0.0]
    panel = 3.2
    with _styled():
        height = 0.85 + (panel + 0.5) * len(sparsities) + 0.2
        figure = _new_figure(height)
        for index, sparsity in enumerate(sparsities):
            axes = _place(figure, 0.75, height - 0.95 - (panel + 0.5) * (index + 1) + 0.5, 4.6, panel)
            chosen = [cell for cell in cells if not cell.prunes or cell.sparsity == sparsity]
            for cell in chosen:
                color, style = looks.get(cell.row, (GREY, "-"))
                axes.plot(cell.trained_parameters, _shown(cell), _MARKERS[style], color=color, markersize=6)
            axes.set_xscale("log")
            axes.grid(axis="y", color=TRACK, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.set_title(f"{100 * sparsity:g} % zeros", color=INK)
            _name_ends(
                axes,
                [(_shown(cell), cell.title, looks.get(cell.row, (GREY, "-"))[0]) for cell in chosen],
                [cell.trained_parameters for cell in chosen],
            )
        axes.set_xlabel("trained parameters", fontsize=9)
        _add_title(figure, f"{cells[0].task}: score over trained parameters", _subtitle(cells))
        return _write(figure, path)


def _defined(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if math.isfinite(cell.mean)]


def choose_looks(cells: Sequence[Cell]) -> dict[str, Look]:
    """Colour and line of each method that prunes: PST's kin in blue, every other pair once."""
    rows = list(dict.fromkeys(cell.row for cell in cells if cell.prunes))
    ours = [row for row in rows if row.startswith("pst")]
    others = [row for row in rows if row not in ours]
    looks = {row: (BLUE, _STYLES[index % len(_STYLES)]) for index, row in enumerate(sorted(ours, key=len))}
    pairs = [(color, style) for style, color in product(_STYLES, _COLORS)]
    return looks | {row: pairs[index % len(pairs)] for index, row in enumerate(others)}


def spread_apart(values: Sequence[float], gap: float) -> list[float]:
    """Places near the values, in their order, at least `gap` from one another.

    Example:
        >>> [round(place, 2) for place in spread_apart([0.5, 0.52, 0.0], gap=0.1)]
        [0.46, 0.56, 0.0]
    """
    order = sorted(range(len(values)), key=lambda index: values[index])
    groups: list[list[int]] = []
    for index in order:
        groups.append([index])
        while len(groups) > 1 and _bottom(groups[-1], values, gap) < _top(groups[-2], values, gap) + gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    places = [0.0] * len(values)
    for group in groups:
        for rank, index in enumerate(group):
            places[index] = _bottom(group, values, gap) + rank * gap
    return places


def _bottom(group: Sequence[int], values: Sequence[float], gap: float) -> float:
    return sum(values[index] for index in group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: Sequence[int], values: Sequence[float], gap: float) -> float:
    return _bottom(group, values, gap) + gap * (len(group) - 1)


def _draw_line(axes: Axes, own: Sequence[Cell], look: Look) -> None:
    color, style = look
    x, y = [100 * cell.sparsity for cell in own], [_shown(cell) for cell in own]
    spreads = [cell.factor * (cell.spread or 0.0) for cell in own]
    axes.errorbar(
        x,
        y,
        yerr=spreads if any(spreads) else None,
        color=color,
        linestyle=style,
        marker=_MARKERS[style],
        markersize=4,
        linewidth=1.8,
        elinewidth=0.9,
        capsize=2.5,
    )


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]], starts: Sequence[float] | None = None) -> None:
    """Names at the right, each with a thin line to its value, or to its point where `starts` says where that is."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    values = [(value - low) / (high - low) for value, _, _ in ends]
    for index, (place, (value, name, color)) in enumerate(zip(spread_apart(values, 0.046), ends, strict=True)):
        point = (1.0, values[index]) if starts is None else (starts[index], value)
        axes.annotate(
            name,
            xy=point,
            xycoords="axes fraction" if starts is None else "data",
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=color,
            annotation_clip=False,
            arrowprops={**_CONNECTOR, "color": color},
        )


def _shown(cell: Cell) -> float:
    return cell.factor * cell.mean


def _subtitle(cells: Sequence[Cell], of_several_seeds: str = "") -> str:
    numbers = {len(cell.scores) for cell in cells}
    most, up_to = max(numbers), "up to " if len(numbers) > 1 else ""
    unit, tail = ", percent" if cells[0].factor == 100 else "", of_several_seeds if most > 1 else ""
    return f"{cells[0].score_name.replace('_', ' ')}{unit}, mean over {up_to}{most} seed{'s' if most > 1 else ''}{tail}"
