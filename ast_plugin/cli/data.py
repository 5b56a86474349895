"""Prepare, check, pack and synthesise the pairs of images that networks learn from."""

from __future__ import annotations

import argparse
import sys

from ast_plugin.cli import commands

# Each is the module `data_NAME` of this package, with `add_arguments(parser)` and `run(args) -> int`.
COMMANDS = {
    'prepare': 'find and check the pairs of a dataset as it is distributed, and write manifests to train from',
    'lmdb': 'pack pairs into LMDBs, which are read faster than many files',
    'check': 'verify a folder or an LMDB against its manifest',
    'synth': 'make degraded images from clean photos',
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr data`: a command, and what is left to it."""
    parser.usage = 'basicsr data COMMAND ...'
    parser.epilog = f'{commands.listed(COMMANDS)}\n\n`basicsr data COMMAND --help` says more, with examples.'
    parser.add_argument('command', nargs='?', help=argparse.SUPPRESS)
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(parser=parser)


def say(text: str = '') -> None:
    """Print a line; names of files in it need not be text that the terminal can show."""
    encoding = sys.stdout.encoding or 'utf-8'
    print(text.encode(encoding, 'backslashreplace').decode(encoding))


def run(args: argparse.Namespace) -> int:
    """Run the command that the arguments name."""
    if args.command is None:
        args.parser.print_help(sys.stderr)
        return 2
    if args.command not in COMMANDS:
        args.parser.error(commands.unknown(args.command, COMMANDS))
    return commands.run_module(f'data_{args.command}', f'basicsr data {args.command}', args.arguments)
