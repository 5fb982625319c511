"""How benchmarks print what they found."""

from typing import Any


def show(rows: list[dict[str, Any]]) -> None:
    """Rows of the same fields as a table, columns to the right."""
    names = list(rows[0])
    lines = [names, *[[str(row[name]) for name in names] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
