"""Numbers as readers of tables and plots see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ast_plugin.compare.bootstrap import Estimate
    from ast_plugin.compare.results import Results, Row

_PREFIXES = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))
_DIGITS = {'psnr': 2, 'ssim': 4}
MISSING = '–'


def count(value: float | None) -> str:
    """`6.65 M`: three figures and a prefix."""
    if value is None:
        return MISSING
    factor, prefix = next(((f, p) for f, p in _PREFIXES if value >= f), (1, ''))
    scaled = value / factor
    digits = 0 if not prefix or scaled >= 100 else 1 if scaled >= 10 else 2
    return f'{scaled:.{digits}f} {prefix}'.rstrip()


def axis_number(value: float) -> str:
    """`200 k`, `0.05`: what stands at a tick."""
    factor, prefix = next(((f, p) for f, p in _PREFIXES if value >= f), (1, ''))
    return f'{value / factor:g} {prefix}'.rstrip()


def megabytes(value: float | None) -> str:
    """Bytes in MB, 2²⁰ of them each."""
    return MISSING if value is None else f'{value / 2**20:,.0f}'


def milliseconds(value: float | None) -> str:
    """Three figures, and no more than the whole number."""
    if value is None:
        return MISSING
    return f'{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}'


def duration(seconds: float | None) -> str:
    """`41 s`, `3.2 min`, `5.1 h`."""
    if seconds is None:
        return MISSING
    for size, unit in ((3600, 'h'), (60, 'min')):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.0f} s'


def metric_value(metric: str, value: float) -> str:
    """Decibels with two digits, what lies in [0, 1] with four."""
    return f'{value:.{_digits(metric, value)}f}'


def interval(metric: str, found: Estimate | None, sign: bool = False) -> str:
    """`29.49 [28.10, 30.75]`."""
    if found is None:
        return MISSING
    digits = _digits(metric, found.mean)
    plus = '+' if sign else ''
    text = f'{found.mean:{plus}.{digits}f}'
    if found.low is None:
        return text
    return f'{text} [{found.low:{plus}.{digits}f}, {found.high:{plus}.{digits}f}]'


def table_cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for reading."""
    reference = results.reference()
    header = ['network', 'parameters']
    for height, width in results.sizes:
        size = f'{height}²' if height == width else f'{height}×{width}'
        header += [f'MACs at {size}', f'ms at {size}', f'MB at {size}']
    header += [*results.metrics]
    if reference is not None:
        header += [f'{metric} against {reference.name}' for metric in results.metrics[:1]]
    return header, [_cells(results, row) for row in results.rows]


def _cells(results: Results, row: Row) -> list[str]:
    cells = [row.name, count(row.parameters)]
    for size in results.sizes:
        speed = row.speeds.get(size)
        cells += [
            count(speed.macs if speed else None),
            milliseconds(speed.milliseconds if speed else None),
            megabytes(speed.peak_bytes if speed else None),
        ]
    cells += [interval(metric, results.estimate(row, metric)) for metric in results.metrics]
    if results.reference() is not None:
        cells += [interval(metric, results.difference(row, metric), sign=True) for metric in results.metrics[:1]]
    return cells


def _digits(metric: str, value: float) -> int:
    known = next((digits for name, digits in _DIGITS.items() if name in metric.lower()), None)
    return known if known is not None else 2 if abs(value) >= 2 else 4
