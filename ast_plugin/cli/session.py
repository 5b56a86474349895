"""What `basicsr train` and `basicsr test` share: from their arguments to BasicSR's pipeline with checked options."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ast_plugin.errors import OptionError

if TYPE_CHECKING:
    from ast_plugin.schema import Registered

_LAUNCHERS = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
}
_STARTED_BY = {'pytorch': 'torchrun --nproc_per_node=N -m ast_plugin …', 'slurm': 'srun python -m ast_plugin …'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare BasicSR's flags, and `--root`."""
    parser.add_argument(
        '-opt',
        '--opt',
        required=True,
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
        help='change options of the file: train:total_iter=1000 datasets:train:gt_size=64',
    )
    parser.add_argument('--launcher', choices=['none', *_LAUNCHERS], default='none', help='how processes were started')
    parser.add_argument('--debug', action='store_true', help="BasicSR's debug mode: report and validate often")
    # Launchers of the past pass it; where this process runs is read from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


@dataclass(frozen=True)
class Session:
    """Options that were found right, and what they were checked against."""

    args: argparse.Namespace
    file: Path
    opt: dict[str, Any]
    registered: Registered
    is_train: bool

    @property
    def root(self) -> Path:
        """The folder under which outputs go."""
        return Path(os.path.expanduser(self.args.root)).resolve()

    def prepare(self, **process: Any) -> dict[str, Any]:
        """The options as BasicSR's pipelines expect them; see `ast_plugin.options.prepare`."""
        from ast_plugin import options

        return options.prepare(
            self.opt,
            root=self.root,
            is_train=self.is_train,
            debug=self.args.debug,
            dataset_types=self.registered.by_kind['dataset'],
            **process,
        )


def read(args: argparse.Namespace, *, is_train: bool) -> Session:
    """Read and check the option file that the arguments name.

    Raises:
        OptionError: for whatever is wrong with arguments or file.
    """
    from ast_plugin import options

    _check_launcher(args.launcher)
    file = options.find(args.opt)
    opt = options.load(file, args.force_yml)
    from ast_plugin import schema
    from ast_plugin.cli import registries

    registered = registries.load()
    schema.check(opt, str(file), registered, is_train=is_train)
    return Session(args, file, opt, registered, is_train)


@contextmanager
def started(session: Session) -> Iterator[dict[str, Any]]:
    """Join the other processes, if there are any, and seed. Gives what `Session.prepare` does, for this process."""
    from basicsr.utils import set_random_seed
    from basicsr.utils.dist_util import get_dist_info, init_dist

    launcher = session.args.launcher
    is_distributed = launcher != 'none'
    if is_distributed:
        init_dist(launcher, **((session.opt.get('dist_params') or {}) if launcher == 'slurm' else {}))
    try:
        rank, world_size = get_dist_info()
        opt = session.prepare(rank=rank, world_size=world_size, dist=is_distributed)
        if is_distributed and session.opt.get('manual_seed') is None:
            session.opt['manual_seed'] = _of_first_process(opt['manual_seed'])
            opt = session.prepare(rank=rank, world_size=world_size, dist=is_distributed)
        set_random_seed(opt['manual_seed'] + rank)
        yield opt
    finally:
        if is_distributed:
            import torch.distributed

            torch.distributed.destroy_process_group()


@contextmanager
def handed_over(module: ModuleType, opt: dict[str, Any], file: Path) -> Iterator[None]:
    """Let BasicSR's pipeline in `module` receive `opt` where it would read the command line itself."""
    with tempfile.TemporaryDirectory() as folder:
        # BasicSR copies the option file into the experiment, after it may have renamed the folder that it lies in.
        copy = Path(shutil.copyfile(file, Path(folder, file.name)))
        original = module.parse_options
        module.parse_options = lambda root_path, is_train=True: (opt, argparse.Namespace(opt=str(copy)))
        try:
            yield
        finally:
            module.parse_options = original


def _check_launcher(launcher: str) -> None:
    missing = [name for name in _LAUNCHERS.get(launcher, ()) if name not in os.environ]
    if missing:
        raise OptionError(
            f'--launcher {launcher}: {", ".join(missing)} not set in the environment; '
            f'start the processes by `{_STARTED_BY[launcher]}`'
        )


def _of_first_process(value: int) -> int:
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
