"""Work on several processes: in order, a little at a time, and told when one dies."""

import os
import signal
import time

import pytest

from ast_plugin.data.workers import BATCH, map_in_processes, num_cores
from ast_plugin.errors import DataError


def slow_for_even(number: int) -> int:
    time.sleep(0.002 * (number % 2 == 0))
    return -number


def die_at_40(number: int) -> int:
    if number == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize('workers', [1, 2])
def test_order(workers):
    assert list(map_in_processes(slow_for_even, range(100), workers)) == [-number for number in range(100)]
    assert list(map_in_processes(slow_for_even, [], workers)) == []


def test_items_are_taken_as_they_are_needed():
    taken = 0

    def items():
        nonlocal taken
        for number in range(100_000):
            taken += 1
            yield number

    results = map_in_processes(slow_for_even, items(), 2)
    assert next(results) == 0
    assert taken <= 8 * BATCH
    results.close()


def test_a_killed_process_is_told():
    with pytest.raises(DataError, match='was killed, most likely because memory ran out; use fewer with --workers'):
        list(map_in_processes(die_at_40, range(1000), 2))


def test_cores():
    assert 1 <= num_cores() <= os.cpu_count()
