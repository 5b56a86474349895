"""List the option files that come along, or copy them into a folder to edit.

basicsr options               list them
basicsr options my_options    copy them to my_options/
basicsr train -opt AST_derain uses one without copying it
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
    parser.add_argument('folder', nargs='?', type=Path, metavar='DIR', help='where to copy the files; made if missing')
    parser.add_argument('--force', action='store_true', help='replace files there that differ')


def run(args: argparse.Namespace) -> int:
    """List the files, or copy them out."""
    if args.folder is not None:
        _copy(options.shipped_folder(), args.folder, args.force)
        return 0
    say(*to_columns((name, _first_comment(path)) for name, path in options.known_files().items()))
    return 0


def _first_comment(path: Path) -> str:
    first = next(iter(path.read_text(encoding='utf-8').splitlines()), '')
    return first.lstrip('# ').rstrip() if first.startswith('#') else ''


def _copy(source: Path, folder: Path, force: bool) -> None:
    """Copy every option file, or, if one there was edited, none."""
    if folder.exists() and not folder.is_dir():
        raise OptionError(f'{folder}: expected a folder to copy the option files to, this is a file')
    copies = {path: folder / path.relative_to(source) for path in sorted(source.rglob('*.yml'))}
    new = {path: copy for path, copy in copies.items() if not copy.exists() or copy.read_bytes() != path.read_bytes()}
    edited = [str(copy) for copy in new.values() if copy.exists()]
    if edited and not force:
        raise OptionError(
            f'{", ".join(edited)}: there already and different; nothing was copied. '
            'Choose another folder, or --force to replace'
        )
    for path, copy in new.items():
        write_file(copy, path.read_bytes(), make_folder=True)
    say(f'{len(new)} option files copied to {folder}, {len(copies) - len(new)} were there already')
