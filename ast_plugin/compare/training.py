"""Trains one network of a comparison by `basicsr train`, in a process of its own; what was begun goes on."""

from __future__ import annotations

import copy
import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ast_plugin.compare.child import run_child
from ast_plugin.compare.formats import duration
from ast_plugin.compare.journal import Journal, digest
from ast_plugin.compare.machine import describe_machine, installed_versions
from ast_plugin.files import file_digest
from ast_plugin.options import safe_yaml

_WEIGHTS = {'latest': 'net_g_latest.pth', 'best': 'net_g_best.pth'}
_NOTE_SECONDS, _TELL_SECONDS = 5.0, 30.0  # between notes of the time taken, and between lines about it
# Iterations that set the pace where networks get minutes: the first ones are slow, enough of the rest are counted.
_FIRST_COUNTED, _FEWEST_COUNTED, _COUNTING_SECONDS = 3, 5, 20.0


class TrainingFailed(Exception):
    """A network could not be trained; the message says why."""


class _PaceFound(Exception):
    """Enough iterations have been counted."""


class Training:
    """The training of one network.

    Args:
        name: of the network, and of its experiment.
        opt: the option file that trains it.
        folder: of the comparison; experiments go to `experiments/` in it.
        journal: where it is noted what is done.
        settings: the section `compare`.
        keep_open: descriptors that processes inherit.
    """

    def __init__(
        self,
        name: str,
        opt: Mapping[str, Any],
        folder: Path,
        journal: Journal,
        settings: Mapping[str, Any],
        keep_open: Sequence[int] = (),
    ) -> None:
        self.name, self.folder, self.journal = name, folder, journal
        self.settings, self.keep_open = settings, keep_open
        self.opt = copy.deepcopy(dict(opt))
        self.experiment = folder / 'experiments' / name
        self.weights = self.experiment / 'models' / _WEIGHTS[settings['weights']]

    def run(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
        """Train, or find it done.

        Returns:
            The weights, and `iterations`, `seconds`, `versions` and `machine` of the training.
        Raises:
            TrainingFailed: if it did not get to its end.
        """
        wanted = digest(self._depends_on())
        if self.settings['minutes']:
            self.opt['train']['total_iter'] = self._length(wanted, say)
        note = f'{self.name}.training'
        record = self.journal.read(note, wanted)
        if record is not None and record['is_finished'] and self.weights.is_file():
            return self.weights, record
        goes_on = record is not None
        if not goes_on:
            self._put_aside()
            record = {
                'is_finished': False,
                'iterations': None,
                'seconds': 0.0,
                'versions': installed_versions(),
                'machine': describe_machine(),
            }
            self.journal.write(note, wanted, record)
        before = record['seconds']
        say(f'  training {self.name}' + (f', going on after {duration(before)}' if goes_on else ''))
        watch = _Watch(self.experiment / 'metrics.csv', say)

        def note_time(seconds: float) -> None:
            if watch.is_due(seconds):
                record['seconds'] = round(before + seconds, 1)
                self.journal.write(note, wanted, record)

        arguments = ['train', '-opt', str(self._option_file(self.opt)), '--root', str(self.folder)]
        arguments += ['--auto_resume'] if goes_on else []
        outcome = run_child(
            'ast_plugin', arguments, self._log, keep_open=self.keep_open, threads=self._threads, on_wait=note_time
        )
        record['seconds'] = round(before + outcome.seconds, 1)
        if outcome.status == 0 and not self.weights.is_file():
            raise TrainingFailed(f'it left no {self.weights}; is a validation set there to find the best weights by?')
        record['is_finished'] = outcome.status == 0
        record['iterations'] = count_iterations(self.experiment / 'metrics.csv')
        record = self.journal.write(note, wanted, record)
        if outcome.status != 0:
            raise TrainingFailed(outcome.reason)
        say(f'  trained {self.name} in {duration(record["seconds"])}')
        return self.weights, record

    def _depends_on(self) -> dict[str, Any]:
        """All that the weights depend on. How they are validated matters only where the best are taken."""
        opt = {key: value for key, value in self.opt.items() if key not in ('name', 'logger', 'val')}
        if self.settings['weights'] == 'latest':
            opt['datasets'] = {'train': opt['datasets']['train']}
        else:
            opt['val'] = self.opt.get('val')
        start = (self.opt.get('path') or {}).get('pretrain_network_g')
        return {
            'opt': opt,
            'start': None if start is None else file_digest(Path(start).expanduser()),
            'minutes': self.settings['minutes'],
        }

    def _length(self, wanted: str, say: Callable[[str], None]) -> int:
        """How many iterations fit into the minutes that a network gets: found by running a few of them."""
        note = f'{self.name}.length'
        record = self.journal.read(note, wanted)
        if record is None:
            say(f'  finding the pace of {self.name}')
            opt = copy.deepcopy(self.opt)
            opt['name'] = f'{self.name}_pace'
            opt['logger'] = {**opt['logger'], 'print_freq': 1, 'save_checkpoint_freq': 10**9, 'use_tb_logger': False}
            opt['logger'].pop('save_checkpoint_epochs', None)
            opt['val'] = None
            opt['datasets'] = {'train': opt['datasets']['train']}
            pace = _Pace(self.folder / 'experiments' / opt['name'] / 'metrics.csv')
            shutil.rmtree(pace.table.parent, ignore_errors=True)
            arguments = ['train', '-opt', str(self._option_file(opt)), '--root', str(self.folder)]
            try:
                outcome = run_child(
                    'ast_plugin',
                    arguments,
                    self._log,
                    keep_open=self.keep_open,
                    threads=self._threads,
                    on_wait=pace.count,
                )
            except _PaceFound:
                pass
            else:
                raise TrainingFailed(outcome.reason or 'its pace could not be found, it ended too early')
            finally:
                shutil.rmtree(pace.table.parent, ignore_errors=True)
            iterations = max(1, round(60 * self.settings['minutes'] * pace.per_second))
            record = self.journal.write(note, wanted, {'iterations': iterations, 'per_second': pace.per_second})
        return record['iterations']

    def _option_file(self, opt: Mapping[str, Any]) -> Path:
        path = self.folder / 'options' / f'{opt["name"]}.yml'
        path.parent.mkdir(exist_ok=True)
        head = f'# {opt["name"]}, as the comparison in {self.folder.name} trains it.\n'
        path.write_text(head + safe_yaml.write_text(dict(opt)), encoding='utf-8')
        return path

    def _put_aside(self) -> None:
        """An experiment of other options keeps its weights under another name."""
        if self.experiment.exists():
            stamp = f'{self.name}_archived_{time.strftime("%Y%m%d_%H%M%S")}'
            names = itertools.chain([stamp], (f'{stamp}_{number}' for number in itertools.count(2)))
            free = (path for name in names if not (path := self.experiment.with_name(name)).exists())
            self.experiment.rename(next(free))

    @property
    def _log(self) -> Path:
        return self.folder / 'logs' / f'{self.name}.training.log'

    @property
    def _threads(self) -> int | None:
        return self.settings['threads']


class _Watch:
    """Tells of a training what its log shows, and when the time it has taken is to be noted."""

    def __init__(self, table: Path, say: Callable[[str], None]) -> None:
        self.table, self.say = table, say
        self.noted = self.told = 0.0

    def is_due(self, seconds: float) -> bool:
        if seconds - self.told >= _TELL_SECONDS:
            self.told = seconds
            done = count_iterations(self.table)
            if done:
                self.say(f'    iteration {done:,} after {duration(seconds)}')
        if seconds - self.noted < _NOTE_SECONDS:
            return False
        self.noted = seconds
        return True


class _Pace:
    """Counts iterations as they come, and leaves by `_PaceFound` when it knows how many there are in a second."""

    def __init__(self, table: Path) -> None:
        self.table = table
        self.per_second = 0.0
        self._start: tuple[int, float] | None = None

    def count(self, seconds: float) -> None:
        done = count_iterations(self.table) or 0
        if self._start is None:
            self._start = (done, seconds) if done >= _FIRST_COUNTED else None
            return
        first, start = self._start
        if done - first >= _FEWEST_COUNTED and seconds - start >= _COUNTING_SECONDS:
            self.per_second = (done - first) / (seconds - start)
            raise _PaceFound


def count_iterations(table: Path) -> int | None:
    """The last iteration in a run's `metrics.csv`; None if there is none."""
    try:
        # The last line may just be being written.
        lines = table.read_text(encoding='utf-8').rpartition('\n')[0].splitlines()
    except OSError:
        return None
    numbers = [line.partition(',')[0] for line in lines[1:]]
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


def training_curves(table: Path) -> Mapping[str, Any]:
    """The columns of a run's `metrics.csv`; empty if it left none."""
    from ast_plugin.models.run_log import read_columns

    try:
        return read_columns(table)
    except (OSError, ValueError):
        return {}
