"""Tests of process groups and stop signals; signals that would end this process are sent to child processes."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ast_plugin.models.processes import catch_signals, received_signal

PROGRAM = """
import atexit, gc, tempfile, weakref
import torch.distributed as dist
from ast_plugin.models.processes import leave

gc.disable()
atexit.register(print, 'the interpreter ends')
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
    class Cycle: pass
    holder = Cycle()
    holder.itself, holder.group = holder, dist.new_group([0])
    weakref.finalize(holder, print, 'its connection is gone').atexit = False
    leave()
    del holder
print(dist.is_initialized())
"""


def test_no_connection_outlives_interpreter():
    """If gloo's threads outlive the interpreter, a finished process sometimes ends with SIGABRT."""
    done = subprocess.run([sys.executable, '-c', PROGRAM], text=True, capture_output=True, timeout=120, check=True)
    assert done.stdout.split('\n')[:3] == ['False', 'its connection is gone', 'the interpreter ends']


def end_of_child(function) -> int:
    """Return the exit status of a child process: the result of a function, or a signal as a negative number."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = function()
        except KeyboardInterrupt:
            status = 77
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def send(number: int, times: int) -> int:
    with catch_signals():
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return received_signal() or 0


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_a_request(number, capfd):
    before = signal.getsignal(number)
    with catch_signals():
        assert received_signal() is None
        os.kill(os.getpid(), number)
        assert received_signal() == number
    assert received_signal() is None
    assert signal.getsignal(number) == before
    assert f'basicsr: {signal.Signals(number).name}: saving; a second signal exits at once' in capfd.readouterr().err


def test_second_signal_ends_the_process():
    assert end_of_child(lambda: send(signal.SIGTERM, 2)) == -signal.SIGTERM
    assert end_of_child(lambda: send(signal.SIGINT, 2)) == 77
    assert end_of_child(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) and send(signal.SIGINT, 2)) == 0  # ignored


def test_closed_terminal_is_a_request():
    """A shell repeats SIGHUP; writing to a closed terminal raises EIO."""

    def print_after_hangup():
        terminal, output = os.openpty()
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored if the tests run under nohup
        with catch_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            os.close(terminal)
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(1, b'x')
            return received_signal()

    assert end_of_child(print_after_hangup) == signal.SIGHUP


def test_children_do_not_take_requests():
    with catch_signals():
        assert end_of_child(lambda: os.kill(os.getpid(), signal.SIGINT) or received_signal() or 0) == 0


def test_other_threads_go_without_signals():
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(send, signal.SIGCONT, 0).result() == 0
