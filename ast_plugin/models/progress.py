"""How a run shows itself while it trains: a bar in a terminal, the toolbox's own lines elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping

import torch
from tqdm import tqdm

_MEMORY = 0.9  # how much of the mean wait is kept from one iteration to the next


class TrainingProgress:
    """One bar for a whole run, where stderr is a terminal; the toolbox's log lines go on above it.

    It shows losses, rate, remaining time, share of waiting for data, memory, best value.

    Args:
        total_iter, start_iter: iterations of the run, and those already done.
        logger: the toolbox's, whose stream handlers shall not tear the bar.
        device: whose memory is shown; of a CPU the process's.
        is_shown: False for all processes but the first.
    """

    def __init__(
        self,
        total_iter: int,
        start_iter: int,
        logger: logging.Logger,
        device: torch.device | None = None,
        is_shown: bool = True,
    ) -> None:
        self.best = ''
        self.total_iter = total_iter
        self.device = device or torch.device('cpu')
        self.waited = self.worked = 0.0  # seconds an iteration, means of late
        self._stamp: float | None = None
        self.bar = tqdm(
            total=total_iter,
            initial=start_iter,
            unit='it',
            dynamic_ncols=True,
            smoothing=0.1,
            disable=not (is_shown and sys.stderr.isatty()),
            file=sys.stderr,
        )
        for handler in logger.handlers if not self.bar.disable else ():
            if type(handler) is logging.StreamHandler:
                handler.setStream(_AboveTheBar())

    @property
    def data_share(self) -> float:
        """Share of the time that went by waiting for data, in [0, 1]."""
        return self.waited / (self.waited + self.worked) if self.waited + self.worked else 0.0

    def begin(self) -> None:
        """Note that the data of an iteration are here."""
        self.waited += (1 - _MEMORY) * self._lap(self.waited)

    def pause(self) -> None:
        """Note that something else than waiting for data has taken time up to now: a validation, a write."""
        self._stamp = time.perf_counter()

    def advance(self, losses: Mapping[str, float]) -> None:
        """Count one iteration and show its losses; the last one closes the bar."""
        self.worked += (1 - _MEMORY) * self._lap(self.worked)
        if self.bar.disable:
            return
        shown = [f'{name} {value:.4f}' for name, value in losses.items()]
        shown += [f'data {self.data_share:.0%}', memory(self.device), self.best]
        self.bar.set_postfix_str(', '.join(filter(None, shown)), refresh=False)
        self.bar.update()
        if self.bar.n >= self.total_iter:
            self.bar.close()

    def _lap(self, usual: float) -> float:
        """By how much the time since the last call is longer than usual."""
        before, self._stamp = self._stamp, time.perf_counter()
        return 0.0 if before is None else self._stamp - before - usual


def close_bars() -> None:
    """Leave every bar as it stands, those of a run that has failed too; what is printed next begins a line."""
    for bar in list(getattr(tqdm, '_instances', ())):
        bar.close()


def memory(device: torch.device) -> str:
    """Return the most memory so far, of a GPU by tensors, of a CPU by this process; empty if that is not known."""
    if device.type == 'cuda':
        return f'{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB'
    try:
        import resource
    except ImportError:  # Windows
        return ''
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f'{peak * (1 if sys.platform == "darwin" else 1024) / 1e9:.1f} GB'


class _AboveTheBar:
    """A stream for log handlers that writes its lines above the bar."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end='')

    def flush(self) -> None:
        sys.stderr.flush()
