"""The README and the pages of docs/, and the fenced blocks in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCED = re.compile(r'^```(\S*)[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Name and text of every fenced block of a language; commands have none."""
    return [
        (f'{page.stem}-{number}', text)
        for page in PAGES
        for number, (kind, text) in enumerate(_FENCED.findall(page.read_text(encoding='utf-8')), 1)
        if kind == language
    ]


def commands() -> list[tuple[str, str]]:
    """Page and command of every line of a block of commands, without comments."""
    lines = [
        (name.rpartition('-')[0], line.partition(' #')[0].strip())
        for name, text in blocks('')
        for line in text.splitlines()
    ]
    return [(page, line) for page, line in lines if line]
