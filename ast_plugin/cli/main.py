"""The command `basicsr`: finds the subcommand, runs it, and turns what a user can mend into one clear message.

Exit status: 0 done, 1 done in part, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from ast_plugin import __version__
from ast_plugin.cli import commands
from ast_plugin.errors import PluginError
from ast_plugin.names import say

# Each is a module of this package with `add_arguments(parser)` and `run(args) -> int`, its docstring is its help.
COMMANDS = {
    'train': 'train the network of an option file',
    'test': 'measure trained weights on the validation and test sets of an option file',
    'check': 'check an option file, and print all that it comes to',
    'infer': 'restore images with trained weights',
    'web': 'restore images on a page in the browser',
    'export': 'write a network with its weights for ONNX Runtime and others',
    'measure': 'measure restored images of any network against clean ones',
    'info': 'tell what a network needs: parameters, multiplications, memory, time',
    'data': 'prepare, check, pack and synthesise pairs of images',
    'mix': 'show what a mixed network exchanges and costs, and try it',
    'list': 'show what networks, datasets, losses, metrics and models are registered',
    'options': 'list the option files that come along, or copy them out to edit',
    'compare': 'train and measure several networks alike, with tables, plots and a report',
    'demo': 'train a small network on packaged images and draw the result',
}
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on `argv`, by default the process's arguments; return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Read when torch is loaded. By itself a thread that waits for others spins ten times as long: where other programs
    # want the cores, two threads of `infer` take twice the time, most of it in barriers; on idle ones it gains nothing.
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', '30000')
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # as stderr: a name that it cannot show must not end a run
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except PluginError as error:
        say(*f'basicsr: error: {error}'.split('\n'), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say('basicsr: interrupted', file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left (`basicsr list | head`). Python would complain once more at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # What the system says of a name, as that it is too long or may not be looked at. Files that are not there are
        # refused before; where one is missing all the same, the fault is ours.
        if isinstance(error.filename, int | None) or isinstance(error, FileNotFoundError):
            raise
        say(f'basicsr: error: {os.fsdecode(error.filename)}: {error.strerror}', file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in COMMANDS:
        return _without_command(arguments)
    name, *rest = arguments
    return commands.run_module(name, f'basicsr {name}', rest)


def _without_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog='basicsr',
        usage='basicsr COMMAND ...',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Train, test and use image restoration networks with BasicSR and its plugins.',
        epilog=f'{commands.listed(COMMANDS)}\n\n`basicsr COMMAND --help` says more, with an example.',
    )
    parser.add_argument('--version', action='version', version=f'basicsr (ast_plugin {__version__})')
    if arguments and not arguments[0].startswith('-'):
        parser.error(commands.unknown(arguments[0], COMMANDS))
    parser.parse_args(arguments)
    parser.print_help(sys.stderr)
    return 2
