"""Functions for processes to run; nothing is imported here, as each process would import it again."""

import os
import signal
import time


def slow_for_even(number: int) -> int:
    time.sleep(0.002 * (number % 2 == 0))
    return -number


def die_at_40(number: int) -> int:
    if number == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return number
