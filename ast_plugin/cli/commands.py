"""Helpers shared by the commands: listing and running them, and their common arguments."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ast_plugin.errors import OptionError, did_you_mean
from ast_plugin.names import to_columns

DEVICES = 'cpu, cuda, cuda:1 ..., mps, or auto: the first available of cuda, mps, cpu'

if TYPE_CHECKING:
    from ast_plugin.models.training_run import Run


def format_commands(commands: Mapping[str, str], prog: str) -> str:
    """Return the list of commands with their summaries, for the end of the help text of `prog`."""
    hint = f'`{prog} COMMAND --help` shows arguments and examples of a command.'
    return '\n'.join(['commands:', *to_columns(commands.items(), indent='  '), '', hint])


def describe_unknown(name: str, commands: Mapping[str, str]) -> str:
    """Return the error message for an unknown command."""
    return f'unknown command {name}{did_you_mean(name, commands)} (available: {", ".join(commands)})'


def run_module(module_name: str, prog: str, arguments: Sequence[str]) -> int:
    """Parse `arguments`, run the module of this package with them, and return its exit status."""
    module = importlib.import_module(f'ast_plugin.cli.{module_name}')
    parser = argparse.ArgumentParser(
        prog=prog, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))


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
