"""Entry point of the command `basicsr`: run a subcommand and report errors that the user can fix as one message.

Exit status: 0 success, 1 partial success, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from ast_plugin.cli import commands
from ast_plugin.errors import PluginError
from ast_plugin.names import say

DESCRIPTION = 'Train, test and use image restoration networks with BasicSR and its plugins.'
# Each is a module of this package with `add_arguments(parser)` and `run(args) -> int`. Its docstring is the help text.
COMMANDS = {
    'train': 'train the network of an option file',
    'test': 'evaluate trained weights on the validation and test sets of an option file',
    'check': 'validate an option file and print the resolved options',
    'infer': 'restore images with trained weights',
    'web': 'restore images in the browser',
    'export': 'export a network with its weights to ONNX, TorchScript or torch.export',
    'measure': 'compute metrics of restored images of any network against clean images',
    'info': 'report parameters, MACs, memory and time of a network',
    'data': 'prepare, check, pack and synthesise image pairs',
    'mix': 'list the replaced modules of a mixed network and their cost, and run it once',
    'list': 'list the registered networks, datasets, losses, metrics and models',
    'options': 'list the shipped option files, or copy them to a folder',
    'compare': 'train and measure several networks under equal conditions; write tables, plots and a report',
    'demo': 'train a small network on packaged images and plot the results',
}
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on `argv` (default: the arguments of the process) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # OpenMP reads this when torch is imported. The default spin count is ten times larger: if other programs use the
    # cores, two threads of `infer` take twice as long, mostly in barriers. On idle cores spinning gains nothing.
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', '30000')
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # as for stderr: an unprintable name must not stop a run
    try:
        status = commands.run_command(
            'basicsr', arguments, DESCRIPTION, COMMANDS, lambda name: importlib.import_module(f'ast_plugin.cli.{name}')
        )
        if sys.stdout is not None:  # it is None if it is closed
            sys.stdout.flush()
        return status
    except PluginError as error:
        say(*f'basicsr: error: {error}'.split('\n'), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say('basicsr: interrupted', file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader closed the pipe (`basicsr list | head`). Without this, Python reports it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        # A path that is too long, not permitted, and so on. Missing files are reported before, so FileNotFoundError is
        # a bug of the plugin.
        if isinstance(error.filename, int | None) or isinstance(error, FileNotFoundError):
            raise
        say(f'basicsr: error: {os.fsdecode(error.filename)}: {error.strerror}', file=sys.stderr)
        return 2
