"""Runs of an option file: reading and preparing them, their folders and initial weights, and running BasicSR."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from basicsr.utils import logger as basicsr_logger
from basicsr.utils import misc, set_random_seed
from basicsr.utils.dist_util import get_dist_info, init_dist

from ast_plugin import checkpoints, options
from ast_plugin.archs.networks import input_channels
from ast_plugin.checkpoints import newest_whole, read_checkpoint, read_state
from ast_plugin.errors import (
    CheckpointError,
    OptionError,
    PluginError,
    TrainingError,
    did_you_mean,
    first_line,
    only_warn,
    warned,
)
from ast_plugin.files import lock_folder, write_file
from ast_plugin.models import preflight
from ast_plugin.models.processes import RunStopped, catch_signals, failing_together, leave, received_signal
from ast_plugin.models.restoration_model import RestorationModel
from ast_plugin.models.run_log import RunLog, close_bars
from ast_plugin.ops import use_backend
from ast_plugin.options import Stage, safe_yaml, validation
from ast_plugin.options.reading import BASE_KEY, NETWORKS_KEY, STAGES_KEY, Sources
from ast_plugin.options.sections import Dataset, Registered

WEIGHTS = ('net_g_best.pth', 'net_g_latest.pth')
"""Weights of a finished run in its folder `models`, best first; net_g_ITERATION.pth are saved as well."""

_LAUNCHERS = {
    'none': ('', ''),
    'pytorch': ('RANK WORLD_SIZE MASTER_ADDR MASTER_PORT', 'torchrun --nproc_per_node=N -m ast_plugin …'),
    'slurm': ('SLURM_PROCID SLURM_NTASKS SLURM_NODELIST', 'srun python -m ast_plugin …'),
}
_FINISHED = 'finished.json'
_PATIENCE = 10.0  # seconds to wait for the data workers of a killed run, which notice its end with a delay
# Dataset options that affect only loading; the number of samples does not depend on them.
_LOADING = Dataset.model_fields.keys() - {'type', 'name', 'io_backend', 'phase', 'scale'}


@dataclass(frozen=True)
class Run:
    """Validated option file with its stages and the root of its outputs."""

    file: Path
    opt: dict[str, Any]
    stages: list[Stage]
    registered: Registered
    is_train: bool
    root: Path
    is_debug: bool = False
    _num_samples: dict[str, int] = field(default_factory=dict)

    def experiment(self, stage: Stage | None = None) -> Path:
        """Return the folder of the experiment or of one of its stages."""
        folder = self.root / 'experiments' / options.run_name(self.opt, self.is_debug)
        return folder / stage.name if stage is not None and stage.name else folder

    def source(self, stage: Stage) -> str:
        """Return the prefix of messages about a stage."""
        return str(self.file) if stage.name is None else f'{self.file}: {stage.name}'

    def select(self, name: str | None) -> list[Stage]:
        """Return the stage with this name or number, or all stages for None; raise OptionError if there is none."""
        if name is None:
            return self.stages
        names = [stage.name for stage in self.stages if stage.name]
        if not names:
            raise OptionError(f'--stage {name}: {self.file} has no stages')
        for stage in self.stages:
            if name in (stage.name, str(stage.number)):
                return [stage]
        raise OptionError(
            f'--stage {name}: expected a number from 1 to {len(names)}, or one of {", ".join(names)}'
            f'{did_you_mean(name, names)}'
        )

    def prepare(self, stage: Stage, **given: Any) -> dict[str, Any]:
        """Return the options of a stage for BasicSR's pipelines; raise DataError if its data cannot be read."""

        def length_of(dataset: Mapping[str, Any]) -> int:
            # The training set is listed once for stages that differ only in batches and patches.
            key = json.dumps({name: value for name, value in dataset.items() if name not in _LOADING}, default=repr)
            if key not in self._num_samples:
                where = f'{self.source(stage)}: datasets.train'
                self._num_samples[key] = preflight.count_samples(where, dataset)
            return self._num_samples[key]

        return options.prepare(
            stage.opt,
            root=self.root,
            is_train=self.is_train,
            debug=self.is_debug,
            dataset_types=self.registered.by_kind['dataset'],
            stage=stage.name,
            channels_of=input_channels,
            **{'length_of': length_of, **given},
        )

    def resolved(self) -> dict[str, Any]:
        """Return an equivalent option file in which every stage lists all of its options."""
        if self.stages[0].name is None:
            return self.opt
        stages = [{**stage.opt, 'name': stage.name} for stage in self.stages]
        return {'name': self.opt['name'], STAGES_KEY: stages}


def read_run(
    name: str | Path,
    overrides: Iterable[str] = (),
    *,
    is_train: bool | None,
    root: str | Path = '.',
    is_debug: bool = False,
) -> Run:
    """Read and validate an option file; raise OptionError if it has errors.

    Args:
        name: a path, or the name of a shipped file.
        overrides: values of `--force_yml`.
        is_train: for training or for testing; None for training if the file has a section `train`.
        root: root folder of all outputs.
        is_debug: BasicSR's debug mode.
    """
    file = options.find(name)
    opt = options.load(file, overrides)
    if NETWORKS_KEY in opt:
        raise OptionError(f'{file}: compares several networks; run it with `basicsr compare -opt {name}`')
    registered = preflight.load_registered()
    if is_train is None:
        entries = opt.get(STAGES_KEY)
        parts = [opt, *(entries if isinstance(entries, list) else ())]
        is_train = any(isinstance(part, dict) and 'train' in part for part in parts)
    explain = Sources(file, overrides).explain
    validation.check(opt, str(file), registered, is_train=is_train, explain=explain)
    root = Path(os.path.expanduser(root)).resolve()
    return Run(file, opt, options.expand(opt), registered, is_train, root, is_debug)


def check_launcher(launcher: str) -> None:
    """Raise OptionError if the environment variables do not fit the launcher."""
    if launcher == 'none' and os.environ.get('WORLD_SIZE', '1') != '1' and 'RANK' in os.environ:
        raise OptionError(
            f'this is one of {os.environ["WORLD_SIZE"]} processes (WORLD_SIZE), and all would write to the same '
            'folder independently: add `--launcher pytorch`, or start one process without torchrun'
        )
    names, command = _LAUNCHERS[launcher]
    missing = [name for name in names.split() if name not in os.environ]
    if missing:
        raise OptionError(
            f'--launcher {launcher}: {", ".join(missing)} not set in the environment; '
            f'start the processes by `{command}`'
        )


@contextmanager
def join_processes(run: Run, launcher: str) -> Iterator[dict[str, Any]]:
    """Initialize distributed training, if any, for all stages; yield the process arguments of `Run.prepare`."""
    is_distributed = launcher != 'none'
    if is_distributed:
        # A run on CPUs uses gloo even on machines with GPUs.
        is_on_cpu = run.opt.get('device') == 'cpu' or run.opt.get('num_gpu') == 0
        backend = {'backend': 'gloo'} if is_on_cpu else {}
        init_dist(launcher, **backend, **((run.opt.get('dist_params') or {}) if launcher == 'slurm' else {}))
    try:
        with failing_together():
            rank, world_size = get_dist_info()
            for stage in run.stages:
                if is_distributed and stage.opt.get('manual_seed') is None:
                    stage.opt['manual_seed'] = _of_first_process(random.SystemRandom().randint(1, 10000))
            yield {'rank': rank, 'world_size': world_size, 'dist': is_distributed}
    finally:
        leave()


@contextmanager
def hand_over(module: ModuleType, opt: dict[str, Any], run: Run, stage: Stage) -> Iterator[None]:
    """Set the seeds and pass `opt` to BasicSR's pipeline in `module` instead of letting it parse the command line."""
    _close_logger()  # one that is already in use in this process would get no log file
    warned.clear()
    set_random_seed(opt['manual_seed'] + opt['rank'])
    with tempfile.TemporaryDirectory() as folder, use_backend(opt.get('backend')):
        # BasicSR copies the option file into the experiment, possibly after renaming the folder that contains it.
        copy = Path(folder, run.file.name)
        copy.write_bytes(_self_contained(run, stage, opt))
        parsed = opt, argparse.Namespace(opt=str(copy))
        try:
            with patch.object(module, 'parse_options', lambda root_path, is_train=True: parsed):
                yield
        finally:
            close_bars()
            _close_logger()
            wandb = sys.modules.get('wandb')
            if wandb is not None and getattr(wandb, 'run', None) is not None:
                with only_warn('the end of the run was not sent to W&B'):
                    wandb.finish(exit_code=int(sys.exc_info()[0] is not None))
            # Schedules and optimisers form reference cycles, which would keep memory allocated during the next stage.
            gc.collect()
            torch.cuda.empty_cache()


@contextmanager
def _lock_and_save_on_error(module: ModuleType, folder: Path | None) -> Iterator[None]:
    """Lock the experiment's folder while BasicSR's pipeline in `module` runs, and save if it ends with an error.

    Args:
        module: its `build_model` is called once the folder exists.
        folder: the experiment's folder; None in all processes except the first.
    """
    build, built = module.build_model, []
    with ExitStack() as held:

        def build_model(opt: dict[str, Any]) -> Any:
            held.enter_context(_lock(folder))
            built.append(build(opt))
            return built[0]

        try:
            with patch.object(module, 'build_model', build_model):
                yield
        except Exception as error:
            iteration = 0
            with suppress(Exception):  # the disk may be what failed
                iteration = built[0].save_unsaved(getattr(error, 'is_of_loading', False))
            saved = f'. Iteration {iteration} is saved; fix the cause, resume with --auto_resume' if iteration else ''
            if isinstance(error, PluginError):
                error.args = (f'{error}{saved}',)
            elif str(error).startswith('DataLoader worker'):
                raise TrainingError(
                    f'a data worker is gone: {first_line(error)} Lower datasets.train.num_worker_per_gpu '
                    f'(0 loads in the training process), or provide more memory (docker: --shm-size){saved}'
                ) from error
            raise
        finally:
            for model in built:  # not only at exit, when another run may have continued the table
                getattr(model, 'run_log', RunLog(None)).flush()


def _lock(folder: Path | None) -> AbstractContextManager:
    """Lock a folder if it exists; raises FileError if it is already locked."""
    if folder is None or not folder.exists():
        return nullcontext()
    return lock_folder(folder, 'another training with this name is running there', _PATIENCE)


def _self_contained(run: Run, stage: Stage, opt: Mapping[str, Any]) -> bytes:
    """Return the option file, with inherited options and those of the stage resolved if it has any."""
    if stage.name is None and BASE_KEY not in safe_yaml.read_file(run.file):
        return run.file.read_bytes()
    resolved = {**stage.opt, 'name': opt['name']}
    starts = {key: value for key, value in opt['path'].items() if key.startswith('pretrain_network_') and value}
    if starts:
        resolved['path'] = {**(stage.opt.get('path') or {}), **starts}
    return f'# From {run.source(stage)}\n{safe_yaml.write_text(resolved)}'.encode()


def _close_logger() -> None:
    """Close BasicSR's logger, whose files belong to one run; the next run or stage creates its own."""
    root = logging.getLogger('basicsr')
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    basicsr_logger.initialized_logger.pop('basicsr', None)


def _of_first_process(value: Any) -> Any:
    """Return the value of the first process in all processes, which must all call this."""
    values = [value]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


class Training:
    """Sequential training of stages; `say` receives a line about the start of each stage."""

    def __init__(
        self, run: Run, stages: list[Stage], auto_resume: bool, say: Callable[[str], None], force_resume: bool = False
    ) -> None:
        self.run, self.stages, self.auto_resume, self.say = run, stages, auto_resume, say
        self.force_resume = force_resume
        self.is_first = True  # whether this is the process of rank 0

    def check(self) -> None:
        """Check everything that the remaining stages need, including the initial weights of the first of them."""
        before: dict[str, Any] | None = None
        has_begun = False
        for stage in self.stages:
            opt = self._prepare(stage)
            if has_begun or not self._is_finished(stage, opt):
                if not has_begun:
                    opt['path'].update(self._find_start(stage, opt)[0])
                check_stage(self.run, stage, opt, before if has_begun else None)
                has_begun = True
            before = opt

    def __call__(self, process: Mapping[str, Any]) -> None:
        """Train with the process arguments of `join_processes`; raise RunStopped on a stop signal."""
        import basicsr.train

        self.is_first = process['rank'] == 0
        folder = self.run.experiment() if self.is_first else None
        with _lock(folder):
            pass  # fails before anything is renamed
        if self.stages[0].name is not None and self.stages is self.run.stages and not self.auto_resume:
            self._archive(self.run.experiment())
        for stage in self.stages:
            opt = self._prepare(stage, **process)
            if _of_first_process(self._is_finished(stage, opt)):
                self._log(f'{stage.name} is finished: {self.run.experiment(stage)}')
                continue
            paths, line = _of_first_process(self._find_start(stage, opt) if self.is_first else None)
            opt['path'].update(paths)
            self._log(line)
            self._log(_shortened_warmup(stage, opt))
            for later in self.run.stages[stage.number :]:
                # Later stages started from weights that are about to be replaced.
                self._archive(self.run.experiment(later))
            # Models of BasicSR do not save on signals, so these end them at once.
            with catch_signals() if preflight.is_model_of(opt, RestorationModel) else nullcontext():
                with hand_over(basicsr.train, opt, self.run, stage), _lock_and_save_on_error(basicsr.train, folder):
                    basicsr.train.train_pipeline(str(self.run.root))
                if stage.name is not None and self.is_first:
                    mark_finished(self.run.experiment(stage), opt['train']['total_iter'])
                # A signal after the last iteration of a stage.
                if stage is not self.stages[-1] and (number := _of_first_process(received_signal())):
                    raise RunStopped(number, opt['train']['total_iter'])

    def _prepare(self, stage: Stage, **process: Any) -> dict[str, Any]:
        """Return the options of a stage; a missing seed is taken from the resumed state."""
        if stage.opt.get('manual_seed') is None:
            state = newest_whole(self.run.experiment(stage) / 'training_states') if self.auto_resume else None
            state = state or Path(os.path.expanduser((stage.opt.get('path') or {}).get('resume_state') or ''))
            if state.is_file():
                stage.opt['manual_seed'] = (read_state(state).get('options') or {}).get('manual_seed')
        return {**self.run.prepare(stage, **process), 'force_resume': self.force_resume}

    def _is_finished(self, stage: Stage, opt: Mapping[str, Any]) -> bool:
        can_be_passed_over = stage.name is not None and self.auto_resume
        return can_be_passed_over and is_finished(self.run.experiment(stage), opt['train']['total_iter'])

    def _find_start(self, stage: Stage, opt: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Return the entries of `path` that define the start of a stage, and a line for the log."""
        state = newest_whole(opt['path']['training_states']) if self.auto_resume else None
        if state is not None:
            is_other = opt['path'].get('resume_state') and str(state) != str(opt['path']['resume_state'])
            what = 'path.resume_state is ignored: --auto_resume' if is_other else stage.name
            return {'resume_state': str(state)}, f'{what} resumes from {state}' if what else ''
        if stage.number == 1 or stage.has_own_start or opt['path'].get('resume_state'):
            return {}, ''
        before = self.run.stages[stage.number - 2]
        folder = self.run.experiment(before)
        weights = find_weights(folder)
        if weights is None:
            raise CheckpointError(
                f'{stage.name} starts from the weights of {before.name}, but {folder / "models"} holds neither '
                f'{" nor ".join(WEIGHTS)}; train that stage first (`basicsr train -opt {self.run.file} '
                f'--stage {before.number}`) or set stages.{stage.number - 1}.path.pretrain_network_g'
            )
        what = 'the best' if weights.name == WEIGHTS[0] else 'the latest (no best ones exist)'
        line = f'{stage.name} starts from {what} weights of {before.name}: {weights}'
        return {'pretrain_network_g': str(weights), 'param_key_g': read_checkpoint(weights).param_key}, line

    def _archive(self, folder: Path) -> None:
        """Rename a folder in the same way as BasicSR renames an older run."""
        if not self.is_first or not folder.exists():
            return
        try:
            misc.mkdir_and_rename(str(folder))
            folder.rmdir()  # created again when its run starts
        except OSError as error:
            raise OptionError(f'{folder}: cannot be renamed: {error.strerror}; choose another --root') from error

    def _log(self, line: str) -> None:
        if self.is_first and line:
            self.say(line)


def check_stage(
    run: Run, stage: Stage, opt: dict[str, Any], before: Mapping[str, Any] | None, is_run: bool = True
) -> None:
    """Check all that a stage needs, see `preflight.check`.

    Args:
        before: options of the previous stage if that has not been trained yet.
    """
    if before is not None and not stage.has_own_start:
        opt['path']['pretrain_network_g'] = None
        preflight.check_handover(before, opt, run.source(stage))
    preflight.check(opt, run.source(stage), is_run)


def _shortened_warmup(stage: Stage, opt: Mapping[str, Any]) -> str:
    """Return a note if the run is too short for the configured warm-up, else an empty string."""
    wanted, given = ((o['train'].get('scheduler') or {}).get('warmup_epochs') for o in (stage.opt, opt))
    if wanted == given:
        return ''
    epochs = stage.opt['train']['total_epochs']
    return f'train.scheduler: {wanted} warm-up epochs do not fit into {epochs}; using {given}'


def find_weights(experiment: Path) -> Path | None:
    """Return the best weights of a run, else the newest, else None.

    Numbered weights of a killed run may be newer than the `latest` ones of an earlier end.
    """
    best, latest = (experiment / 'models' / name for name in WEIGHTS)
    numbered = sorted(checkpoints.numbered_files(experiment / 'models', checkpoints.WEIGHTS).items())
    newest = [path for path in (latest, *(path for _, path in numbered[-1:])) if path.is_file()]
    return best if best.is_file() else max(newest, key=lambda path: path.stat().st_mtime_ns, default=None)


def mark_finished(experiment: Path, total_iter: int) -> None:
    """Mark a run as finished; `is_finished` checks for this mark."""
    write_file(experiment / _FINISHED, json.dumps({'total_iter': total_iter}).encode())


def is_finished(experiment: Path, total_iter: int) -> bool:
    """Return whether a run of at least `total_iter` iterations is marked as finished and has weights."""
    try:
        done = json.loads((experiment / _FINISHED).read_text(encoding='utf-8'))['total_iter']
        return done >= total_iter and find_weights(experiment) is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False
