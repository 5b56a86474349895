"""What a run leaves to look at and to compare: `metrics.csv`, a row an iteration, and `curve.png`."""

import atexit
import csv
import io
import logging
import os
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ast_plugin.errors import FileError
from ast_plugin.files import write_file

FIXED = ('iter', 'epoch', 'lr')  # columns before the losses'
_MOST_ROWS_IN_MEMORY = 1000
_FILE, _CURVE = 'metrics.csv', 'curve.png'
_SECONDS_BETWEEN_CURVES = 60.0
_MOST_SHARE_OF_TIME = 0.01  # that drawing may take


class RunLog:
    """Writes `metrics.csv` and `curve.png` into the experiment's folder.

    The table has a row for every iteration (number, epoch as the toolbox counts it, rate of the first group, losses)
    and one for every validation (number, epoch, and in the columns `dataset/metric` the means). Numbers are written
    in full: they read back as the very floats that they were.

    Rows wait in memory until `flush`, which every so many iterations call, and the end of the process. A training
    state holds how many rows belong to it; a run that goes on from it cuts off what its predecessor wrote after that.

    Args:
        folder: of the experiment; None writes nothing, as do all processes but the first.
        name: of the run, the title of the drawing.
        iters_per_epoch: to tell the epoch from the iteration; None leaves that column empty.
        best_metric: the metric of validation to draw, none if None; with `higher_is_better`.
        flush_every: iterations.
    """

    def __init__(
        self,
        folder: str | Path | None,
        name: str = '',
        iters_per_epoch: int | None = None,
        best_metric: str | None = None,
        higher_is_better: bool = True,
        flush_every: int = _MOST_ROWS_IN_MEMORY,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.name = name
        self.iters_per_epoch = iters_per_epoch
        self.best_metric = best_metric
        self.higher_is_better = higher_is_better
        self.flush_every = min(flush_every, _MOST_ROWS_IN_MEMORY)
        self._columns: list[str] = []
        self._rows: list[dict[str, Any]] = []
        self._num_written = 0
        self._num_to_keep: int | None = None
        self._validated: dict[str, int] = {}  # by dataset: iteration of its last row
        self._is_open = False
        self._num_drawn = 0
        self._due_at = time.monotonic() + _SECONDS_BETWEEN_CURVES

    @classmethod
    def from_options(cls, opt: Mapping[str, Any], rank: int) -> 'RunLog':
        """The log of a run by BasicSR's options."""
        is_kept = opt['is_train'] and rank == 0
        metrics = (opt.get('val') or {}).get('metrics') or {}
        best = (opt.get('val') or {}).get('best_metric') or next(iter(metrics), None)
        return cls(
            opt['path'].get('experiments_root') if is_kept else None,
            opt['name'],
            (opt.get('train') or {}).get('iters_per_epoch'),
            best,
            metrics.get(best, {}).get('better') != 'lower',
            (opt.get('logger') or {}).get('print_freq') or _MOST_ROWS_IN_MEMORY,
        )

    @property
    def table(self) -> Path:
        """The file of numbers."""
        return self.folder / _FILE

    @property
    def curve(self) -> Path:
        """The drawing of them."""
        return self.folder / _CURVE

    def add_iteration(self, current_iter: int, lr: float, losses: Mapping[str, float]) -> None:
        """Note the losses of an iteration."""
        self._add(current_iter, {'lr': lr, **losses})
        if current_iter % self.flush_every == 0:
            self.flush()

    def add_validation(self, current_iter: int, dataset: str, means: Mapping[str, float]) -> None:
        """Note the means of a validation; of each dataset once an iteration, also where a resumed run repeats it."""
        if self._validated.get(dataset) == current_iter:
            return
        self._validated[dataset] = current_iter
        name = ' '.join(dataset.split())
        self._add(current_iter, {f'{name}/{metric}': value for metric, value in means.items()})

    def flush(self, durably: bool = False) -> None:
        """Write what waits, where `durably` down to the disk itself.

        Raises:
            FileError: if that fails.
        """
        if self.folder is None or not self._is_open or not (self._rows or durably):
            return
        try:
            with self.table.open('a', encoding='utf-8', newline='') as file:
                csv.DictWriter(file, self._columns, lineterminator='\n').writerows(self._rows)
                if durably:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise FileError(f'{self.table} cannot be written: {error}') from error
        self._num_written += len(self._rows)
        self._rows.clear()

    def draw(self, at_once: bool = False) -> None:
        """Draw the table anew; not oftener than once a minute, unless `at_once`, and never twice the same.

        A run does not end for want of its picture: where none can be drawn a warning says why.
        """
        self.flush()
        is_due = at_once or time.monotonic() > self._due_at
        if self.folder is None or not self._is_open or not is_due or self._num_drawn == self._num_written:
            return
        start = time.monotonic()
        try:
            from ast_plugin.models.curve import draw_curve

            picture = draw_curve(read_columns(self.table), self.name, self.best_metric, self.higher_is_better)
            write_file(self.curve, picture)
        except (ImportError, FileError) as error:
            logging.getLogger('basicsr').warning(f'{self.curve} is not drawn: {error}')
        self._num_drawn = self._num_written
        end = time.monotonic()
        self._due_at = end + max(_SECONDS_BETWEEN_CURVES, (end - start) / _MOST_SHARE_OF_TIME)

    def state_dict(self) -> dict[str, Any]:
        """How many rows there are up to now; they are on disk before this answers."""
        self.flush(durably=True)
        rows = self._num_written if self._is_open else self._num_to_keep or 0
        return {'rows': rows, 'validated': dict(self._validated)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind that many rows: call it before the first iteration."""
        self._num_to_keep = state['rows']
        self._validated = dict(state['validated'])

    def _add(self, current_iter: int, values: Mapping[str, float]) -> None:
        if self.folder is None:
            return
        if not self._is_open:
            self._open(current_iter)
        new = [name for name in values if name not in self._columns]
        if new:
            self._add_columns(new)
        epoch = (current_iter - 1) // self.iters_per_epoch if self.iters_per_epoch else ''
        exact = {name: repr(float(value)) for name, value in values.items()}
        self._rows.append({'iter': current_iter, 'epoch': epoch, **exact})

    def _open(self, current_iter: int) -> None:
        """Keep the rows of the state that is resumed; without one, those of earlier iterations."""
        header, rows = _read_lines(self.table) if self._goes_on(current_iter) else ('', [])
        if self._num_to_keep is None:
            self._num_to_keep = sum(int(row.partition(',')[0]) < current_iter for row in rows)
        self._columns = next(csv.reader([header])) if header else [*FIXED]
        self._rewrite(rows[: self._num_to_keep])
        self._is_open = True
        atexit.register(self._flush_at_the_end)  # of a run that fails, too: the last losses tell most about it

    def _flush_at_the_end(self) -> None:
        with suppress(FileError):
            self.flush()

    def _goes_on(self, current_iter: int) -> bool:
        return self.table.is_file() and (current_iter > 1 or self._num_to_keep is not None)

    def _add_columns(self, names: Sequence[str]) -> None:
        self.flush()
        self._columns += names
        self._rewrite([row + ',' * len(names) for row in _read_lines(self.table)[1]])

    def _rewrite(self, rows: Sequence[str]) -> None:
        """Write the table with these lines, whole or not at all."""
        header = io.StringIO()
        csv.writer(header, lineterminator='').writerow(self._columns)
        text = '\n'.join([header.getvalue(), *rows, ''])
        write_file(self.table, text.encode())
        self._num_written = len(rows)


def read_columns(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each column of a `metrics.csv` the iterations that have a value there, and the values."""
    header, rows = _read_lines(path)
    columns = {name: (array('q'), array('d')) for name in next(csv.reader([header]), [])}
    for row in csv.reader(rows):
        for (iterations, values), value in zip(columns.values(), row, strict=True):
            if value:
                iterations.append(int(row[0]))
                values.append(float(value))
    return {name: (np.array(iterations), np.array(values)) for name, (iterations, values) in columns.items()}


def _read_lines(path: Path) -> tuple[str, list[str]]:
    """The header and the rows, without a last row that a killed run has left unfinished."""
    header, *rows, _unfinished = path.read_text(encoding='utf-8').split('\n')
    return header, rows
