"""Helpers shared by the commands: listing and running them, and their common arguments."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ast_plugin import __version__
from ast_plugin.errors import OptionError, did_you_mean
from ast_plugin.names import to_columns

DEVICES = 'cpu, cuda, cuda:1 ..., mps, or auto: the first available of cuda, mps, cpu'

if TYPE_CHECKING:
    from ast_plugin.models.training_run import Run


def run_command(
    prog: str,
    arguments: Sequence[str],
    description: str | None,
    summaries: Mapping[str, str],
    load: Callable[[str], Any],
) -> int:
    """Run the command that the first argument names, or print help; return the exit status.

    Args:
        prog: the words before the command.
        arguments: the words after them.
        description: help text of `prog`.
        summaries: a line about each command.
        load: returns the command of a name: its docstring is the help text, and it has `add_arguments(parser)` and
            `run(args) -> int`, or `run_command(arguments) -> int` if it has commands itself.
    """
    name, *rest = arguments or ['']
    if name in summaries:
        command = load(name)
        if hasattr(command, 'run_command'):
            return command.run_command(rest)
        parser = _make_parser(f'{prog} {name}', command.__doc__)
        command.add_arguments(parser)
        return command.run(parser.parse_args(rest))
    parser = _make_parser(prog, description, usage=f'{prog} COMMAND ...')
    hint = f'`{prog} COMMAND --help` shows arguments and examples of a command.'
    parser.epilog = '\n'.join(['commands:', *to_columns(summaries.items(), indent='  '), '', hint])
    parser.add_argument('--version', action='version', version=f'basicsr (ast_plugin {__version__})')
    if name and not name.startswith('-'):
        known = f'{did_you_mean(name, summaries)} (available: {", ".join(summaries)})'
        parser.error(f'unknown command {name}{known}')
    parser.parse_args(arguments)
    parser.print_help(sys.stderr)
    return 2


def _make_parser(prog: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog,
        description=inspect.cleandoc(description or ''),  # there are no docstrings with -OO
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise OptionError if an argument is given and is less than the value stated for its name."""
    for name, number in least.items():
        value = getattr(args, name)
        if value is not None and value < number:
            raise OptionError(f'--{name.replace("_", "-")} is {value}: expected {number} or more')


def add_file_arguments(parser: argparse.ArgumentParser, is_needed: bool = True) -> None:
    """Declare `-opt`, `--root`, `--force_yml` and `--device`."""
    parser.add_argument(
        '-opt',
        '--opt',
        required=is_needed,
        metavar='FILE',
        help='option file, or the name of a shipped option file (`basicsr options` lists them)',
    )
    parser.add_argument(
        '--root',
        default='.',
        metavar='DIR',
        help='write experiments/, results/ and tb_logger/ under DIR (default: working directory)',
    )
    parser.add_argument(
        '--force_yml',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY:SUB=VALUE',
        help='override options of the file, stages and networks: train:total_epochs=1 datasets:train:gt_size=64',
    )
    parser.add_argument(
        '--device',
        dest='force_yml',
        action='append',
        type='device={}'.format,
        metavar='NAME',
        help='cpu, cuda, mps, or auto: the first available of cuda, mps, cpu; overrides device of the option file',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr train` and `basicsr test`: BasicSR's flags, `--root`, `--stage`, `--device`."""
    add_file_arguments(parser)
    parser.add_argument('--stage', metavar='N', help='run only this stage of the option file, by number or name')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm'],
        default='none',
        help='job launcher of distributed runs (default: none)',
    )
    parser.add_argument('--debug', action='store_true', help="BasicSR's debug mode: log, save and validate often")
    # Old versions of torch.distributed.launch pass it. The local rank is read from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_weights_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Declare `--task`, `--weights`, `-opt` and `--param-key`.

    Args:
        default: description of the behaviour without weights; None makes `--task` or `--weights` required.
    """
    which = parser.add_mutually_exclusive_group(required=default is None)
    otherwise = '' if default is None else f' (default: {default})'
    which.add_argument('--task', metavar='NAME', help=f'use the bundled weights for rain, raindrop or haze{otherwise}')
    which.add_argument('--weights', metavar='FILE', help='weights file, .safetensors or .pth; or the name of a task')
    parser.add_argument(
        '-opt',
        metavar='FILE',
        help='option file with the network_g of the weights (default: detected from the weights file)',
    )
    parser.add_argument('--param-key', metavar='KEY', help='key of the weights in a .pth file, such as params_ema')


def check_weights_arguments(args: argparse.Namespace) -> None:
    """Raise OptionError if `-opt` or `--param-key` is given without `--weights`."""
    if args.weights is None and (args.opt or args.param_key):
        raise OptionError('-opt and --param-key require --weights FILE')


def read_network(name: str) -> dict[str, Any]:
    """Return `network_g` of an option file, given by path or name; raise OptionError if it has none."""
    from ast_plugin import options

    file = options.find(name)
    network = options.load(file).get('network_g')
    if not isinstance(network, dict) or 'type' not in network:
        raise OptionError(f'{file}: expected network_g with a type and arguments')
    return network


def read_run(args: argparse.Namespace, *, is_train: bool | None) -> Run:
    """Read and check the option file given by the arguments; see `ast_plugin.models.training_run.read_run`."""
    from ast_plugin import options

    options.find(args.opt)  # report a wrong name before importing BasicSR, which takes seconds
    from ast_plugin.models import training_run

    training_run.check_launcher(getattr(args, 'launcher', 'none'))
    is_debug = getattr(args, 'debug', False)
    return training_run.read_run(args.opt, args.force_yml, is_train=is_train, root=args.root, is_debug=is_debug)
