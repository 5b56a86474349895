"""Safe output of user-supplied names in terminals, tables, plots and file names.

A name may contain anything that a file system allows, including invalid UTF-8 and line breaks.
"""

from __future__ import annotations

import csv
import functools
import io
import logging
import math
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from typing import IO, Any

MOST_BYTES = 255  # maximum length of a file name on common file systems
LITERAL = {'text.parse_math': False, 'text.usetex': False, 'axes.formatter.use_mathtext': False}
"""Matplotlib settings that disable the interpretation of text as mathematics."""

_MOST_DRAWN = 60  # maximum number of characters of a name in a plot
# Unicode categories: control characters, surrogates, unassigned code points, line and paragraph separators.
_UNPRINTABLE = {'Cc', 'Cs', 'Cn', 'Zl', 'Zp'}
_REORDERING = {'LRE', 'RLE', 'LRO', 'RLO', 'PDF', 'LRI', 'RLI', 'FSI', 'PDI'}  # these reorder the following text
# Characters that Markdown, including GitHub's mathematics, interprets as markup.
_MARKDOWN = re.compile(r'[|<*`$]|&(?=#|\w+;)|\](?=[(\[])|~(?=~)|\\(?=[!-/:-@\[-`{-~])|(?<!\w)_|_(?!\w)')


def printable(name: str) -> str:
    """Return a name as one line of text; unprintable and reordering characters are escaped."""
    return name if name.isascii() and name.isprintable() else ''.join(map(_printable_character, name))


def say(*lines: str, file: IO[str] | None = None) -> None:
    """Print lines through `printable`. All terminal output uses this function."""
    print(*map(printable, lines), sep='\n', file=file, flush=True)


def seed_of(name: str) -> int:
    """Return a number below 2**32 computed from the bytes of a name, for use in a random seed."""
    return zlib.crc32(os.fsencode(name))


def file_name(stem: str, ending: str = '') -> str:
    """Return a file name of valid length; a stem that is too long is truncated and made unique by a digest."""
    if len(os.fsencode(stem + ending)) <= MOST_BYTES:
        return stem + ending
    digest = f'~{seed_of(stem):08x}'
    kept = os.fsencode(stem)[: max(1, MOST_BYTES - len(os.fsencode(digest + ending)))]
    return kept.decode('utf-8', 'ignore') + digest + ending


def drawable(text: str, most: int = _MOST_DRAWN) -> tuple[str, str | None]:
    """Prepare a text for a plot.

    Args:
        text: may contain user-supplied names.
        most: maximum number of characters; the middle of a longer text is replaced by an ellipsis.
    Returns:
        The text, and the file of a font with all of its characters (None for the default font). Characters that no
        installed font has are escaped, with one warning.
    """
    text = printable(text)
    if len(text) > most:
        text = f'{text[: most - most // 3 - 1]}…{text[-(most // 3) :]}'
    if text.isascii():
        return text, None
    wanted = frozenset(character for character in text if not character.isspace())
    file = next((file for file in _fonts() if not _missing(file, wanted)), None)
    if file is not None:
        return text, file
    _warn_of_fonts()
    usual = next(iter(_fonts()), None)
    missing = _missing(usual, wanted) if usual else wanted
    return ''.join(_escape(character) if character in missing else character for character in text), usual


def write_name(text: Any, name: str) -> None:
    """Set a matplotlib text to a name, without interpreting the name as mathematics."""
    from matplotlib.font_manager import FontProperties

    shown, file = drawable(name)
    text.set(text=shown, parse_math=False, usetex=False)
    if file is not None:
        text.set_fontproperties(FontProperties(fname=file, size=text.get_fontsize()))


def to_columns(rows: Iterable[Sequence[str]], align: str = '', indent: str = '') -> list[str]:
    """Format rows as lines with aligned columns.

    Args:
        rows: rows of equal length.
        align: '<' or '>' for each column; '' aligns all columns to the left.
        indent: prefix of each line.
    """
    rows = list(rows)
    columns = zip(*rows, strict=True)
    widths = [f'{side}{max(map(len, column))}' for side, column in zip(cycle(align or '<'), columns, strict=False)]
    lines = ('  '.join(map(format, row, widths)) for row in rows)
    return [f'{indent}{line}'.rstrip() for line in lines]


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, header first, as a Markdown table: the first column left-aligned, the others right-aligned."""
    cells = [list(map(escape_markdown, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (aligned[0], rule, *aligned[1:]))


def escape_markdown(text: str) -> str:
    """Escape a line so that Markdown shows it literally, including in table cells."""
    return _MARKDOWN.sub(r'\\\g<0>', printable(text))


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Format rows, header first, as CSV: numbers in full precision, None and NaN as empty cells."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows(
        ['' if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def _printable_character(character: str) -> str:
    is_shown = unicodedata.category(character) not in _UNPRINTABLE
    return character if is_shown and unicodedata.bidirectional(character) not in _REORDERING else _escape(character)


def _escape(character: str) -> str:
    return character.encode('unicode_escape').decode()


@functools.cache
def _fonts() -> tuple[str, ...]:
    """Return font files: matplotlib's default first, then upright sans-serif fonts, then others; empty without it."""
    try:
        from matplotlib import font_manager, get_data_path
    except ImportError:
        return ()

    def order(file: str) -> tuple[bool, bool, str]:
        name = Path(file).name.lower()
        return any(word in name for word in ('bold', 'italic', 'oblique', 'mono')), 'sans' not in name, file

    found = sorted(font_manager.findSystemFonts(), key=order)
    return str(Path(get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')), *found


@functools.lru_cache(maxsize=4096)
def _missing(file: str, characters: frozenset[str]) -> frozenset[str]:
    """Return the characters for which a font has no outline."""
    from matplotlib.ft2font import FT2Font

    with suppress(OSError, RuntimeError):
        font = FT2Font(file)
        # Skip last-resort fonts, which have a box for every character, and bitmap fonts, which matplotlib cannot draw.
        if font.scalable and 'last' not in font.family_name.lower():
            return frozenset(character for character in characters if not font.get_char_index(ord(character)))
    return characters


@functools.cache
def _warn_of_fonts() -> None:
    logging.getLogger('basicsr').warning('No installed font has all characters of a name: missing ones are escaped')
