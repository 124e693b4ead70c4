"""Text tables for the terminal: aligned columns between rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def draw_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], footer: Sequence[str], left: Collection[int] = (0,)
) -> list[str]:
    """Lines of a table: header, rule, rows, rule, footer; columns that are empty throughout are left out.

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
    table = [header, *rows, footer]
    columns = [index for index in range(len(header)) if any(row[index] for row in table)]
    widths = {index: max(len(row[index]) for row in table) for index in columns}
    lines = [
        "  ".join(
            row[index].ljust(widths[index]) if index in left else row[index].rjust(widths[index]) for index in columns
        ).rstrip()
        for row in table
    ]
    rule = "─" * max(map(len, lines))
    return [lines[0], rule, *lines[1:-1], rule, lines[-1]]


def bar(fraction: float, width: int = 20) -> str:
    """A horizontal bar, in steps of half a character; only 1 fills it.

    Example:
        >>> bar(0.75, width=4), bar(0.99, width=4)
        ('━━━─', '━━━╸')
    """
    halves = int(fraction * 2 * width)
    return ("━" * (halves // 2) + "╸" * (halves % 2)).ljust(width, "─")


def file_size(size: int) -> str:
    """Bytes in decimal units, as disks are sold.

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
