"""Train the network of an option file, in BasicSR's training loop.

  basicsr train -opt AST_quickstart
  basicsr train -opt options/AST_derain.yml --auto_resume
  basicsr train -opt my.yml --force_yml train:total_iter=1000 datasets:train:batch_size_per_gpu=4
  torchrun --nproc_per_node=2 -m ast_plugin train -opt my.yml --launcher pytorch

Weights, states and the log go to experiments/NAME; an older run of that name is renamed, not overwritten.
Everything that can be found wrong beforehand is, before any folder is made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ast_plugin.cli import session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr train`."""
    session.add_arguments(parser)
    parser.add_argument(
        '--auto_resume', action='store_true', help='go on from the newest state of the experiment, if there is one'
    )


def run(args: argparse.Namespace) -> int:
    """Check everything, then let BasicSR train."""
    run = session.read(args, is_train=True)
    import basicsr.train

    from ast_plugin.cli import preflight

    opt = run.prepare()
    if args.auto_resume:
        _resume_newest(opt)
    preflight.check(opt, run.registered, str(run.file))
    with session.started(run) as opt:
        if args.auto_resume:
            _resume_newest(opt)
        with session.handed_over(basicsr.train, opt, run.file):
            basicsr.train.train_pipeline(str(run.root))
    return 0


def _resume_newest(opt: dict[str, Any]) -> None:
    """Name the newest training state of the experiment, as BasicSR does under its own root."""
    states = Path(opt['path']['training_states']).glob('*.state')
    numbered = [state for state in states if state.stem.isdecimal()]
    if numbered:
        opt['path']['resume_state'] = str(max(numbered, key=lambda state: int(state.stem)))
