"""Compare networks: train what needs training, measure all alike, and write tables, plots and a report.

  basicsr compare -opt compare/quick
  basicsr compare -opt my_comparison.yml --force_yml train:total_iter=1000

A compare file is an option file with a list `networks` in the place of `network_g`, and a section `compare`. Everything
goes to comparisons/NAME: table.md, table.csv, images.csv, the plots, and report.html, one file that needs no network.
Given again, the command goes on where it was ended: what is done for the same options is not done again.

Exit status: 0 all were compared, 1 some failed (the report says which and why), 2 nothing was begun.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ast_plugin.cli import commands
from ast_plugin.errors import OptionError, PluginError

if TYPE_CHECKING:
    from ast_plugin.compare.comparison import Network, Plan
    from ast_plugin.options.checks import Registered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr compare`."""
    commands.add_file_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Check everything, then train, measure and report."""
    plan = make_plan(args)
    from ast_plugin.compare.comparison import Run
    from ast_plugin.compare.outputs import write_outputs

    plan.folder.mkdir(parents=True, exist_ok=True)
    with _terminated_like_interrupted():
        try:
            results = Run(plan, _say)()
        except (KeyboardInterrupt, SystemExit):
            print('basicsr: stopped; the same command goes on from here', file=sys.stderr)
            raise
    paths = write_outputs(plan, results)
    print(f'\n{results.to_markdown()}\n\nReport: {paths["report"]}', flush=True)
    failed = [row for row in results.rows if row.failed]
    for row in failed:
        print(f'basicsr: error: {row.name}: {row.failed}', file=sys.stderr)
    return 1 if failed else 0


def make_plan(args: argparse.Namespace) -> Plan:
    """Read the compare file and try all that it needs, before any folder is made.

    Raises:
        PluginError: naming what is wrong.
    """
    from ast_plugin import options

    file = options.find(args.opt)
    opt = options.load(file, args.force_yml)
    from ast_plugin.models import registries
    from ast_plugin.options.compare_file import CompareSettings, check_comparison

    registered = registries.load_registered()
    check_comparison(opt, str(file), registered)
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = 0  # the same for all, and when the command is given again
    from ast_plugin.compare.comparison import Plan
    from ast_plugin.evaluation.protocols import read_protocol

    folder = Path(args.root).expanduser().resolve() / 'comparisons' / opt['name']
    settings = CompareSettings.model_validate(opt.get('compare') or {}).model_dump()
    val = opt.get('val') or {}
    try:
        protocol = read_protocol(val.get('protocol'))
    except OptionError as error:
        raise OptionError(f'{file}: val.{error}') from error
    if not val.get('metrics') and not protocol.metrics:
        raise OptionError(f'{file}: val.metrics: required, the protocol {protocol.type} has no metrics of its own')
    planner = _Planner(file, opt, folder, registered)
    networks = [planner.network(number, entry) for number, entry in enumerate(opt['networks'])]
    return Plan(
        opt['name'],
        folder,
        networks,
        planner.dataset,
        val.get('protocol'),
        val.get('metrics') or None,
        settings,
    )


class _Planner:
    """Tries, network by network, what the comparison will need."""

    def __init__(self, file: Path, opt: Mapping[str, Any], folder: Path, registered: Registered) -> None:
        self.file, self.opt, self.folder, self.registered = file, opt, folder, registered
        self.dataset: dict[str, Any] = {}
        self._num_samples: int | None = None
        self._looked_at: set[bool] = set()  # whether of data for training, for measuring

    def network(self, number: int, entry: Mapping[str, Any]) -> Network:
        """What the comparison needs to know of an entry of `networks`.

        Raises:
            PluginError: if it cannot be built, loaded, trained or measured.
        """
        from ast_plugin.archs.networks import network_of
        from ast_plugin.checkpoints import read_checkpoint
        from ast_plugin.compare.comparison import Network
        from ast_plugin.models import preflight
        from ast_plugin.options.compare_file import expand_entry, is_trained

        source = f'{self.file}: networks.{number} ({entry["name"]})'
        weights = None if entry.get('weights') is None else Path(entry['weights']).expanduser()
        opt = expand_entry(self.opt, entry)
        notes: list[str] = []
        try:
            if 'network_g' not in opt:
                opt['network_g'], notes = network_of(read_checkpoint(weights, entry.get('param_key')))
            if is_trained(entry):
                preflight.check(self._prepared(opt, is_train=True), self.registered, source)
            tested = self._prepared(opt, is_train=False)
            preflight.check(tested, self.registered, source)
        except PluginError as error:
            message = str(error)
            raise type(error)(message if message.startswith(str(self.file)) else f'{source}: {message}') from error
        return Network(
            entry['name'],
            opt['network_g'],
            opt if is_trained(entry) else None,
            weights,
            entry.get('param_key'),
            tuple(notes),
        )

    def _prepared(self, opt: Mapping[str, Any], is_train: bool) -> dict[str, Any]:
        """Options as BasicSR would get them; the data, which all share, is left out once it has been looked at."""
        from ast_plugin import options
        from ast_plugin.options.compare_file import measured_dataset

        prepared = options.prepare(
            opt,
            root=self.folder,
            is_train=is_train,
            dataset_types=self.registered.by_kind['dataset'],
            length_of=self._length,
        )
        if not is_train:
            key = measured_dataset(opt)
            self.dataset = prepared['datasets'][key]
            prepared['datasets'] = {key: self.dataset}
        if is_train in self._looked_at:
            prepared['datasets'] = {}
        self._looked_at.add(is_train)
        return prepared

    def _length(self, dataset: Mapping[str, Any]) -> int:
        from ast_plugin.models import preflight

        if self._num_samples is None:
            self._num_samples = preflight.count_samples(f'{self.file}: datasets.train', dataset, self.registered)
        return self._num_samples


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Let SIGTERM end the comparison as Ctrl-C does: what runs is asked to save itself, and waited for."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, flush=True)
