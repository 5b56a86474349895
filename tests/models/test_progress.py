"""What a terminal shows of a run; a file gets the toolbox's lines alone."""

import io
import logging
import sys
import time

import pytest
import torch

from ast_plugin.models.run_log import TrainingProgress, close_bars, memory


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def train(progress, iterations):
    for _ in range(iterations):
        progress.begin()
        progress.advance({'l_pix': 0.03125})
        time.sleep(0.11)  # the bar is drawn ten times a second at most


def test_a_terminal_shows_all_of_it(monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    monkeypatch.setattr(sys, 'stderr', Terminal())
    logger = logging.Logger('toolbox')
    logger.addHandler(logging.StreamHandler())
    progress = TrainingProgress(10, 4, logger)
    progress.best = 'best psnr 31.20'
    train(progress, 5)
    logger.info('a line')
    train(progress, 1)
    shown = sys.stderr.getvalue()
    for part in ('| 9/10 [', '10/10', 'l_pix 0.0312', 'data ', ' GB', 'best psnr 31.20', 'it/s', '<00:0'):
        assert part in shown, part
    assert any(line.strip() == 'a line' for line in shown.replace('\r', '\n').splitlines())
    assert progress.bar.disable  # closed: it was the last iteration


def test_a_file_and_other_processes_get_nothing(monkeypatch):
    for stream, is_shown in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, 'stderr', stream)
        train(TrainingProgress(2, 0, logging.Logger('toolbox'), is_shown=is_shown), 2)
        assert stream.getvalue() == ''


def test_share_of_waiting_for_data(monkeypatch):
    clock = Clock()
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
    train(TrainingProgress(10, 0, logging.Logger('toolbox')), 1)
    close_bars()
    assert sys.stderr.getvalue().endswith('\n')


def test_memory_of_this_process():
    if sys.platform == 'win32':
        pytest.skip('the system does not tell')
    assert 0.05 < float(memory(torch.device('cpu')).removesuffix(' GB')) < 100
