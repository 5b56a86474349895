"""Measure weights on the validation and test sets of an option file.

  basicsr test -opt AST_quickstart                         the best weights of the experiment of that name
  basicsr test -opt AST_derain --weights derain.pth        any other weights
  basicsr test -opt my.yml --force_yml val:save_img=true   write the restored pictures too

Tables and pictures go to results/NAME; an older folder of that name is renamed, not overwritten.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ast_plugin.cli import session
from ast_plugin.errors import OptionError

# As the experiment's models/ holds them, the better first.
_TRAINED = ('net_g_best.pth', 'net_g_latest.pth')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr test`."""
    session.add_arguments(parser)
    parser.add_argument(
        '--weights',
        type=Path,
        metavar='FILE',
        help="weights to measure; by default path.pretrain_network_g, or else the experiment's best",
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then let BasicSR test."""
    run = session.read(args, is_train=False)
    import basicsr.test

    from ast_plugin.cli import preflight

    opt = run.prepare()
    weights = _weights(opt, run)
    paths = {'pretrain_network_g': str(weights)}
    opt['path'].update(paths)
    states = preflight.check(opt, run.registered, str(run.file))
    if 'network_g' in states:
        # The option file's key where the weights have it, averaged weights before plain ones otherwise.
        paths['param_key_g'] = states['network_g'].param_key
    print(f'Testing the weights {weights}', flush=True)
    with session.started(run) as opt:
        opt['path'].update(paths)
        with session.handed_over(basicsr.test, opt, run.file):
            basicsr.test.test_pipeline(str(run.root))
    return 0


def _weights(opt: dict[str, Any], run: session.Session) -> Path:
    named = run.args.weights or opt['path'].get('pretrain_network_g')
    if named:
        return Path(os.path.expanduser(named))
    folder = run.root / 'experiments' / opt['name'] / 'models'
    for name in _TRAINED:
        if (folder / name).is_file():
            return folder / name
    raise OptionError(
        f'no weights to test: {folder} holds neither {" nor ".join(_TRAINED)}; '
        f'train first (`basicsr train -opt {run.args.opt}`) or name a file with --weights'
    )
