"""Check an option file as `basicsr train` does before training, and print the resolved options as YAML.

  basicsr check -opt AST_deraindrop
  basicsr check -opt my.yml --force_yml train:total_epochs=1
  basicsr check --schema > basicsr.schema.json       JSON schema for completion and validation in editors

Keys, values, inheritance, stages, networks, losses and schedules are always checked. If the data is available, epochs
are converted to iterations and one sample of each dataset is passed through network, losses and metrics (only its shape
if the network is too large for the CPU). Results go to stderr, the resolved options to stdout. No file is written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ast_plugin import options
from ast_plugin.cli import commands
from ast_plugin.errors import DataError, OptionError
from ast_plugin.names import say
from ast_plugin.options import Stage, safe_yaml
from ast_plugin.options.reading import NETWORKS_KEY
from ast_plugin.options.sections import json_schema

if TYPE_CHECKING:
    from ast_plugin.models.training_run import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr check`."""
    commands.add_file_arguments(parser, is_needed=False)
    parser.add_argument('--schema', action='store_true', help='print the JSON schema of option files instead')


def run(args: argparse.Namespace) -> int:
    """Print the JSON schema, or check an option file and print its resolved options."""
    if args.schema:
        from ast_plugin.models.preflight import load_registered

        print(json.dumps(json_schema(load_registered()), indent=2))
        return 0
    if args.opt is None:
        raise OptionError('check: expected -opt FILE, or --schema')
    is_comparison = NETWORKS_KEY in options.load(options.find(args.opt), args.force_yml)
    resolved = (_check_comparison if is_comparison else _check_run)(args)
    print(safe_yaml.write_text(resolved), end='', flush=True)
    return 0


def _check_comparison(args: argparse.Namespace) -> dict[str, Any]:
    """Check a file for `basicsr compare`; return the resolved training options of each network by name."""
    from ast_plugin.compare.run import make_plan

    plan = make_plan(args.opt, args.root, args.force_yml)
    for network in plan.networks:
        how = 'measured without training' if network.train is None else 'trained, then measured'
        say(f'{network.name}: valid, {how}', file=sys.stderr)
    return {network.name: dict(network.train) for network in plan.networks if network.train is not None}


def _check_run(args: argparse.Namespace) -> dict[str, Any]:
    """Check a file for `basicsr train`; return its resolved options."""
    run = commands.read_run(args, is_train=None)
    before: dict[str, Any] | None = None
    missing: dict[str, None] = {}
    for stage in run.stages:
        before, reason = _check_stage(run, stage, before)
        missing |= {reason: None} if reason else {}
    for reason in missing:
        say(f'data not usable on this machine: {reason}', file=sys.stderr)
    return run.resolved()


def _check_stage(run: Run, stage: Stage, before: dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """Check a stage as far as possible; return its prepared options and the reason if its data cannot be used."""
    from ast_plugin.models.training_run import check_stage

    summary = missing = ''
    try:
        opt = run.prepare(stage)
        train = opt.get('train') or {}
        if train.get('iters_per_epoch'):
            summary = f', {train["total_iter"]:,d} iterations, {train["iters_per_epoch"]:,d} per epoch'
        check_stage(run, stage, opt, before, is_run=False)
    except DataError as error:
        # Check everything else nevertheless; the length of the dataset does not matter for that.
        opt = run.prepare(stage, length_of=lambda dataset: 1)
        if all(map(_data_is_there, opt['datasets'].values())):
            raise
        check_stage(run, stage, {**opt, 'datasets': {}}, before, is_run=False)
        missing = str(error).removeprefix(f'{run.source(stage)}: ')
        summary += '; data not checked'
    say(f'{stage.name or run.opt["name"]}: valid{summary}', file=sys.stderr)
    return opt, missing


def _data_is_there(dataset: dict[str, Any]) -> bool:
    """Return whether all paths of a dataset exist, so that a DataError is an error of the run."""
    from ast_plugin.data.synthesis import packaged_photos

    paths = [value for key, value in dataset.items() if value and (key.startswith('dataroot') or key == 'manifest')]
    if not paths and dataset.get('type') == 'SyntheticPairsDataset':
        with suppress(DataError):
            paths = [photo.path for photo in packaged_photos()]
    return bool(paths) and all(os.path.exists(str(path)) for path in paths)
