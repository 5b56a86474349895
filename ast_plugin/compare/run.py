"""Plan and run comparisons: check the option file, then train and measure every network; finished work is reused."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ast_plugin import options
from ast_plugin.archs.networks import network_of
from ast_plugin.checkpoints import read_checkpoint, weights_file
from ast_plugin.compare.child import ChildFailed, run_child, run_job
from ast_plugin.compare.measure import describe_machine, image_path, image_stamps, installed_versions
from ast_plugin.compare.results import Results, Row, format_duration
from ast_plugin.devices import find_device
from ast_plugin.errors import CheckpointError, FileError, OptionError, PluginError
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.files import file_digest, lock_folder, write_file
from ast_plugin.models import preflight
from ast_plugin.models.training_run import Run
from ast_plugin.names import say
from ast_plugin.options import safe_yaml, validation
from ast_plugin.options.reading import NETWORKS_KEY, Sources
from ast_plugin.options.runs import Stage, expand_network, is_trained, measured_dataset
from ast_plugin.options.sections import INPUT, CompareSettings

_PATIENCE = 30.0  # seconds to wait for the processes of a killed comparison to exit
_WEIGHTS = {'latest': 'net_g_latest.pth', 'best': 'net_g_best.pth'}
_NOTE_SECONDS, _REPORT_SECONDS = 5.0, 30.0  # intervals of writing the elapsed time and of printing progress
# With a time budget, the speed is measured after 3 slow first iterations, over at least 5 iterations and 20 seconds.
_FIRST_COUNTED, _FEWEST_COUNTED, _COUNTING_SECONDS = 3, 5, 20.0


@dataclass(frozen=True)
class PlannedNetwork:
    """Network of a comparison, with its options."""

    name: str  # name of its row
    network_g: Mapping[str, Any]  # type and arguments
    train: Mapping[str, Any] | None = None  # options of its training; None if it is only measured
    weights: Path | None = None  # weights to measure, or the initial weights of the training
    param_key: str | None = None
    notes: tuple[str, ...] = ()  # shown in the report

    @property
    def kind(self) -> str:
        """Architecture as shown in tables: the type, and the name for networks from spandrel."""
        return ' '.join(filter(None, [self.network_g['type'], self.network_g.get('name')]))


@dataclass(frozen=True)
class Plan:
    """Validated comparison."""

    name: str
    folder: Path  # output folder
    networks: Sequence[PlannedNetwork]
    dataset: Mapping[str, Any]  # options of the test set, prepared for BasicSR
    protocol: Any  # value of `val.protocol`; None for BasicSR's own protocol
    metrics: Mapping[str, Mapping[str, Any]] | None  # value of `val.metrics`; None for the protocol's metrics
    settings: CompareSettings
    bit_depth: int = 8


def make_plan(name_or_path: str, root: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and validate a compare file: every network is built, loaded, trained for one step and measured.

    Args:
        name_or_path: name or path of the compare file.
        root: folder in which `comparisons/` is created.
        overrides: options in the format of `--force_yml`.
    Raises:
        PluginError: if the file is invalid or a network fails.
    """
    file = options.find(name_or_path)
    opt = options.load(file, overrides)
    if NETWORKS_KEY not in opt:
        raise OptionError(f'{file}: {NETWORKS_KEY}: required, but missing; train a single network with `basicsr train`')
    registered = preflight.load_registered()
    validation.check(opt, str(file), registered, explain=Sources(file, overrides).explain)
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = 0  # the same for all networks and when the comparison is resumed
    val = opt.get('val') or {}
    try:
        protocol = read_protocol(val.get('protocol'))
    except OptionError as error:
        raise OptionError(f'{file}: val.{error}') from error
    if not val.get('metrics') and not protocol.metrics:
        raise OptionError(f'{file}: val.metrics: required, the protocol {protocol.type} defines no metrics')
    settings = CompareSettings.model_validate(opt.get('compare') or {})
    settings.device = str(find_device(opt.get('device') or settings.device))
    folder = Path(os.path.expanduser(root)).resolve() / 'comparisons' / opt['name']
    run = Run(file, opt, [], registered, True, folder)
    samples: dict[bool, dict[str, Any]] = {True: {}, False: {}}  # by `is_train`; read once for all networks
    networks = []
    for number, entry in enumerate(opt[NETWORKS_KEY]):
        source = f'{file}: {NETWORKS_KEY}.{number} ({entry["name"]})'
        try:
            network, dataset = _plan_network(run, source, entry, samples)
        except PluginError as error:
            message = str(error)
            raise type(error)(message if message.startswith(str(file)) else f'{source}: {message}') from error
        networks.append(network)
    metrics, bit_depth = val.get('metrics') or None, opt.get('bit_depth') or 8
    return Plan(opt['name'], folder, networks, dataset, val.get('protocol'), metrics, settings, bit_depth)


def _plan_network(
    run: Run, source: str, entry: Mapping[str, Any], samples: Mapping[bool, dict[str, Any]]
) -> tuple[PlannedNetwork, dict[str, Any]]:
    """Build, load, train for one step and measure an entry of `networks`; return it and the options of the test set."""
    weights = None if entry.get('weights') is None else Path(os.path.expanduser(entry['weights']))
    opt, notes = expand_network(run.opt, entry), []
    if 'network_g' not in opt:
        opt['network_g'], notes = network_of(read_checkpoint(weights, entry.get('param_key')))
    train = opt if is_trained(entry) else None
    for is_train in [False] if train is None else [True, False]:
        # `val` may be absent from the options of a training.
        stage = Stage(1, None, opt if is_train else {**opt, 'val': run.opt.get('val') or {}}, {})
        prepared = replace(run, is_train=is_train).prepare(stage)
        if not is_train:
            key = measured_dataset(opt)
            dataset = prepared['datasets'][key]
            prepared['datasets'] = {key: dataset}
        checkpoints = preflight.check(prepared, source, False, samples[is_train])
    if 'network_g' in checkpoints:
        notes = [*notes, *checkpoints['network_g'].notes]
    return PlannedNetwork(
        entry['name'], opt['network_g'], train, weights, entry.get('param_key'), tuple(notes)
    ), dataset


@dataclass(frozen=True)
class Journal:
    """Folder of records, one JSON file per finished job, with a digest of everything the job depends on."""

    folder: Path

    def read(self, name: str, digest: str) -> dict[str, Any] | None:
        """Return the record of a job, or None if it is missing or its digest differs."""
        try:
            record = json.loads((self.folder / f'{name}.json').read_text(encoding='utf-8'))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and record.get('digest') == digest else None

    def write(self, name: str, digest: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record of a job, replacing an older one, and return it."""
        content = {**record, 'digest': digest}
        write_file(self.folder / f'{name}.json', json.dumps(content, indent=1).encode(), make_folder=True)
        return content


def digest_of(value: Any) -> str:
    """Return a digest of plain values that does not depend on the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(',', ':'), default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


class Comparison:
    """Execution of a plan. Results of an earlier run with equal options are reused."""

    def __init__(self, plan: Plan, say: Callable[[str], None] = say) -> None:
        self.plan, self.say = plan, say
        self.journal = Journal(plan.folder / 'journal')
        self.logs = plan.folder / 'logs'
        self.logs.mkdir(parents=True, exist_ok=True)
        self.keep_open: Sequence[int] = ()  # file descriptors inherited by the child processes
        self.images: Sequence[Any] = ()  # images of the test set, see `image_stamps`

    def run(self) -> Results:
        """Train and measure all networks; the row of a network that fails contains the reason.

        Raises:
            FileError: if another comparison is running in the folder.
        """
        occupied = 'another comparison is running in this folder, choose a different name or --root'
        networks = self.plan.networks
        with lock_folder(self.plan.folder, occupied, _PATIENCE) as self.keep_open:
            self.images = image_stamps(self.plan.dataset)
            rows = [Row(INPUT)]
            self._measure_quality(rows[0], None, None, None)
            for number, network in enumerate(networks, 1):
                self.say(f'[{number}/{len(networks)}] {network.name}')
                rows.append(Row(network.name, network.kind, notes=list(network.notes)))
                self._train_and_measure(rows[-1], network)
            # Timed in direct succession, so that the state of the machine changes as little as possible.
            for row, network in zip(rows[1:], networks, strict=True):
                self._measure_speeds(row, network)
        settings, metrics = self.plan.settings, self.plan.metrics or {}
        return Results(
            self.plan.name,
            rows,
            frozenset(name for name, options in metrics.items() if options.get('better') == 'lower'),
            settings.baseline,
            settings.confidence,
            settings.resamples,
        )

    def _train_and_measure(self, row: Row, network: PlannedNetwork) -> None:
        weights, param_key = network.weights, network.param_key
        if network.train is not None:
            try:
                weights, row.training = Training(self, network).run()
                param_key = None
            except (ChildFailed, CheckpointError, FileError) as error:
                self._fail(row, 'training', error)
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
            'dataset': plan.dataset,
            'protocol': plan.protocol,
            'metrics': plan.metrics,
            'bit_depth': plan.bit_depth,
            'device': plan.settings.device,
            'kept': plan.settings.pictures,
            'folder': str(plan.folder / 'pictures' / row.name),
        }
        digest = None if weights is None else file_digest(weights_file(weights))
        depends_on = {**job, 'weights': digest, 'images': self.images, 'folder': None}
        record = self._measure(row, f'{row.name}.quality', job, depends_on, f'evaluating {row.name}')
        if record is None:
            return
        row.values = record['values']
        row.notes += record['notes']
        if record['multiple'] > 1:
            row.notes.append(f'images are padded by reflection to a multiple of {record["multiple"]}, then cropped')

    def _measure_speeds(self, row: Row, network: PlannedNetwork) -> None:
        settings, machine = self.plan.settings, describe_machine()
        for height, width in settings.sizes:
            if row.failed:
                return
            job = {
                'kind': 'speed',
                'network': network.network_g,
                'weights': None,  # do not affect cost
                'param_key': None,
                'size': [height, width],
                'runs': settings.runs,
                'device': settings.device,
            }
            depends_on = [job, settings.threads, machine['processor'], machine['gpu'], installed_versions()]
            what = f'timing {row.name} at {height}x{width}'
            record = self._measure(row, f'{row.name}.speed_{height}x{width}', job, depends_on, what)
            if record is not None:
                row.parameters = record['parameters']
                row.speeds[height, width] = record

    def _measure(self, row: Row, name: str, job: dict[str, Any], depends_on: Any, what: str) -> dict[str, Any] | None:
        """Return the record of a job, running it in a new process if needed; on failure mark the row, return None."""
        digest = digest_of(depends_on)
        record = self.journal.read(name, digest)
        if record is not None and all(image_path(job['folder'], kept).is_file() for kept in record.get('kept', ())):
            return record
        self.say(f'  {what}')
        log, threads = self.logs / f'{name}.log', self.plan.settings.threads
        try:
            record = run_job(job, log, threads=threads, keep_open=self.keep_open)
        except ChildFailed as error:
            self._fail(row, what.partition(f' {row.name}')[0], error)
            return None
        return self.journal.write(name, digest, record)

    def _fail(self, row: Row, what: str, error: Exception) -> None:
        row.failed = f'{what}: {error}'
        self.say(f'  {row.name} failed while {row.failed}')


class Training:
    """Training of one network of a comparison, by `basicsr train` in a child process."""

    def __init__(self, comparison: Comparison, network: PlannedNetwork) -> None:
        self.name, self.opt = network.name, copy.deepcopy(dict(network.train))
        self.comparison, self.journal, self.say = comparison, comparison.journal, comparison.say
        self.folder, self.settings = comparison.plan.folder, comparison.plan.settings
        self.experiment = self.folder / 'experiments' / self.name
        self.table = self.experiment / 'metrics.csv'
        self.weights = self.experiment / 'models' / _WEIGHTS[self.settings.weights]

    def run(self) -> tuple[Path, dict[str, Any]]:
        """Train the network, resume an interrupted training, or reuse a finished one.

        Returns:
            Path of the weights, and a record with `iterations`, `seconds`, `versions` and `machine`.
        Raises:
            ChildFailed: if the training did not finish.
        """
        digest = digest_of(self._depends_on())
        if self.settings.minutes:
            self.opt['train']['total_iter'] = self._iterations_in_budget(digest)
        record = self.journal.read(f'{self.name}.training', digest)
        if record is not None and record['is_finished'] and self.weights.is_file():
            return self.weights, record
        is_begun = record is not None
        if record is None:
            self._archive_experiment()
            made_by = {'versions': installed_versions(), 'machine': describe_machine()}
            record = {'is_finished': False, 'iterations': None, 'seconds': 0.0, **made_by}
        so_far = f', resuming after {format_duration(record["seconds"])}' if is_begun else ''
        self.say(f'  training {self.name}{so_far}')
        record = self._train(digest, record, ['--auto_resume'] if is_begun else [])
        self.say(f'  trained {self.name} in {format_duration(record["seconds"])}')
        return self.weights, record

    def _train(self, digest: str, record: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
        """Train to the end, updating the elapsed time in the journal."""
        before = record['seconds']
        noted = reported = 0.0

        def note(seconds: float, **changes: Any) -> dict[str, Any]:
            record.update(changes, seconds=round(before + seconds, 1))
            return self.journal.write(f'{self.name}.training', digest, record)

        def watch(seconds: float) -> None:
            nonlocal noted, reported
            if seconds - reported >= _REPORT_SECONDS:
                reported = seconds
                done = count_iterations(self.table)
                if done:
                    self.say(f'    iteration {done:,} after {format_duration(seconds)}')
            if seconds - noted >= _NOTE_SECONDS:
                noted = seconds
                note(seconds)

        note(0.0)
        try:
            seconds = self._run_child(self.folder, self.opt, arguments, watch)
        except ChildFailed as error:
            note(error.seconds, iterations=count_iterations(self.table))
            raise
        if not self.weights.is_file():
            raise ChildFailed(f'{self.weights} was not written; best weights require a validation set')
        return note(seconds, is_finished=True, iterations=count_iterations(self.table))

    def _depends_on(self) -> dict[str, Any]:
        """Return everything the weights depend on; validation options only if it selects the weights."""
        opt = {key: value for key, value in self.opt.items() if key not in ('name', 'logger', 'val')}
        if self.settings.weights == 'latest':
            opt['datasets'] = {'train': opt['datasets']['train']}
        else:
            opt['val'] = self.opt.get('val')
        start = (self.opt.get('path') or {}).get('pretrain_network_g')
        start_digest = None if start is None else file_digest(weights_file(Path(os.path.expanduser(start))))
        return {'opt': opt, 'start': start_digest, 'minutes': self.settings.minutes}

    def _iterations_in_budget(self, digest: str) -> int:
        """Return how many iterations fit into the time budget, measured on a short training."""
        record = self.journal.read(f'{self.name}.length', digest)
        if record is not None:
            return record['iterations']
        self.say(f'  measuring the training speed of {self.name}')
        opt = copy.deepcopy(self.opt)
        opt['logger'] = {'print_freq': 1, 'save_checkpoint_freq': 10**9, 'use_tb_logger': False}
        opt['val'], opt['datasets'] = None, {'train': opt['datasets']['train']}
        root = self.folder / 'pace'
        shutil.rmtree(root, ignore_errors=True)
        start: tuple[int, float] | None = None

        def count(seconds: float) -> None:
            nonlocal start
            done = count_iterations(root / 'experiments' / self.name / 'metrics.csv') or 0
            if start is None:
                start = (done, seconds) if done >= _FIRST_COUNTED else None
            elif done - start[0] >= _FEWEST_COUNTED and seconds - start[1] >= _COUNTING_SECONDS:
                raise _SpeedMeasured((done - start[0]) / (seconds - start[1]))

        try:
            self._run_child(root, opt, [], count)
            raise ChildFailed('the training ended before its speed was measured')
        except _SpeedMeasured as measured:
            iterations = max(1, round(60 * self.settings.minutes * measured.args[0]))
        finally:
            shutil.rmtree(root, ignore_errors=True)
        return self.journal.write(f'{self.name}.length', digest, {'iterations': iterations})['iterations']

    def _run_child(
        self, root: Path, opt: dict[str, Any], arguments: Sequence[str], on_wait: Callable[[float], None]
    ) -> float:
        """Train with options, writing under `root`; see `run_child`."""
        file = root / 'options' / f'{self.name}.yml'
        file.parent.mkdir(parents=True, exist_ok=True)
        head = f'# Training options of {self.name} in the comparison {self.folder.name}.\n'
        file.write_text(head + safe_yaml.write_text(opt), encoding='utf-8')
        return run_child(
            'ast_plugin',
            ['train', '-opt', str(file), '--root', str(root), *arguments],
            self.comparison.logs / f'{self.name}.training.log',
            threads=self.settings.threads,
            keep_open=self.comparison.keep_open,
            on_wait=on_wait,
        )

    def _archive_experiment(self) -> None:
        """Rename an existing experiment folder with different options instead of overwriting it."""
        if self.experiment.exists():
            stamp = f'{self.name}_archived_{time.strftime("%Y%m%d_%H%M%S")}'
            names = itertools.chain([stamp], (f'{stamp}_{number}' for number in itertools.count(2)))
            self.experiment.rename(next(p for name in names if not (p := self.experiment.with_name(name)).exists()))


class _SpeedMeasured(Exception):
    """Raised to end a speed measurement; holds the iterations per second."""


def count_iterations(table: Path) -> int | None:
    """Return the last iteration in a run's `metrics.csv`, or None if there is none."""
    try:
        # The last line may be incomplete.
        lines = table.read_bytes().rpartition(b'\n')[0].split(b'\n')
    except OSError:
        return None
    # Damaged rows are skipped; reading backwards keeps this fast, as it is polled during training.
    numbers = (line.partition(b',')[0] for line in reversed(lines))
    return next((int(number) for number in numbers if number.isdigit()), None)
