"""What was found in a dataset, in lines to be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ast_plugin.data.matching import Fault, printable
from ast_plugin.data.prepare import duplicates
from ast_plugin.data.prepare.prepare import Checks

_SHOWN = 5
_TRAITS = {
    'gray': 'in gray; read as RGB',
    'palette': 'with a palette; read as RGB',
    'transparency': 'with transparency; it is dropped',
    '16 bits': 'of 16 bits',
    'CMYK': 'in CMYK; converted to RGB',
}


def table(checks: Checks, source: Path) -> list[str]:
    """Return a table with a line for each split, without what is wrong with them."""
    rows = [('split', 'pairs', 'faulty', 'width x height', 'files', 'from')]
    for number, (split, found) in enumerate(zip(checks.splits, checks.found, strict=True)):
        faults = len(checks.faults(number))
        rows.append(
            (
                split.name,
                f'{found.num_pairs:,}',
                f'{faults:,}',
                _sizes(found.sizes),
                _bytes(found.num_bytes),
                _shorten(str(split.where), source),
            )
        )
    return _aligned(rows, right=(1, 2, 4))


def notes(checks: Checks) -> list[str]:
    """Return lines on what is no fault, but good to know."""
    lines = []
    for split, found in zip(checks.splits, checks.found, strict=True):
        for trait, count in sorted(found.traits.items()):
            what = _TRAITS.get(trait, f'{trait}; read by content')
            lines.append(f'{split.name}: {_count(count, "picture")} {what}')
        twins = duplicates.within(split, found)
        if twins:
            count = _count(twins.num, 'degraded picture')
            lines.append(f'{split.name}: {count} more than once: {_pairs(twins)}')
        unchanged = duplicates.num_unchanged(found)
        if unchanged:
            lines.append(f'{split.name}: in {_count(unchanged, "pair")} the degraded picture is the clean one')
        clean = duplicates.num_clean(found)
        if clean < len(found.good):
            lines.append(f'{split.name}: {len(found.good):,} degraded pictures of {_count(clean, "clean one")}')
    return lines


def faults(checks: Checks, source: Path) -> list[str]:
    """Return lines on the faults, by kind, with the first few of each."""
    lines = []
    for number, split in enumerate(checks.splits):
        by_kind: dict[str, list[Fault]] = {}
        for fault in checks.faults(number):
            by_kind.setdefault(fault.kind, []).append(fault)
        for kind, members in sorted(by_kind.items()):
            lines.append(f'{split.name}: {len(members):,} x {kind}')
            lines += [f'  {_shorten(fault.name, source)}: {_shorten(fault.text, source)}' for fault in members[:_SHOWN]]
            lines += _rest(len(members))
    return lines


def leaks(checks: Checks, source: Path) -> list[str]:
    """Return lines on pictures to be tested with that are trained on."""
    lines = []
    for leak in checks.leaks:
        what = _count(leak.num, f'{leak.what} picture')
        lines.append(f'{leak.second}: {what} {"is" if leak.num == 1 else "are"} in {leak.first}, too')
        lines += [f'  {_shorten(tested, source)} = {_shorten(trained, source)}' for trained, tested in leak.examples]
        lines += _rest(leak.num, len(leak.examples))
    return lines


def option_lines(manifests: Iterable[tuple[str, Path]]) -> list[str]:
    """Return the part of an option file that uses manifests.

    Args:
        manifests: phase and path of each.
    """
    lines, used = ['datasets:'], Counter()
    for phase, path in manifests:
        used[phase] += 1
        if phase == 'train' and used[phase] > 1:
            lines.append(f'    # or manifest: {_quoted(str(path))}')
            continue
        key = 'train' if phase == 'train' else 'val'
        key += f'_{used[phase]}' if used[phase] > 1 else ''
        lines += [
            f'  {key}:',
            f'    name: {_quoted(_dataset_name(path))}',
            '    type: PairsDataset',
            '    layout: manifest',
            f'    manifest: {_quoted(str(path))}',
        ]
    return lines


def _dataset_name(manifest: Path) -> str:
    """A name that files of results can have: the folder's, as far as that may be, and the split's."""
    folder = printable(manifest.parent.name).replace('\\', '_').lstrip('. ')[:80]
    return f'{folder}_{manifest.stem}'.lstrip('_')


def _quoted(text: str) -> str:
    plain = text.replace('/', '').replace('.', '').replace('_', '').replace('-', '')
    return text if plain.isalnum() and plain.isascii() else "'" + text.replace("'", "''") + "'"


def _sizes(sizes: Counter) -> str:
    if not sizes:
        return '-'
    (height, width), count = sizes.most_common(1)[0]
    if len(sizes) == 1:
        return f'{width}x{height}'
    heights, widths = [size[0] for size in sizes], [size[1] for size in sizes]
    if len(sizes) == 2:
        return ', '.join(f'{w}x{h} ({n:,})' for (h, w), n in sizes.most_common())
    return f'{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}, mostly {width}x{height} ({count:,})'


def _bytes(number: int) -> str:
    size = float(number)
    for unit in ('B', 'kB', 'MB', 'GB'):
        if size < 1000:
            return f'{size:.0f} {unit}' if unit == 'B' or size >= 10 else f'{size:.1f} {unit}'
        size /= 1000
    return f'{size:.1f} TB'


def _aligned(rows: Sequence[Sequence[str]], right: tuple[int, ...]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        '  '.join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _shorten(text: str, source: Path) -> str:
    """Leave out the folder of the dataset, which is printed above; show names that are no text all the same."""
    text = text.replace(f'{source}/', '')
    return text.encode('utf-8', 'backslashreplace').decode().replace('\n', '\\n')


def _pairs(twins: duplicates.Twins) -> str:
    return ', '.join(f'{Path(one).name} = {Path(other).name}' for one, other in twins.examples) + (
        ' ...' if twins.num > len(twins.examples) else ''
    )


def _count(number: int, noun: str) -> str:
    return f'{number:,} {noun}{"s" if number != 1 else ""}'


def _rest(number: int, shown: int = _SHOWN) -> list[str]:
    return [f'  and {number - shown:,} more'] if number > shown else []
