"""The README, the pages of docs/, and their fenced blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCED = re.compile(r'^```(\S*)[^\n]*\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Return name and text of every fenced block of a language; command blocks have no language."""
    return [
        (f'{page.stem}-{number}', text)
        for page in PAGES
        for number, (kind, text) in enumerate(_FENCED.findall(page.read_text(encoding='utf-8')), 1)
        if kind == language
    ]


def commands() -> dict[str, str]:
    """Return every command line, without its comment, and the first page that contains it."""
    pages = {}
    for name, text in blocks(''):
        for line in text.splitlines():
            pages.setdefault(' '.join(line.partition(' #')[0].split()), name.rpartition('-')[0])
    return {line: page for line, page in pages.items() if line}
