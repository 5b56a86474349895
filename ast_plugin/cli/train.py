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

from ast_plugin.cli import commands
from ast_plugin.errors import OptionError
from ast_plugin.names import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr train`."""
    commands.add_run_arguments(parser)
    parser.add_argument(
        '--auto_resume',
        action='store_true',
        help='go on from the newest state of the experiment, if there is one; finished stages are passed over',
    )
    parser.add_argument(
        '--force_resume',
        action='store_true',
        help='resume from a state that the options do not fit: what does not, such as another optimiser, starts afresh',
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then let BasicSR train, stage by stage."""
    run = commands.read_run(args, is_train=True)
    from ast_plugin.models.processes import RunStopped
    from ast_plugin.models.training_run import Training, join_processes

    is_resumed = args.auto_resume or any((stage.opt.get('path') or {}).get('resume_state') for stage in run.stages)
    if args.force_resume and not is_resumed:
        raise OptionError('--force_resume resumes nothing by itself: add --auto_resume, or set path.resume_state')
    training = Training(run, run.select(args.stage), args.auto_resume, say, args.force_resume)
    training.check()
    with join_processes(run, args.launcher) as process:
        try:
            training(process)
        except RunStopped as stop:
            if process['rank'] == 0:
                is_saved = f'saved after iteration {stop.iteration}; go on'
                what = is_saved if stop.iteration else 'nothing trained yet; start again'
                line = f'basicsr: stopped by {stop.name}, {what} by: {_command_to_go_on(args)}'
                say(line, file=sys.stderr)
            return stop.code
    return 0


def _command_to_go_on(args: argparse.Namespace) -> str:
    words = ['basicsr', 'train', '-opt', args.opt]
    words += ['--root', args.root] if args.root != '.' else []
    words += ['--stage', args.stage] if args.stage else []
    words += ['--force_yml', *args.force_yml] if args.force_yml else []
    words += ['--debug'] if args.debug else []
    command = f'{shlex.join(words)} --auto_resume'
    return command if args.launcher == 'none' else f'{command} --launcher {args.launcher}, started as before'
