"""Functions run in processes. Large imports are avoided, as each process would repeat them."""

import os
import signal
import sys
import threading
import time


def slow_for_even(number: int) -> int:
    time.sleep(0.002 * (number % 2 == 0))
    return -number


def die_at_40(number: int) -> int:
    if number == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def run_command(arguments: list[str]) -> None:
    from tqdm import tqdm

    from ast_plugin.cli.main import main

    tqdm.set_lock(threading.RLock())  # a lock between processes would remain after a kill
    sys.exit(main(arguments))
