"""Names that users give, on their way to a terminal, a table, a drawing, a file system, and other software.

A name may hold whatever a file system allows, bytes of no text and ends of lines among it: nothing takes it raw.
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

MOST_BYTES = 255  # of a file's name, on every file system in use
LITERAL = {'text.parse_math': False, 'text.usetex': False, 'axes.formatter.use_mathtext': False}
"""Settings of matplotlib under which text is drawn as it stands."""

_MOST_DRAWN = 60  # characters of a name in a drawing
# Not one character each: controls, halves of pairs, what Unicode has not assigned, ends of lines and paragraphs.
_UNPRINTABLE = {'Cc', 'Cs', 'Cn', 'Zl', 'Zp'}
_REORDERING = {'LRE', 'RLE', 'LRO', 'RLO', 'PDF', 'LRI', 'RLI', 'FSI', 'PDI'}  # what follows would stand elsewhere
# What Markdown, GitHub's mathematics included, would not show as it stands.
_MARKDOWN = re.compile(r'[|<*`$]|&(?=#|\w+;)|\](?=[(\[])|~(?=~)|\\(?=[!-/:-@\[-`{-~])|(?<!\w)_|_(?!\w)')


def printable(name: str) -> str:
    """Show a name in one line of text; what is no character that can stand in a line becomes its escape."""
    return name if name.isascii() and name.isprintable() else ''.join(map(_printable_character, name))


def say(*lines: str, file: IO[str] | None = None) -> None:
    """Print lines, each by `printable`: all that is said to a terminal goes through here."""
    print(*map(printable, lines), sep='\n', file=file, flush=True)


def seed_of(name: str) -> int:
    """A number below 2**32 out of the bytes of a name, to be mixed into a seed."""
    return zlib.crc32(os.fsencode(name))


def file_name(stem: str, ending: str = '') -> str:
    """A name that every file system takes: too long a stem is cut, and told from others by a digest."""
    if len(os.fsencode(stem + ending)) <= MOST_BYTES:
        return stem + ending
    digest = f'~{seed_of(stem):08x}'
    kept = os.fsencode(stem)[: max(1, MOST_BYTES - len(os.fsencode(digest + ending)))]
    return kept.decode('utf-8', 'ignore') + digest + ending


def drawable(text: str, most: int = _MOST_DRAWN) -> tuple[str, str | None]:
    """Say how a text can be drawn.

    Args:
        text: perhaps with names in it.
        most: characters; of a longer one the middle is left out.
    Returns:
        The text, and the file of a font that has all of its characters, None for the usual one; where no installed
        font has them, they are escapes, which is said once.
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


def write_name(text: Any, name: str, most: int = _MOST_DRAWN) -> None:
    """Let a text of a drawing, matplotlib's, show a name as it stands."""
    from matplotlib.font_manager import FontProperties

    shown, file = drawable(name, most)
    text.set(text=shown, parse_math=False, usetex=False)
    if file is not None:
        text.set_fontproperties(FontProperties(fname=file, size=text.get_fontsize()))


def to_columns(rows: Iterable[Sequence[str]], align: str = '', indent: str = '') -> list[str]:
    """Lines of cells below one another.

    Args:
        rows: of one length.
        align: '<' or '>' for each column; '' for all to the left.
        indent: what lines begin with.
    """
    rows = list(rows)
    columns = zip(*rows, strict=True)
    widths = [f'{side}{max(map(len, column))}' for side, column in zip(cycle(align or '<'), columns, strict=False)]
    lines = ('  '.join(map(format, row, widths)) for row in rows)
    return [f'{indent}{line}'.rstrip() for line in lines]


def to_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format rows, the header first: the first column to the left, the others to the right, all of one width."""
    cells = [list(map(escape_markdown, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]
    aligned = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return '\n'.join(f'| {" | ".join(row)} |' for row in (aligned[0], rule, *aligned[1:]))


def escape_markdown(text: str) -> str:
    """A line that Markdown shows as it stands, in a cell of a table too."""
    return _MARKDOWN.sub(r'\\\g<0>', printable(text))


def to_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Format rows, the header first; numbers in full, None and NaN as nothing."""
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
    """Files of fonts, matplotlib's usual one first, upright ones of sans serif before others; none without it."""
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
    """The characters that a font has no outline for."""
    from matplotlib.ft2font import FT2Font

    with suppress(OSError, RuntimeError):
        font = FT2Font(file)
        # Such as have a box for everything are no help, and matplotlib draws no bitmaps.
        if font.scalable and 'last' not in font.family_name.lower():
            return frozenset(character for character in characters if not font.get_char_index(ord(character)))
    return characters


@functools.cache
def _warn_of_fonts() -> None:
    logging.getLogger('basicsr').warning('No installed font has every character of a name: drawn by their escapes')
