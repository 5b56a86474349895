"""What `basicsr train`, `test` and `check` share: from their arguments to BasicSR's pipeline with checked options."""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ast_plugin.errors import OptionError, did_you_mean

if TYPE_CHECKING:
    from ast_plugin.options.stages import Stage
    from ast_plugin.schema import Registered

_LAUNCHERS = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_NODELIST'),
}
_STARTED_BY = {'pytorch': 'torchrun --nproc_per_node=N -m ast_plugin …', 'slurm': 'srun python -m ast_plugin …'}


# What loaders read of a dataset's options: how many samples there are does not depend on it.
_LOADING = {
    'batch_size_per_gpu',
    'num_worker_per_gpu',
    'dataset_enlarge_ratio',
    'prefetch_mode',
    'num_prefetch_queue',
    'pin_memory',
    'persistent_workers',
}


def add_file_arguments(parser: argparse.ArgumentParser, is_needed: bool = True) -> None:
    """Declare what says which options are meant, and `--root`."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare BasicSR's flags, and ours."""
    add_file_arguments(parser)
    parser.add_argument('--stage', metavar='N', help='this stage of the file alone, by its number or name')
    parser.add_argument('--launcher', choices=['none', *_LAUNCHERS], default='none', help='how processes were started')
    parser.add_argument('--debug', action='store_true', help="BasicSR's debug mode: report and validate often")
    # Launchers of the past pass it; where this process runs is read from the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


@dataclass(frozen=True)
class Session:
    """Options that were found right, and what they were checked against.

    Attributes:
        args: the arguments of the command.
        file: the option file.
        opt: what it says.
        stages: the runs it stands for; one if it has no stages.
        registered: what names in it mean.
        is_train: for training, otherwise for testing.
    """

    args: argparse.Namespace
    file: Path
    opt: dict[str, Any]
    stages: list[Stage]
    registered: Registered
    is_train: bool
    _num_samples: dict[str, int] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder under which outputs go."""
        return Path(os.path.expanduser(self.args.root)).resolve()

    @property
    def is_debug(self) -> bool:
        """Whether BasicSR's debug mode was asked for."""
        return getattr(self.args, 'debug', False)

    def experiment(self, stage: Stage | None = None) -> Path:
        """The folder of the experiment, or of one of its stages."""
        from ast_plugin import options

        folder = self.root / 'experiments' / options.run_name(self.opt, self.is_debug)
        return folder / stage.name if stage is not None and stage.name else folder

    def source(self, stage: Stage) -> str:
        """What messages about a stage begin with."""
        return str(self.file) if stage.name is None else f'{self.file}: {stage.name}'

    def chosen(self) -> list[Stage]:
        """The stages that the command is about: the one of `--stage`, or all.

        Raises:
            OptionError: if there is no such stage.
        """
        wanted = self.args.stage
        if wanted is None:
            return self.stages
        names = [stage.name for stage in self.stages if stage.name]
        if not names:
            raise OptionError(f'--stage {wanted}: {self.file} has no stages')
        chosen = [stage for stage in self.stages if wanted in (stage.name, str(stage.number))]
        if not chosen:
            raise OptionError(
                f'--stage {wanted}: expected a number from 1 to {len(names)}, or a name of {", ".join(names)}'
                f'{did_you_mean(wanted, names)}'
            )
        return chosen[:1]

    def prepare(self, stage: Stage, **given: Any) -> dict[str, Any]:
        """The options of a stage as BasicSR's pipelines expect them; see `ast_plugin.options.prepare`.

        Raises:
            DataError: if the training set, whose length epochs are counted by, cannot be used.
        """
        from ast_plugin import options

        def length_of(dataset: Mapping[str, Any]) -> int:
            return self._length(f'{self.source(stage)}: datasets.train', dataset)

        return options.prepare(
            stage.opt,
            root=self.root,
            is_train=self.is_train,
            debug=self.is_debug,
            dataset_types=self.registered.by_kind['dataset'],
            stage=stage.name,
            **{'length_of': length_of, **given},
        )

    def _length(self, where: str, dataset: Mapping[str, Any]) -> int:
        """Length of a training set. Stages that differ in batches and patches alone have it listed once."""
        from ast_plugin.cli import preflight

        key = json.dumps({name: value for name, value in dataset.items() if name not in _LOADING}, default=repr)
        if key not in self._num_samples:
            self._num_samples[key] = preflight.count_samples(where, dataset, self.registered)
        return self._num_samples[key]


def read(args: argparse.Namespace, *, is_train: bool | None) -> Session:
    """Read and check the option file that the arguments name.

    Args:
        args: of the command.
        is_train: for training or for testing; None for training where the file speaks of it.
    Raises:
        OptionError: for whatever is wrong with arguments or file.
    """
    from ast_plugin import options
    from ast_plugin.options import comparison, stages

    _check_launcher(getattr(args, 'launcher', 'none'))
    file = options.find(args.opt)
    opt = options.load(file, args.force_yml)
    if comparison.ENTRIES in opt:
        raise OptionError(f'{file}: a comparison of several networks: `basicsr compare -opt {args.opt}`')
    from ast_plugin import schema
    from ast_plugin.cli import registries

    registered = registries.load()
    if is_train is None:
        entries = opt.get(stages.KEY)
        is_train = any('train' in part for part in (opt, *(entries if isinstance(entries, list) else ())) if part)
    schema.check(opt, str(file), registered, is_train=is_train)
    return Session(args, file, opt, stages.expand(opt), registered, is_train)


@contextmanager
def started(session: Session) -> Iterator[dict[str, Any]]:
    """Join the other processes, if there are any, for all stages. Gives what `Session.prepare` asks of the process."""
    from basicsr.utils.dist_util import get_dist_info, init_dist

    from ast_plugin.models.processes import failing_together, leave

    is_distributed = session.args.launcher != 'none'
    if is_distributed:
        init_dist(session.args.launcher, **_process_options(session))
    try:
        with failing_together():
            rank, world_size = get_dist_info()
            for stage in session.stages:
                if is_distributed and stage.opt.get('manual_seed') is None:
                    stage.opt['manual_seed'] = of_first_process(random.SystemRandom().randint(1, 10000))
            yield {'rank': rank, 'world_size': world_size, 'dist': is_distributed}
    finally:
        leave()


def _process_options(session: Session) -> dict[str, Any]:
    """Arguments of BasicSR's `init_dist`: `dist_params` under slurm, and gloo for a run on CPUs, GPUs or not."""
    given = (session.opt.get('dist_params') or {}) if session.args.launcher == 'slurm' else {}
    return {**({'backend': 'gloo'} if session.opt.get('num_gpu') == 0 else {}), **given}


@contextmanager
def handed_over(module: ModuleType, opt: dict[str, Any], session: Session, stage: Stage) -> Iterator[None]:
    """Seed, and let BasicSR's pipeline in `module` receive `opt` where it would read the command line itself.

    Its logger, whose files belong to one run, is taken down afterwards: the next stage has one of its own.
    """
    from basicsr.utils import set_random_seed

    from ast_plugin.models.progress import close_bars
    from ast_plugin.ops import use_backend

    set_random_seed(opt['manual_seed'] + opt['rank'])
    with tempfile.TemporaryDirectory() as folder, use_backend(opt.get('backend')):
        # BasicSR copies the option file into the experiment, after it may have renamed the folder that it lies in.
        copy = Path(folder, session.file.name)
        copy.write_bytes(_self_contained(session, stage, opt))
        original = module.parse_options
        module.parse_options = lambda root_path, is_train=True: (opt, argparse.Namespace(opt=str(copy)))
        try:
            yield
        finally:
            module.parse_options = original
            close_bars()
            _close_logs()


def _self_contained(session: Session, stage: Stage, opt: Mapping[str, Any]) -> bytes:
    """The option file as it is, or, where it builds on others or has stages, all that it comes to for this run."""
    from ast_plugin.options import inheritance, safe_yaml

    if stage.name is None and inheritance.BASE_KEY not in safe_yaml.read_file(session.file):
        return session.file.read_bytes()
    resolved = {**stage.opt, 'name': opt['name']}
    starts = {key: value for key, value in opt['path'].items() if key.startswith('pretrain_network_') and value}
    if starts:
        resolved['path'] = {**(stage.opt.get('path') or {}), **starts}
    return f'# From {session.source(stage)}\n{safe_yaml.write_text(resolved)}'.encode()


def _close_logs() -> None:
    import logging

    import torch
    from basicsr.utils import logger

    root = logging.getLogger('basicsr')
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    logger.initialized_logger.pop('basicsr', None)
    wandb = sys.modules.get('wandb')
    if wandb is not None and getattr(wandb, 'run', None) is not None:
        wandb.finish()
    # Schedules and optimisers hold one another: without this the next stage would find the memory of this one taken.
    gc.collect()
    torch.cuda.empty_cache()


def _check_launcher(launcher: str) -> None:
    missing = [name for name in _LAUNCHERS.get(launcher, ()) if name not in os.environ]
    if missing:
        raise OptionError(
            f'--launcher {launcher}: {", ".join(missing)} not set in the environment; '
            f'start the processes by `{_STARTED_BY[launcher]}`'
        )


def of_first_process(value: Any) -> Any:
    """What the first process says, given to all; each of them has to call this."""
    import torch.distributed

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]
