"""Tests of the progress bar, metrics.csv and curve.png: completeness, precision, and truncation on resume."""

import csv
import io
import logging
import math
import os
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ast_plugin.models.run_log import RunLog, TrainingProgress, close_bars, draw_curve, read_columns, smoothed
from ast_plugin.models.training_run import _lock_and_save_on_error

LOSS = 0.1 + 0.2  # has seventeen digits


def rows(folder) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / 'metrics.csv').read_text())))


def iterations(folder) -> list[str]:
    return [row['iter'] for row in rows(folder)]


def log_of(folder, first, last, **options) -> RunLog:
    log = RunLog(folder, 'run', **options)
    add(log, first, last)
    return log


def add(log, first, last) -> None:
    for iteration in range(first, last + 1):
        log.add_iteration(iteration, 1e-3, {'l_pix': LOSS / iteration})


def test_table_is_complete_and_exact(tmp_path):
    log = log_of(tmp_path, 1, 3, iters_per_epoch=2, flush_every=2)
    assert iterations(tmp_path) == ['1', '2']
    log.add_validation(3, 'rain,\nheavy', {'psnr': 30.125, 'ssim': 1 / 3})
    log.flush()
    table = rows(tmp_path)
    assert list(table[0]) == ['iter', 'epoch', 'lr', 'l_pix', 'rain, heavy/psnr', 'rain, heavy/ssim']
    assert [row['iter'] for row in table] == ['1', '2', '3', '3']
    assert [row['epoch'] for row in table] == ['0', '0', '1', '1']
    assert table[3]['l_pix'] == ''
    columns = read_columns(tmp_path / 'metrics.csv')
    assert columns['l_pix'][1].tolist() == [LOSS, LOSS / 2, LOSS / 3]
    assert [column.tolist() for column in columns['rain, heavy/ssim']] == [[3], [1 / 3]]


def test_rows_of_a_run_that_fails_are_written(tmp_path, monkeypatch):
    at_exit = []
    monkeypatch.setattr('atexit.register', at_exit.append)
    log = RunLog(tmp_path, flush_every=100)
    for loss in (1.0, math.nan):
        log.add_iteration(1, 1e-3, {'l_pix': loss})
    assert not rows(tmp_path)
    module = SimpleNamespace(build_model=lambda opt: SimpleNamespace(run_log=log))
    with pytest.raises(ZeroDivisionError), _lock_and_save_on_error(module, None):
        module.build_model({})
        1 / 0  # noqa: B018
    assert [row['l_pix'] for row in rows(tmp_path)] == ['1.0', 'nan']
    log_of(tmp_path, 1, 1).flush()  # another run in the same process
    at_exit[0]()
    assert len(rows(tmp_path)) == 1


def test_table_is_synced_with_a_state(tmp_path, monkeypatch):
    log = log_of(tmp_path, 1, 2, flush_every=1)  # nothing is buffered
    synced = []
    monkeypatch.setattr('os.fsync', lambda file: synced.append(os.fstat(file).st_ino))
    log.flush()
    assert not synced
    log.flush(durably=True)
    assert synced == [(tmp_path / 'metrics.csv').stat().st_ino]


@pytest.mark.parametrize('failing', ['ast_plugin.models.run_log.write_file', 'os.fsync'])
def test_a_loss_that_comes_later_gets_a_column(tmp_path, monkeypatch, failing):
    log = log_of(tmp_path, 1, 2)
    log.flush()
    log.add_iteration(3, 1e-3, {'l_pix': 1.0, 'l_style': 2.0})
    with monkeypatch.context() as patch:
        patch.setattr(failing, lambda *_: os.stat('missing'))
        log.flush(durably=True)
    log.flush()
    assert [row['l_style'] for row in rows(tmp_path)] == ['', '', '2.0']
    assert (tmp_path / 'metrics.csv').read_text().startswith('iter,epoch,lr,l_pix,l_style\n')


EVENTS = [(1, None), (1, 'rain'), (1, 'haze'), (2, None), (3, None), (3, 'rain'), (3, 'haze')]
"""Iterations of a run and their validations, by dataset. States are saved between training and validation."""


def play(folder, events) -> None:
    log = RunLog(folder)
    for iteration, dataset in events:
        if dataset is None:
            add(log, iteration, iteration)
        else:
            log.add_validation(iteration, dataset, {'psnr': 30.0})
    log.flush()


@pytest.mark.parametrize('first', [1, 3, 4, 5])
def test_resumed_run_repeats_its_rows(tmp_path, first):
    play(tmp_path, EVENTS)
    whole = (tmp_path / 'metrics.csv').read_text()
    with (tmp_path / 'metrics.csv').open('a') as file:
        file.write('4,,0.001,0.03')  # a line truncated by the kill
    play(tmp_path, EVENTS[first:])
    assert (tmp_path / 'metrics.csv').read_text() == whole
    play(tmp_path, EVENTS[:1])  # a new run
    assert list(rows(tmp_path)[0]) == ['iter', 'epoch', 'lr', 'l_pix'] and iterations(tmp_path) == ['1']


def test_only_the_first_process_writes(tmp_path):
    opt = {'name': 'run', 'is_train': True, 'path': {'experiments_root': str(tmp_path)}}
    for rank, is_train in ((1, True), (0, False)):
        log = RunLog.from_options({**opt, 'is_train': is_train}, rank)
        add(log, 1, 3)
        log.draw(at_once=True)
    assert not list(tmp_path.iterdir())


def test_log_that_cannot_be_written(tmp_path, caplog):
    log = log_of(tmp_path, 1, 2)
    table = tmp_path / 'metrics.csv'
    table.unlink()
    table.mkdir()
    log.flush()
    add(log, 3, 3)
    assert 'metrics.csv cannot be written, its rows are kept in memory' in caplog.text
    table.rmdir()
    log.flush()
    assert iterations(tmp_path) == ['1', '2', '3']


def test_curve_is_drawn_at_the_end(tmp_path):
    log = log_of(tmp_path, 1, 4, best_metric='psnr')
    log.add_validation(4, 'rain', {'psnr': 30.0})
    log.draw()
    assert not (tmp_path / 'curve.png').exists()  # less than a minute has passed
    log.draw(at_once=True)
    assert Image.open(tmp_path / 'curve.png').width > 800
    drawn_at = (tmp_path / 'curve.png').stat().st_mtime_ns
    log.draw(at_once=True)
    assert (tmp_path / 'curve.png').stat().st_mtime_ns == drawn_at  # no new rows


@pytest.mark.parametrize(
    'losses', [[], [math.nan], [0.0, 0.1], [-1.0, math.inf, 2.0], [1.0, 0.5, 0.001]], ids=lambda losses: str(losses)
)
def test_any_losses_can_be_drawn(losses):
    numbers = np.arange(1, len(losses) + 1)
    columns = {'iter': (numbers, numbers), 'lr': (numbers, numbers * 1e-3)}
    columns |= dict.fromkeys(('l_pix', 'rain/psnr'), (numbers, np.array(losses, float)))
    assert draw_curve(columns, 'a run', 'psnr').startswith(b'\x89PNG')


def test_smooth_curve_looks_back():
    smooth = smoothed(np.array([1.0] * 100 + [math.nan] + [3.0] * 99))
    assert smooth[99] == 1 and smooth[-1] == 3 and smooth[101] == pytest.approx((1 * 2 + 3) / 3)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(progress, iterations, seconds=0.0):
    for _ in range(iterations):
        progress.begin()
        progress.advance({'l_pix': 0.03125})
        time.sleep(seconds)


def test_a_terminal_shows_all_of_it(monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    logger = logging.Logger('toolbox')
    logger.addHandler(logging.StreamHandler())
    progress = TrainingProgress(10, 4, logger)
    progress.best = 'best psnr 31.20'
    show(progress, 5, 0.11)  # redrawn at most ten times per second
    logger.info('a line')
    show(progress, 1)
    shown = sys.stderr.getvalue()
    for part in ('| 9/10 [', '10/10', 'l_pix 0.0312', 'data ', 'best psnr 31.20', 'it/s', '<00:0'):
        assert part in shown, part
    assert sys.platform == 'win32' or 0.05 < float(re.search(r'([\d.]+) GB', shown)[1]) < 100
    assert any(line.strip() == 'a line' for line in shown.replace('\r', '\n').splitlines())
    assert progress.bar.disable  # closed after the last iteration


def test_a_file_and_other_processes_get_nothing(monkeypatch):
    for stream, is_shown in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, 'stderr', stream)
        show(TrainingProgress(2, 0, logging.Logger('toolbox'), is_shown=is_shown), 2)
        assert stream.getvalue() == ''


def test_share_of_waiting_for_data(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr('ast_plugin.models.run_log.time', clock)
    progress = TrainingProgress(100, 0, logging.Logger('toolbox'), is_shown=False)
    assert progress.data_share == 0
    for _ in range(100):
        clock.now += 1  # waits
        progress.begin()
        clock.now += 3  # works
        progress.advance({})
        clock.now += 50  # validates
        progress.pause()
    assert progress.data_share == pytest.approx(0.25, abs=0.01)


def test_a_bar_of_a_failed_run_is_closed(monkeypatch):
    monkeypatch.setattr(sys, 'stderr', Terminal())
    show(TrainingProgress(10, 0, logging.Logger('toolbox')), 1)
    close_bars()
    assert sys.stderr.getvalue().endswith('\n')
