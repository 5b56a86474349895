"""Gather clean photographs to synthesise pairs from.

Takes what is a colour photograph, opaque, readable, large enough and not there yet, and copies it unchanged; drawings,
icons and gray pictures stay behind. Sources are any folder, with all folders inside, or a Debian package, which apt
downloads and which is unpacked into a temporary folder, never installed; its statement of licences comes along.

    basicsr data photos photos --from ~/Pictures
    basicsr data photos photos --debian gcompris-qt-data
    basicsr data synth --task rain -i photos -o rainy --count 8
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ast_plugin.errors import DataError, OptionError

if TYPE_CHECKING:
    from ast_plugin.data.prepare.photo_gathering import Gathered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data photos`."""
    parser.add_argument('destination', metavar='DST', help='folder for the photographs; what is in it is kept')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--from', dest='folder', metavar='FOLDER', help='a folder, searched with all inside it')
    source.add_argument(
        '--debian', metavar='PACKAGE', help='a Debian package, by name (needs apt) or as a .deb file (needs dpkg-deb)'
    )
    parser.add_argument('--min-side', type=int, default=256, metavar='N', help='least pixels a side (default: 256)')


def run(args: argparse.Namespace) -> int:
    """Gather, and say what was left out.

    Raises:
        DataError: if the source cannot be had, or has no photograph.
    """
    from ast_plugin.data.prepare.photo_gathering import folder_pictures, gather, unpack_debian

    if args.min_side < 16:
        raise OptionError(f'--min-side is {args.min_side}: expected 16 or more')
    destination = Path(args.destination).expanduser()
    if args.folder is not None:
        folder = Path(args.folder).expanduser()
        if not folder.is_dir():
            raise DataError(f'{folder}: there is no such folder')
        if destination.resolve().is_relative_to(folder.resolve()):
            raise OptionError(f'{destination}: lies in the folder to gather from, {folder}; name another one')
        _report(gather(folder_pictures(folder), destination, args.min_side), destination, folder)
        return 0
    if not re.fullmatch(r'[a-z0-9][a-z0-9+.-]+', args.debian) and not args.debian.endswith('.deb'):
        raise OptionError(f'--debian {args.debian}: is no name of a Debian package')
    with tempfile.TemporaryDirectory(prefix='photos-') as temporary:
        licences = unpack_debian(args.debian, Path(temporary))
        pictures = folder_pictures(Path(temporary) / 'tree')
        _report(gather(pictures, destination, args.min_side), destination, args.debian)
        _state_licences(licences, destination, args.debian)
    return 0


def _report(gathered: Gathered, destination: Path, source: object) -> None:
    left_out = ', '.join(f'{count} {reason}' for reason, count in gathered.left_out.most_common())
    count = len(gathered.names)
    if not count and not gathered.left_out['there already']:
        raise DataError(f'no photograph in {source}{f" (left out: {left_out})" if left_out else ", nor any picture"}')
    print(f'gathered {count} photograph{"s" if count != 1 else ""} of {source}: {destination}')
    if left_out:
        print(f'left out: {left_out}')


def _state_licences(licences: Path | None, destination: Path, package: str) -> None:
    from ast_plugin.data.whole_files import write_bytes

    if licences is None:
        print(f'{package} states no licences; find out whose the photographs are before you pass them on')
        return
    kept = destination / f'{licences.parent.name}.copyright'
    write_bytes(kept, licences.read_bytes())
    print(f'the photographs have the licences that {kept} states')
