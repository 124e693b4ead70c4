"""A sparsity report as text for the terminal."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from .comparison import SparsityComparison
    from .report import LayerSparsity, SparsityReport

SHOW_ALL_UP_TO = 16


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Layer = TypeVar("_Layer", bound=_Named)


def sparsity_table(report: SparsityReport, show_all: bool | None = None) -> str:
    """See `SparsityReport.to_table`."""
    if show_all is None:
        show_all = len(report.layers) <= SHOW_ALL_UP_TO
    if show_all:
        first, groups = "layer", [(layer.name, [layer]) for layer in report.layers]
    else:
        first, groups = "kind", by_kind(report.layers)
    is_oriented = any(layer.promised is not None for layer in report.layers)
    lines = draw_table(
        header=(
            first,
            "layers",
            "out x in" if is_oriented else "shape",
            "zeros",
            "weights",
            "sparsity",
            "",
            "target",
            "",
        ),
        rows=[_row(name, layers, counted=not show_all) for name, layers in groups],
        footer=_row("total", report.layers, counted=not show_all),
        left=(0, 6, 8),
    )
    return "\n".join([f"Sparsity of {report.source}", "", *lines, "", *_remarks(report)])


def comparison_table(comparison: SparsityComparison, show_all: bool = False) -> str:
    """See `SparsityComparison.to_table`."""
    title = f"Zeros of {comparison.reference} in {comparison.source}"
    shown = comparison.layers if show_all else comparison.lost_layers
    count = f"{comparison.reference_zeros:,} zeros in {len(comparison.layers):,} matrices"
    if comparison.lost:
        verdict = (
            f"✗ {len(comparison.lost_layers):,} of {len(comparison.layers):,} matrices lost {comparison.lost:,} of "
            f"{comparison.reference_zeros:,} zeros: they were changed without the mask"
        )
    else:
        verdict = f"✓ all {count} are still zero"
    if not shown:
        return f"{title}\n\n{verdict}"
    rows = [_comparison_row(row.name, row.reference_zeros, row.lost) for row in shown]
    footer = _comparison_row("total", sum(row.reference_zeros for row in shown), sum(row.lost for row in shown))
    lines = draw_table(("layer", "zeros", "still zero", "lost", ""), rows, footer, left=(0, 4))
    return "\n".join([title, "", *lines, "", verdict])


def _comparison_row(name: str, zeros: int, lost: int) -> tuple[str, ...]:
    return name, f"{zeros:,}", f"{zeros - lost:,}", f"{lost:,}", f"✗ {100 * lost / zeros:.2f} %" if lost else "✓"


def by_kind(layers: Sequence[_Layer]) -> list[tuple[str, list[_Layer]]]:
    """Group layers that differ in their block numbers only.

    Returns:
        (kind, layers) in order of appearance; numbers become "*", and the part that all kinds start with is left out.

    Example:
        >>> from peft_pst.report import LayerSparsity
        >>> layers = [LayerSparsity(f"h.{i}.{name}", (2, 2), 0) for i in range(2) for name in ("up", "down")]
        >>> [(kind, len(rows)) for kind, rows in by_kind(layers)]
        [('up', 2), ('down', 2)]
    """
    groups: dict[str, list[_Layer]] = {}
    for layer in layers:
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name), []).append(layer)
    paths = [kind.split(".") for kind in groups]
    levels = zip(*(path[:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    return [(".".join(path[shared:]), rows) for path, rows in zip(paths, groups.values(), strict=True)]


def _row(name: str, layers: Sequence[LayerSparsity], *, counted: bool) -> tuple[str, ...]:
    zeros, weights = _sum(layers)
    sparsity = zeros / weights if weights else 0.0
    shapes = {f"{layer.shape[0]:,} x {layer.shape[1]:,}" for layer in layers}
    return (
        name,
        f"{len(layers):,}" if counted else "",
        shapes.pop() if len(shapes) == 1 and name != "total" else "",
        f"{zeros:,}",
        f"{weights:,}",
        f"{100 * sparsity:.2f} %",
        bar(sparsity),
        _target(layers),
        _mark(layers),
    )


def _sum(layers: Sequence[LayerSparsity]) -> tuple[int, int]:
    """Zeros and weights."""
    return sum(layer.zeros for layer in layers), sum(layer.weights for layer in layers)


def _target(layers: Sequence[LayerSparsity]) -> str:
    targets = sorted({100 * layer.target_sparsity for layer in layers if layer.target_sparsity is not None})
    if not targets:
        return ""
    low, high = f"{targets[0]:g}", f"{targets[-1]:g}"
    return f"{high} %" if low == high else f"{low}-{high} %"


def _mark(layers: Sequence[LayerSparsity]) -> str:
    lost = sum(layer.lost_zeros for layer in layers)
    missing = sum(layer.misses_target for layer in layers)
    if lost:
        return f"✗ {lost:,} zeros lost"
    if missing:
        return "✗ below target" if missing == len(layers) else f"✗ {missing} of {len(layers)} below target"
    return "" if any(layer.target_sparsity is None for layer in layers) else "✓"


def _remarks(report: SparsityReport) -> Iterator[str]:
    for layer in report.lost_zeros[:5]:
        yield (
            f"✗ {layer.name} holds {layer.zeros:,} zeros, {layer.lost_zeros:,} fewer than were put there: it was "
            "changed after pruning."
        )
    if len(report.lost_zeros) > 5:
        yield f"✗ {len(report.lost_zeros) - 5} further layers lost zeros."
    for label, text in (*_model_remarks(report), *_file_remarks(report)):
        yield f"{label:<15} {text}"


def _model_remarks(report: SparsityReport) -> Iterator[tuple[str, str]]:
    total, trained = report.total_parameters, report.trainable_parameters
    if report.others:
        zeros, weights = _sum(report.others)
        yield "Other matrices", f"{len(report.others):,}, with {zeros:,} zeros in {weights:,} weights"
    if total:
        zeros = report.zeros + _sum(report.others)[0]
        yield "Whole model", f"{total:,} parameters, of which {100 * zeros / total:.2f} % are zeros in these matrices"
    if total and trained is not None:
        yield "Trained", f"{trained:,} parameters, which is {100 * trained / total:.2f} % of the model's number"


def _file_remarks(report: SparsityReport) -> Iterator[tuple[str, str]]:
    sizes = report.files
    if sizes:
        one = f" in {next(iter(sizes))}" if len(sizes) == 1 else f" in {len(sizes)} files"
        yield "On disk", f"{file_size(sum(sizes.values()))}{one}"
    yield from _size_remarks(report)
    if report.zeros and not (report.sizes and report.sizes.is_compact):
        yield "Note", "in a dense matrix a zero takes the room and the time of any other number"
    if report.target_sparsity is None:
        yield "Target", "not known; a pst_report.json beside the weights, as `peft-pst merge` writes it, would tell"


def _size_remarks(report: SparsityReport) -> Iterator[tuple[str, str]]:
    sizes = report.sizes
    if sizes is None or not sizes.layers_dense:
        return
    theory = f"{100 * sizes.layers_theory / sizes.layers_dense:.2f} %"
    if sizes.layers_bits:
        theory = f"1/{sizes.layers_bits} + (1 - {report.sparsity:.4g}) = {theory}"
    if sizes.is_compact:
        yield "Tensors", f"{_of(sizes.stored, sizes.dense)} that a dense checkpoint takes"
        yield "These matrices", f"{_of(sizes.layers_stored, sizes.layers_dense)}; in theory {theory}"
    elif sizes.layers_theory < 0.9 * sizes.layers_dense:
        saved = file_size(round(sizes.layers_theory))
        yield "Compact", f"{saved} instead of {file_size(sizes.layers_dense)}, {theory}, with `peft-pst compact`"


def _of(part: int, total: int) -> str:
    return f"{file_size(part)}, {100 * part / total:.2f} % of the {file_size(total)}"


def draw_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], footer: Sequence[str], left: Collection[int] = (0,)
) -> list[str]:
    """Lines of a table: header, rule, rows, rule, footer; columns whose cells are all empty are left out.

    Args:
        header: one title per column.
        rows: cells, as many in each row as there are titles.
        footer: the last row, such as sums.
        left: indices of the columns that are aligned to the left; the others are aligned to the right.

    Example:
        >>> print("\\n".join(draw_table(["name", "zeros"], [["up", "24"], ["down", "8"]], ["total", "32"])))
        name   zeros
        ────────────
        up        24
        down       8
        ────────────
        total     32
    """
    body = [*rows, footer]
    columns = [index for index in range(len(header)) if any(row[index] for row in body)]
    widths = {index: max(len(row[index]) for row in (header, *body)) for index in columns}
    lines = [
        "  ".join(
            row[index].ljust(widths[index]) if index in left else row[index].rjust(widths[index]) for index in columns
        ).rstrip()
        for row in (header, *body)
    ]
    rule = "─" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def bar(fraction: float, width: int = 20) -> str:
    """A horizontal bar, to the nearest half of a character; only 1 fills it.

    Example:
        >>> bar(0.75, width=4), bar(0.99, width=4)
        ('━━━─', '━━━╸')
    """
    halves = min(round(fraction * 2 * width), 2 * width - (fraction < 1))
    return ("━" * (halves // 2) + "╸" * (halves % 2)).ljust(width, "─")


def file_size(size: int) -> str:
    """Bytes in decimal units.

    Example:
        >>> file_size(999), file_size(11_345_678)
        ('999 B', '11.3 MB')
    """
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"
