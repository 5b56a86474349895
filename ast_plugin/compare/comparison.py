"""Runs a comparison: trains what needs training, measures every network alike, and goes on where it was ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ast_plugin.archs.networks import input_channels
from ast_plugin.compare.child import Outcome, run_child
from ast_plugin.compare.journal import Journal, digest
from ast_plugin.compare.machine import describe_machine, installed_versions
from ast_plugin.compare.measure import picture_path
from ast_plugin.compare.results import Results, Row, Speed
from ast_plugin.compare.training import Training, TrainingFailed
from ast_plugin.errors import CheckpointError, FileError
from ast_plugin.files import file_digest, lock_folder
from ast_plugin.options.compare_file import INPUT

_PATIENCE = 30.0  # seconds that what a killed comparison has started may take to end


@dataclass(frozen=True)
class Network:
    """One network of a comparison, all that belongs to it found out.

    Attributes:
        name: of its row.
        network_g: type and arguments.
        train: the option file that trains it; None for one that is measured as it is.
        weights, param_key: that it is measured with, or that its training starts from.
        notes: lines for the reader.
    """

    name: str
    network_g: Mapping[str, Any]
    train: Mapping[str, Any] | None = None
    weights: Path | None = None
    param_key: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """A comparison, all that it needs found out and checked.

    Attributes:
        name: of the comparison.
        folder: of its results.
        networks: to be compared.
        dataset: options of the set that is measured, prepared for BasicSR.
        protocol: as `val.protocol` says it; None for BasicSR's own.
        metrics: of `val.metrics`; None for those of the protocol.
        settings: the section `compare`, with what it leaves out filled in.
    """

    name: str
    folder: Path
    networks: list[Network]
    dataset: Mapping[str, Any]
    protocol: Any
    metrics: Mapping[str, Mapping[str, Any]] | None
    settings: Mapping[str, Any]


@dataclass
class Run:
    """A run of a plan. What an earlier one has done, for the same options, is not done again.

    Args:
        plan: what to do.
        say: told what is going on, a line at a time.
    """

    plan: Plan
    say: Callable[[str], None] = print
    rows: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.journal = Journal(self.plan.folder / 'journal')
        self.logs = self.plan.folder / 'logs'
        self.logs.mkdir(exist_ok=True)
        self._keep_open: list[int] = []

    def __call__(self) -> Results:
        """Train and measure. A network that fails is a row that says so.

        Raises:
            FileError: if another comparison is at work in the folder.
        """
        occupied = 'another comparison is at work there, choose another name or --root'
        with lock_folder(self.plan.folder, occupied, _PATIENCE) as self._keep_open:
            self.rows = {INPUT: Row(INPUT)}
            self._measure_quality(self.rows[INPUT], None, None, None)
            for number, network in enumerate(self.plan.networks, 1):
                self.say(f'[{number}/{len(self.plan.networks)}] {network.name}')
                row = self.rows[network.name] = Row(network.name, _kind(network.network_g), notes=list(network.notes))
                self._train_and_measure(row, network)
            # Together, so that what else the machine does changes little in between.
            for network in self.plan.networks:
                self._measure_speeds(self.rows[network.name], network)
        return self.results()

    def results(self) -> Results:
        """What has been found."""
        settings = self.plan.settings
        metrics = self.plan.metrics or {}
        return Results(
            self.plan.name,
            list(self.rows.values()),
            frozenset(name for name, options in metrics.items() if options.get('better') == 'lower'),
            settings['baseline'],
            settings['confidence'],
            settings['resamples'],
        )

    def _train_and_measure(self, row: Row, network: Network) -> None:
        weights, param_key = network.weights, network.param_key
        if network.train is not None:
            training = Training(
                network.name, network.train, self.plan.folder, self.journal, self.plan.settings, self._keep_open
            )
            try:
                weights, row.training = training.run(self.say)
                param_key = None
            except (TrainingFailed, CheckpointError, FileError) as error:
                self._fail(row, 'training', str(error))
                return
        self._measure_quality(row, network.network_g, weights, param_key)

    def _measure_quality(
        self, row: Row, network: Mapping[str, Any] | None, weights: Path | None, param_key: str | None
    ) -> None:
        plan = self.plan
        job = {
            'kind': 'quality',
            'network': network,
            'weights': None if weights is None else str(weights),
            'param_key': param_key,
            'channels': input_channels(network or {}),
            'dataset': plan.dataset,
            'protocol': plan.protocol,
            'metrics': plan.metrics,
            'device': plan.settings['device'],
            'pictures': plan.settings['pictures'],
            'folder': str(plan.folder / 'pictures' / row.name),
        }
        depends_on = {**job, 'weights': None if weights is None else file_digest(weights), 'folder': None}
        record = self._measure(row, f'{row.name}.quality', job, depends_on)
        if record is None:
            return
        row.values = record['values']
        row.notes += record['notes']
        if record['multiple'] > 1:
            row.notes.append(f'takes sizes that are multiples of {record["multiple"]}: padded by reflection, cropped')

    def _measure_speeds(self, row: Row, network: Network) -> None:
        settings = self.plan.settings
        for height, width in settings['sizes']:
            if row.failed:
                return
            job = {
                'kind': 'speed',
                'network': network.network_g,
                'weights': None,  # what they are changes no cost
                'param_key': None,
                'channels': input_channels(network.network_g),
                'size': [height, width],
                'runs': settings['runs'],
                'threads': settings['threads'],
                'device': settings['device'],
            }
            machine = describe_machine()
            depends_on = [job, machine['processor'], machine['gpu'], installed_versions()]
            record = self._measure(row, f'{row.name}.speed_{height}x{width}', job, depends_on)
            if record is not None:
                row.parameters = record['parameters']
                row.speeds[height, width] = Speed.from_record(record)

    def _measure(self, row: Row, name: str, job: dict[str, Any], depends_on: Any) -> dict[str, Any] | None:
        """Do a job in a process of its own, unless it is done; None, and a failed row, if that fails."""
        wanted = digest(depends_on)
        record = self.journal.read(name, wanted)
        if record is not None and _pictures_are_there(job, record):
            return record
        self.say(f'  {_WORDS[job["kind"]]} {row.name}' + (' at {}x{}'.format(*job['size']) if 'size' in job else ''))
        path = self.journal.folder / f'.{name}.job'
        result = self.journal.folder / f'.{name}.result'
        result.unlink(missing_ok=True)
        path.write_text(json.dumps({**job, 'record': str(result)}), encoding='utf-8')
        log = self.logs / f'{name}.log'
        outcome: Outcome = run_child(
            'ast_plugin.compare.measure',
            [str(path)],
            log,
            threads=self.plan.settings['threads'],
            keep_open=self._keep_open,
        )
        found = _read_result(result) if outcome.status == 0 else None
        path.unlink(missing_ok=True)
        result.unlink(missing_ok=True)
        if found is None:
            self._fail(row, _WORDS[job['kind']], outcome.reason or 'it left no record')
            return None
        return self.journal.write(name, wanted, found)

    def _fail(self, row: Row, what: str, reason: str) -> None:
        row.failed = f'{what}: {reason}'
        self.say(f'  {row.name} failed, {row.failed}')


_WORDS = {'quality': 'restoring with', 'speed': 'timing'}


def _kind(network_g: Mapping[str, Any]) -> str:
    """What a network is called in tables: its type, and the name of one of spandrel's."""
    return f'{network_g["type"]} {network_g["name"]}' if 'name' in network_g else network_g['type']


def _pictures_are_there(job: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    return all(picture_path(job['folder'], name).is_file() for name in record.get('pictures', ()))


def _read_result(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
