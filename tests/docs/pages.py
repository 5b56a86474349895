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


def commands() -> dict[str, str]:
    """Every line of a block of commands, without comments, and the first page that has it."""
    pages = {}
    for name, text in blocks(''):
        for line in text.splitlines():
            pages.setdefault(' '.join(line.partition(' #')[0].split()), name.rpartition('-')[0])
    return {line: page for line, page in pages.items() if line}
