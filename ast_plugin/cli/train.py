"""Train the network of an option file with BasicSR's training loop.

  basicsr train -opt AST_quickstart
  basicsr train -opt options/AST_derain.yml --auto_resume
  basicsr train -opt AST_derain --stage 2
  basicsr train -opt my.yml --force_yml train:total_iter=1000 datasets:train:batch_size_per_gpu=4
  torchrun --nproc_per_node=2 -m ast_plugin train -opt my.yml --launcher pytorch

Weights, training states and the log are written to experiments/NAME. An existing run of that name is renamed, not
overwritten. If the file has stages, they are trained in order, each in experiments/NAME/stage_N, starting from the best
weights of the previous stage. All stages are checked before any folder is created.
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
        help='resume from the latest training state of the experiment, if any; finished stages are skipped',
    )
    parser.add_argument(
        '--force_resume',
        action='store_true',
        help='resume even if the options do not match the training state; mismatched parts, such as another optimiser, '
        'start fresh',
    )


def run(args: argparse.Namespace) -> int:
    """Check all stages, then train them in order."""
    run = commands.read_run(args, is_train=True)
    from ast_plugin.models.processes import RunStopped
    from ast_plugin.models.training_run import Training, join_processes

    is_resumed = args.auto_resume or any((stage.opt.get('path') or {}).get('resume_state') for stage in run.stages)
    if args.force_resume and not is_resumed:
        raise OptionError('--force_resume requires --auto_resume or path.resume_state')
    training = Training(run, run.select(args.stage), args.auto_resume, say, args.force_resume)
    training.check()
    with join_processes(run, args.launcher) as process:
        try:
            training(process)
        except RunStopped as stop:
            if process['rank'] == 0:
                is_saved = f'saved after iteration {stop.iteration}; resume'
                what = is_saved if stop.iteration else 'no iteration finished; start again'
                line = f'basicsr: stopped by {stop.name}, {what} with: {_resume_command(args)}'
                say(line, file=sys.stderr)
            return stop.code
    return 0


def _resume_command(args: argparse.Namespace) -> str:
    words = ['basicsr', 'train', '-opt', args.opt]
    words += ['--root', args.root] if args.root != '.' else []
    words += ['--stage', args.stage] if args.stage else []
    words += ['--force_yml', *args.force_yml] if args.force_yml else []
    words += ['--debug'] if args.debug else []
    command = f'{shlex.join(words)} --auto_resume'
    return command if args.launcher == 'none' else f'{command} --launcher {args.launcher}, launched as before'
