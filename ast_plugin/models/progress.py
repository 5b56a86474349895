"""How a run shows itself while it trains: a bar in a terminal, the toolbox's own lines elsewhere."""

import logging
import sys
from collections.abc import Mapping

from tqdm import tqdm


class TrainingProgress:
    """One bar for a whole run, with loss and best value; silent where the error stream is not a terminal.

    The toolbox's log lines go on above the bar.

    Args:
        total_iter: iterations of the run.
        start_iter: iterations already done when it starts.
        logger: the toolbox's logger, whose stream handlers shall not tear the bar.
    """

    def __init__(self, total_iter: int, start_iter: int, logger: logging.Logger) -> None:
        self.best = ''
        self.total_iter = total_iter
        self.bar = tqdm(
            total=total_iter,
            initial=start_iter,
            unit='it',
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
            file=sys.stderr,
        )
        if not self.bar.disable:
            for handler in logger.handlers:
                if type(handler) is logging.StreamHandler:
                    handler.setStream(_AboveTheBar())

    def advance(self, losses: Mapping[str, float]) -> None:
        """Count one iteration and show its losses; the last one closes the bar."""
        if self.bar.disable:
            return
        shown = [f'{name} {value:.4f}' for name, value in losses.items()]
        self.bar.set_postfix_str(', '.join([*shown, self.best]).strip(', '), refresh=False)
        self.bar.update()
        if self.bar.n >= self.total_iter:
            self.bar.close()


class _AboveTheBar:
    """A stream for log handlers that writes its lines above the bar."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end='')

    def flush(self) -> None:
        sys.stderr.flush()
