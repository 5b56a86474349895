"""Check an option file as `basicsr train` does before it starts, and print all that it comes to as YAML.

  basicsr check -opt AST_deraindrop
  basicsr check -opt my.yml --force_yml train:total_epochs=1
  basicsr check --schema > basicsr.schema.json       a JSON schema, for editors that complete and underline

Keys, values, inheritance, stages, networks, losses and schedules are checked anywhere; epochs are counted, and the data
is looked at, where it is. What is found goes to stderr, the file to stdout. Nothing is run, nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ast_plugin.cli import session
from ast_plugin.errors import DataError, OptionError
from ast_plugin.options import safe_yaml, stages

if TYPE_CHECKING:
    from ast_plugin.options.stages import Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr check`."""
    session.add_file_arguments(parser, is_needed=False)
    parser.add_argument('--schema', action='store_true', help='print the JSON schema of option files instead')


def run(args: argparse.Namespace) -> int:
    """Print the schema, or check a file and print it."""
    if args.schema:
        from ast_plugin import schema
        from ast_plugin.cli import registries

        print(json.dumps(schema.json_schema(registries.load()), indent=2))
        return 0
    if args.opt is None:
        raise OptionError('check: expected -opt FILE, or --schema')
    from ast_plugin import options
    from ast_plugin.options.comparison import ENTRIES

    if ENTRIES in options.load(options.find(args.opt), args.force_yml):
        return _check_comparison(args)
    run = session.read(args, is_train=None)
    before: dict[str, Any] | None = None
    missing: dict[str, None] = {}
    for stage in run.stages:
        before, reason = _look(run, stage, before)
        missing |= {reason: None} if reason else {}
    for reason in missing:
        print(f'data that cannot be used here: {reason}', file=sys.stderr, flush=True)
    print(safe_yaml.write_text(_resolved(run)), end='', flush=True)
    return 0


def _check_comparison(args: argparse.Namespace) -> int:
    """Check a file for `basicsr compare`, and print the option file that each network is trained by."""
    from ast_plugin.cli.compare import make_plan

    plan = make_plan(args)
    for network in plan.networks:
        how = 'measured as it is' if network.train is None else 'trained, then measured'
        print(f'{network.name}: right, {how}', file=sys.stderr, flush=True)
    trained = {network.name: dict(network.train) for network in plan.networks if network.train is not None}
    print(safe_yaml.write_text(trained), end='', flush=True)
    return 0


def _look(run: session.Session, stage: Stage, before: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Try all that can be tried of a stage, and sum it up in a line.

    Returns:
        Its options as prepared for BasicSR, and why its data cannot be used, if so.
    """
    from ast_plugin.cli import preflight

    def check(opt: dict[str, Any]) -> None:
        if before is not None and not stage.has_own_start:
            opt['path']['pretrain_network_g'] = None
            preflight.check_handover(before, opt, run.registered, run.source(stage))
        preflight.check(opt, run.registered, run.source(stage))

    length = missing = ''
    try:
        opt = run.prepare(stage)
        length = _length(opt)
        check(opt)
    except DataError as error:
        # Everything else can be found wrong all the same; any length will do for that.
        opt = run.prepare(stage, length_of=lambda dataset: 1)
        check({**opt, 'datasets': {}})
        missing = str(error).removeprefix(f'{run.source(stage)}: ')
        length += '; its data was not checked'
    print(f'{stage.name or run.opt["name"]}: right{length}', file=sys.stderr, flush=True)
    return opt, missing


def _length(opt: dict[str, Any]) -> str:
    train = opt.get('train') or {}
    epoch = train.get('iters_per_epoch')
    return f', {train["total_iter"]:,d} iterations, {epoch:,d} of them an epoch' if epoch else ''


def _resolved(run: session.Session) -> dict[str, Any]:
    """All options, each stage with what it takes from the file: an option file that stands for the same runs."""
    if run.stages[0].name is None:
        return run.opt
    name = run.opt['name']
    return {'name': name, stages.KEY: [{**stage.opt, 'name': stage.name} for stage in run.stages]}
