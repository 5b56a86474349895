"""Evaluate weights on the validation and test sets of an option file.

  basicsr test -opt AST_quickstart                         best weights of the experiment of that name
  basicsr test -opt AST_deraindrop --stage 1               weights of a stage (default: last stage that has weights)
  basicsr test -opt AST_derain --weights derain.pth        any other weights
  basicsr test -opt my.yml --force_yml val:save_img=true   also write the restored images

Images are restored and measured according to val.protocol. Tables, a contact sheet of the worst and best images, and
the images themselves are written to results/NAME. An existing folder of that name is renamed, not overwritten.

Exit status: 0 all images measured, 1 some images failed (they are listed), 2 wrong usage or input.
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
        help='weights to evaluate (default: path.pretrain_network_g, otherwise the best weights of the experiment; '
        'the reverse for option files with stages)',
    )


def run(args: argparse.Namespace) -> int:
    """Check the options and the weights, then run BasicSR's test pipeline."""
    run = commands.read_run(args, is_train=False)
    import basicsr.test

    from ast_plugin.evaluation.validator import Validator
    from ast_plugin.models import preflight
    from ast_plugin.models.training_run import hand_over, join_processes

    stage, weights = _weights(run, args)
    opt = run.prepare(stage)
    paths = {'pretrain_network_g': str(weights)}
    if str(weights) != os.path.expanduser(opt['path'].get('pretrain_network_g') or ''):
        paths['param_key_g'] = None  # the option file's param_key_g belongs to its pretrain_network_g
    opt['path'].update(paths)
    states = preflight.check(opt, str(run.file))
    if 'network_g' in states:
        # BasicSR's own models interpret a missing key as `params`.
        paths['param_key_g'] = states['network_g'].param_key
    with join_processes(run, args.launcher) as process:
        if process['rank'] == 0:
            say(f'Testing weights {weights}')
        opt = run.prepare(stage, **process)
        opt['path'].update(paths)
        num_failed = Validator.num_failed
        with hand_over(basicsr.test, opt, run, stage):
            basicsr.test.test_pipeline(str(run.root))
    return 1 if Validator.num_failed > num_failed else 0


def _weights(run: Run, args: argparse.Namespace) -> tuple[Stage, Path]:
    """Return the stage whose options are used, and the weights file to evaluate."""
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
        f'no weights to test: {folders} contains neither {" nor ".join(WEIGHTS)} nor net_g_ITERATION.pth; '
        f'train first (`basicsr train -opt {args.opt}`) or specify --weights FILE'
    )
