"""Measure weights on the validation and test sets of an option file.

  basicsr test -opt AST_quickstart                         the best weights of the experiment of that name
  basicsr test -opt AST_deraindrop --stage 1               those of a stage; by default of the last that has any
  basicsr test -opt AST_derain --weights derain.pth        any other weights
  basicsr test -opt my.yml --force_yml val:save_img=true   write the restored images too

Images are restored and measured as val.protocol says (README, "Measuring"). Tables, the worst and the best images in
a contact sheet, and images go to results/NAME; an older folder of that name is renamed, not overwritten.

Exit status: 0 all measured, 1 some images failed and are named, 2 wrong usage or input.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ast_plugin.cli import commands
from ast_plugin.errors import OptionError
from ast_plugin.names import say
from ast_plugin.options import Stage

if TYPE_CHECKING:
    from ast_plugin.models.training_run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr test`."""
    commands.add_run_arguments(parser)
    parser.add_argument(
        '--weights',
        type=Path,
        metavar='FILE',
        help="weights to measure; by default path.pretrain_network_g, or else the experiment's best, "
        'in a file with stages the other way round',
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then let BasicSR test."""
    run = commands.read_run(args, is_train=False)
    import basicsr.test

    from ast_plugin.evaluation.validator import Validator
    from ast_plugin.models import preflight
    from ast_plugin.models.training_run import hand_over, join_processes

    stage, weights = _weights(run, args)
    opt = run.prepare(stage)
    paths = {'pretrain_network_g': str(weights)}
    if str(weights) != os.path.expanduser(opt['path'].get('pretrain_network_g') or ''):
        paths['param_key_g'] = None  # the key in the file is of the weights in the file
    opt['path'].update(paths)
    states = preflight.check(opt, str(run.file))
    if 'network_g' in states:
        # BasicSR's own models take none for params.
        paths['param_key_g'] = states['network_g'].param_key
    with join_processes(run, args.launcher) as process:
        if process['rank'] == 0:
            say(f'Testing the weights {weights}')
        opt = run.prepare(stage, **process)
        opt['path'].update(paths)
        num_failed = Validator.num_failed
        with hand_over(basicsr.test, opt, run, stage):
            basicsr.test.test_pipeline(str(run.root))
    return 1 if Validator.num_failed > num_failed else 0


def _weights(run: Run, args: argparse.Namespace) -> tuple[Stage, Path]:
    """The weights to measure, and the stage whose options they are measured with."""
    from ast_plugin.models.training_run import WEIGHTS, find_weights

    chosen = run.select(args.stage)
    trained = [(stage, weights) for stage in chosen if (weights := find_weights(run.experiment(stage)))]
    named = args.weights
    if not named and not (trained and chosen[-1].name):
        named = (chosen[-1].opt.get('path') or {}).get('pretrain_network_g')
    if named:
        return chosen[-1], Path(os.path.expanduser(named))
    if trained:
        return trained[-1]
    folders = ' or '.join(str(run.experiment(stage) / 'models') for stage in chosen)
    raise OptionError(
        f'no weights to test: {folders} holds neither {" nor ".join(WEIGHTS)} nor net_g_ITERATION.pth; '
        f'train first (`basicsr train -opt {args.opt}`) or name a file with --weights'
    )
