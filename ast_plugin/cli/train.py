"""Train the network of an option file, in BasicSR's training loop.

  basicsr train -opt AST_quickstart
  basicsr train -opt options/AST_derain.yml --auto_resume
  basicsr train -opt AST_derain --stage 2
  basicsr train -opt my.yml --force_yml train:total_iter=1000 datasets:train:batch_size_per_gpu=4
  torchrun --nproc_per_node=2 -m ast_plugin train -opt my.yml --launcher pytorch

Weights, states and the log go to experiments/NAME; an older run of that name is renamed, not overwritten. The stages
of a file that has some are trained one after the other, each in experiments/NAME/stage_N, from the best weights of
the one before. Everything that can be found wrong beforehand is, in all of them, before any folder is made.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ast_plugin.cli import session
from ast_plugin.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from ast_plugin.models.processes import RunStopped
    from ast_plugin.options.stages import Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr train`."""
    session.add_arguments(parser)
    parser.add_argument(
        '--auto_resume',
        action='store_true',
        help='go on from the newest state of the experiment, if there is one; finished stages are passed over',
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then let BasicSR train, stage by stage."""
    run = session.read(args, is_train=True)
    from ast_plugin.models.processes import RunStopped

    chosen = run.chosen()
    _check(run, chosen)
    with session.started(run) as process:
        if chosen[0].name is not None and args.stage is None and not args.auto_resume:
            _put_aside(run.experiment(), process)
        try:
            for stage in chosen:
                _train(run, stage, process)
        except RunStopped as stop:
            _tell_how_to_go_on(args, stop, process)
            return stop.code
    return 0


def _check(run: session.Session, chosen: list[Stage]) -> None:
    """Try everything that any of the stages will need, and the weights that the first of them starts from."""
    from ast_plugin.cli import preflight

    before: dict[str, Any] | None = None
    has_begun = False
    for stage in chosen:
        opt = run.prepare(stage)
        if has_begun or not _is_finished(run, stage, opt):
            if not has_begun:
                _find_start(run, stage, opt)
            elif not stage.has_own_start:
                opt['path']['pretrain_network_g'] = None
                preflight.check_handover(before, opt, run.registered, run.source(stage))
            preflight.check(opt, run.registered, run.source(stage))
            has_begun = True
        before = opt


def _train(run: session.Session, stage: Stage, process: dict[str, Any]) -> None:
    import basicsr.train

    from ast_plugin.models.processes import catch_signals
    from ast_plugin.options import stages

    opt = run.prepare(stage, **process)
    if session.of_first_process(_is_finished(run, stage, opt)):
        _tell(process, f'{stage.name} is finished: {run.experiment(stage)}')
        return
    paths, line = session.of_first_process(_find_start(run, stage, opt) if process['rank'] == 0 else None)
    opt['path'].update(paths)
    if line:
        _tell(process, line)
    wanted, given = ((o['train'].get('scheduler') or {}).get('warmup_epochs') for o in (stage.opt, opt))
    if wanted != given:
        epochs = stage.opt['train']['total_epochs']
        _tell(process, f'train.scheduler: {wanted} epochs of warm-up do not fit into {epochs}, {given} are taken')
    for later in run.stages[stage.number :]:
        # What they have learned rests on weights that are about to be replaced.
        _put_aside(run.experiment(later), process)
    with catch_signals(), session.handed_over(basicsr.train, opt, run, stage):
        basicsr.train.train_pipeline(str(run.root))
    if stage.name is not None and process['rank'] == 0:
        stages.mark_finished(run.experiment(stage), opt['train']['total_iter'])


def _is_finished(run: session.Session, stage: Stage, opt: dict[str, Any]) -> bool:
    from ast_plugin.options import stages

    is_finished = stages.is_finished(run.experiment(stage), opt['train']['total_iter'])
    return stage.name is not None and run.args.auto_resume and is_finished


def _find_start(run: session.Session, stage: Stage, opt: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The entries of `path` that say where a stage begins, put into `opt` as well, and a line about it.

    Raises:
        CheckpointError: if the stage before has left no weights.
    """
    from ast_plugin.checkpoints import newest_whole, read_checkpoint
    from ast_plugin.options import stages

    paths: dict[str, Any] = {}
    line = ''
    state = newest_whole(opt['path']['training_states']) if run.args.auto_resume else None
    if state is not None:
        paths['resume_state'] = str(state)
        line = f'{stage.name} goes on from {state}' if stage.name else ''
    elif stage.number > 1 and not stage.has_own_start and not opt['path'].get('resume_state'):
        before = run.stages[stage.number - 2]
        folder = run.experiment(before)
        weights = stages.weights(folder)
        if weights is None:
            raise CheckpointError(
                f'{stage.name} starts from the weights of {before.name}, but {folder / "models"} holds neither '
                f'{" nor ".join(stages.WEIGHTS)}; train that first (`basicsr train -opt {run.args.opt} '
                f'--stage {before.number}`) or name others in stages.{stage.number - 1}.path.pretrain_network_g'
            )
        paths.update(pretrain_network_g=str(weights), param_key_g=read_checkpoint(weights).param_key)
        what = 'the best' if weights.name == stages.WEIGHTS[0] else 'the latest, there are no best ones,'
        line = f'{stage.name} starts from {what} weights of {before.name}: {weights}'
    opt['path'].update(paths)
    return paths, line


def _put_aside(folder: Path, process: dict[str, Any]) -> None:
    """Rename a folder, as BasicSR renames an older run."""
    if process['rank'] != 0 or not folder.exists():
        return
    from basicsr.utils import misc

    try:
        misc.mkdir_and_rename(str(folder))
        folder.rmdir()  # the new one comes when its run begins
    except OSError as error:
        raise OptionError(f'{folder}: cannot be renamed: {error.strerror}; choose another --root') from error


def _tell_how_to_go_on(args: argparse.Namespace, stop: RunStopped, process: dict[str, Any]) -> None:
    if process['rank'] != 0:
        return
    words = ['basicsr', 'train', '-opt', args.opt]
    words += ['--root', args.root] if args.root != '.' else []
    words += ['--stage', str(args.stage)] if args.stage else []
    words += ['--force_yml', *args.force_yml] if args.force_yml else []
    words += ['--debug'] if args.debug else []
    command = f'{shlex.join(words)} --auto_resume'
    if args.launcher != 'none':
        command += f' --launcher {args.launcher}, started as before'
    what = f'saved after iteration {stop.iteration}; go on' if stop.iteration else 'nothing trained yet; start again'
    print(f'basicsr: stopped by {stop.name}, {what} by: {command}', file=sys.stderr, flush=True)


def _tell(process: dict[str, Any], line: str) -> None:
    if process['rank'] == 0:
        print(line, flush=True)
