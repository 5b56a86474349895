"""List the shipped option files, or copy them to a folder for editing.

basicsr options                  list the files
basicsr options my_options       copy the files to my_options/
basicsr train -opt AST_derain    use a file without copying it
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ast_plugin import options
from ast_plugin.errors import OptionError
from ast_plugin.files import write_file
from ast_plugin.names import say, to_columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr options`."""
    parser.add_argument('folder', nargs='?', type=Path, metavar='DIR', help='target folder; created if missing')
    parser.add_argument('--force', action='store_true', help='overwrite existing files that differ')


def run(args: argparse.Namespace) -> int:
    """List the files, or copy them to a folder."""
    if args.folder is not None:
        _copy(options.shipped_folder(), args.folder, args.force)
        return 0
    say(*to_columns((name, _first_comment(path)) for name, path in options.known_files().items()))
    return 0


def _first_comment(path: Path) -> str:
    first = next(iter(path.read_text(encoding='utf-8-sig', errors='replace').splitlines()), '')
    return first.lstrip('# ').rstrip() if first.startswith('#') else ''


def _copy(source: Path, folder: Path, force: bool) -> None:
    """Copy all option files, or none if an existing copy was edited."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f'{folder}: expected a folder, got a file')
    copies = {path: folder / path.relative_to(source) for path in sorted(source.rglob('*.yml'))}
    new = {path: copy for path, copy in copies.items() if not copy.exists() or copy.read_bytes() != path.read_bytes()}
    edited = [str(copy) for copy in new.values() if copy.exists()]
    if edited and not force:
        raise OptionError(
            f'{", ".join(edited)}: already exists and differs; nothing was copied. '
            'Choose another folder, or use --force to overwrite'
        )
    for path, copy in new.items():
        write_file(copy, path.read_bytes(), make_folder=True)
    say(f'{len(new)} option files copied to {folder}, {len(copies) - len(new)} already up to date')
