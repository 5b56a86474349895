"""What commands share: being listed and run, and the arguments that say which option file is meant."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ast_plugin.errors import OptionError, did_you_mean
from ast_plugin.names import to_columns

DEVICES = 'cpu, cuda, cuda:1 ..., mps, or auto: the first there is of cuda, mps, cpu'

if TYPE_CHECKING:
    from ast_plugin.models.training_run import Run


def listed(commands: Mapping[str, str]) -> str:
    """A line for each command with what it is for, as helps end with."""
    return '\n'.join(['commands:', *to_columns(commands.items(), indent='  ')])


def unknown(name: str, commands: Mapping[str, str]) -> str:
    """Why there is no such command, and which there are."""
    return f'no command {name}{did_you_mean(name, commands)} (there are {", ".join(commands)})'


def run_module(module_name: str, prog: str, arguments: Sequence[str]) -> int:
    """Run a module of this package on the arguments behind `prog`; return its exit status."""
    module = importlib.import_module(f'ast_plugin.cli.{module_name}')
    parser = argparse.ArgumentParser(
        prog=prog, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))


def add_file_arguments(parser: argparse.ArgumentParser, is_needed: bool = True) -> None:
    """Declare what says which options are meant, `--root` and `--device`."""
    parser.add_argument(
        '-opt',
        '--opt',
        required=is_needed,
        metavar='FILE',
        help='option file, or the name of a shipped one (`basicsr options` lists them)',
    )
    parser.add_argument(
        '--root',
        default='.',
        metavar='DIR',
        help='write experiments/, results/ and tb_logger/ under DIR instead of the working directory',
    )
    parser.add_argument(
        '--force_yml',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY:SUB=VALUE',
        help='change options of the file, in all of its stages: train:total_epochs=1 datasets:train:gt_size=64',
    )
    parser.add_argument(
        '--device',
        dest='force_yml',
        action='append',
        type='device={}'.format,
        metavar='NAME',
        help="cpu, cuda, mps, or auto: the first there is of cuda, mps, cpu; instead of the file's device",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare BasicSR's flags, and ours."""
    add_file_arguments(parser)
    parser.add_argument('--stage', metavar='N', help='this stage of the file alone, by its number or name')
    parser.add_argument(
        '--launcher', choices=['none', 'pytorch', 'slurm'], default='none', help='how processes were started'
    )
    parser.add_argument('--debug', action='store_true', help="BasicSR's debug mode: report and validate often")
    # Launchers of the past pass it; where this process runs is read from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def add_weights_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Declare what says which weights are meant; a `default` says what is done without, else they are required."""
    which = parser.add_mutually_exclusive_group(required=default is None)
    otherwise = '' if default is None else f' (default: {default})'
    which.add_argument(
        '--task', metavar='NAME', help=f'rain, raindrop or haze: take the weights that come along{otherwise}'
    )
    which.add_argument('--weights', metavar='FILE', help='trained weights, .safetensors or .pth; or a task')
    parser.add_argument(
        '-opt', metavar='FILE', help='option file whose network_g the weights are of; by default the weights file tells'
    )
    parser.add_argument('--param-key', metavar='KEY', help='where a .pth file holds the weights, such as params_ema')


def check_weights_arguments(args: argparse.Namespace) -> None:
    """Raise OptionError where a weights file is described and none given."""
    if args.weights is None and (args.opt or args.param_key):
        raise OptionError('-opt and --param-key describe a weights file: expected --weights FILE with them')


def read_network(name: str) -> dict[str, Any]:
    """The options of the network of an option file, by its path or its name; raise OptionError if it has none."""
    from ast_plugin import options

    file = options.find(name)
    network = options.load(file).get('network_g')
    if not isinstance(network, dict) or 'type' not in network:
        raise OptionError(f'{file}: expected network_g with a type and its arguments')
    return network


def read_run(args: argparse.Namespace, *, is_train: bool | None) -> Run:
    """Read and check the option file that the arguments name; see `ast_plugin.models.training_run.read_run`."""
    from ast_plugin import options

    options.find(args.opt)  # a wrong name is told before BasicSR is imported, which takes seconds
    from ast_plugin.models import training_run

    training_run.check_launcher(getattr(args, 'launcher', 'none'))
    is_debug = getattr(args, 'debug', False)
    return training_run.read_run(args.opt, args.force_yml, is_train=is_train, root=args.root, is_debug=is_debug)
