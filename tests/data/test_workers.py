"""Workers return results in order and are not reached by signals to the process group."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from select import select

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ast_plugin.data import workers
from ast_plugin.data.workers import BATCH, map_ahead, map_in_processes
from ast_plugin.errors import DataError
from tests.data.work import die_at_40, slow_for_even


class Groups(Dataset):
    """Process group of the worker that prepares a sample, and the number of signals it ignores."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([os.getpgrp(), len(signal.pthread_sigmask(signal.SIG_BLOCK, []) & workers.STOP_SIGNALS)])


@pytest.mark.parametrize(('method', 'count'), [('fork', 2), ('spawn', 1)])  # spawned processes import torch first
def test_workers_have_groups_of_their_own(method, count):
    initialize = partial(workers.start_apart, [].append if method == 'fork' else None)
    loader = DataLoader(Groups(), 1, num_workers=count, worker_init_fn=initialize, multiprocessing_context=method)
    with workers.block_signals():
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= workers.STOP_SIGNALS
        iterator = iter(loader)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & workers.STOP_SIGNALS
    groups = {int(group) for sample in iterator for group, blocked in sample if blocked == 0}
    assert len(groups) == count and os.getpgrp() not in groups


@pytest.mark.parametrize(('sender', 'status'), [('the group', 7), ('the parent', 0)])
def test_what_comes_while_a_worker_starts(sender, status):
    reader, writer = os.pipe()
    with workers.block_signals():
        child = os.fork()
        if child == 0:
            os.read(reader, 1)
            if sender == 'the group':
                os.kill(os.getpid(), signal.SIGTERM)
            workers.start_apart(None, 0)
            os._exit(7)
    if sender == 'the parent':
        os.kill(child, signal.SIGTERM)
    os.write(writer, b'.')
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
    os.close(reader)
    os.close(writer)


def test_workers_leave_with_a_killed_parent():
    """The parent may die holding a lock that they wait for, such as that of the event that ends them."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        loader = DataLoader(Groups(), 1, num_workers=2, worker_init_fn=partial(workers.start_apart, None))
        iterator = iter(loader)
        next(iterator)
        iterator._workers_done_event._cond.acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert select([reader], [], [], 20)[0], 'workers still hold the pipe'
    os.close(reader)


def test_work_comes_in_order_as_it_is_needed():
    assert list(map_in_processes(slow_for_even, range(9), 1)) == [-number for number in range(9)]
    assert list(map_in_processes(slow_for_even, [], 2)) == []
    taken = 0

    def items():
        nonlocal taken
        for number in range(100_000):
            taken += 1
            yield number

    results = map_in_processes(slow_for_even, items(), 2)
    assert [next(results) for _ in range(100)] == [-number for number in range(100)]
    assert taken <= 15 * BATCH
    results.close()
    taken = 0
    results = map_ahead(ThreadPoolExecutor(1), slow_for_even, items(), 2)
    assert next(results) == 0 and taken == 3
    results.close()


def test_a_killed_process_is_reported():
    with pytest.raises(DataError, match='was killed, most likely because memory ran out; use fewer with --workers'):
        list(map_in_processes(die_at_40, range(1000), 2))
