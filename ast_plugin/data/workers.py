"""The processes that prepare data."""

import os
from collections.abc import Callable


def start_apart(worker_init: Callable[[int], None] | None, worker: int) -> None:
    """Put a worker out of reach of the signals that terminals and launchers send to a whole group of processes.

    They are meant for the process that trains; it saves, and ends its workers itself.

    Args:
        worker_init: what else is done when a worker starts, None for nothing.
        worker: its number.
    """
    if hasattr(os, 'setpgrp'):  # not on Windows
        os.setpgrp()
    if worker_init is not None:
        worker_init(worker)
