"""Tables as Markdown and as comma-separated values."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, the header first: the first column to the left, the others to the right, all of one width."""
    cells = [[cell.replace('|', '\\|') for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (aligned[0], rule, *aligned[1:]))


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Format rows, the header first; numbers in full, None and NaN as nothing."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(
        ['' if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows
    )
    return text.getvalue()
