"""Signals as requests, in processes of their own where they would end this one."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ast_plugin.models import stop_signals

ROOT = Path(__file__).parents[2]


def run(code: str) -> subprocess.CompletedProcess:
    lines = ['import os, signal, sys, time', 'from ast_plugin.models import stop_signals', code]
    return subprocess.run([sys.executable, '-c', '\n'.join(lines)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize('number', stop_signals.SIGNALS)
def test_the_first_signal_is_a_request_and_leaves_no_trace(number, capfd):
    before = signal.getsignal(number)
    with stop_signals.heeded():
        assert stop_signals.received() is None
        os.kill(os.getpid(), number)
        assert stop_signals.received() == number
    assert stop_signals.received() is None
    assert signal.getsignal(number) == before
    assert f'basicsr: {signal.Signals(number).name}: saving; once more ends it at once' in capfd.readouterr().err


def test_the_second_signal_ends_the_process():
    twice = 'with stop_signals.heeded():\n  for _ in range(2): os.kill(os.getpid(), signal.{}); time.sleep(0.01)\n'
    assert run(twice.format('SIGTERM')).returncode == -signal.SIGTERM
    interrupted = run(twice.format('SIGINT') + 'print("unreachable")')
    assert 'KeyboardInterrupt' in interrupted.stderr and not interrupted.stdout


def test_what_the_process_was_started_to_ignore_stays_ignored():
    result = run(
        'signal.signal(signal.SIGINT, signal.SIG_IGN)\n'
        'with stop_signals.heeded():\n'
        '  for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n'
        '  print(stop_signals.received())'
    )
    assert result.stdout == 'None\n', result.stderr


def test_children_do_not_take_requests():
    result = run(
        'with stop_signals.heeded():\n'
        '  if os.fork() == 0:\n'
        '    os.kill(os.getpid(), signal.SIGINT); os._exit(stop_signals.received() or 0)\n'
        '  print(os.wait()[1])'
    )
    assert (result.stdout, result.stderr) == ('0\n', '')


def test_other_threads_train_without_signals():
    entered = []

    def enter():
        with stop_signals.heeded():
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered
