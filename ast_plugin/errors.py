"""What can go wrong, by kind. Every message says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

_MEMORY = re.compile(
    r'out of memory|(allocate|insufficient|not enough) memory|failed to allocate|bad_alloc|ALLOC_FAILED', re.IGNORECASE
)


class PluginError(Exception):
    """Base of the errors a user can mend. The command line prints the message and exits with status 2."""


class OptionError(PluginError, ValueError):
    """An option file or command-line argument is wrong."""


class MemoryShortage(OptionError):
    """An image does not fit in memory in the way that was asked for."""


class DataError(PluginError, ValueError):
    """An image, a folder or a list of pairs cannot be used."""


class CheckpointError(PluginError, RuntimeError):
    """A weights or state file cannot be read, is unsafe, or belongs to another network."""


class FileError(PluginError, RuntimeError):
    """A file cannot be written, or another process is at work in its folder."""


class TrainingError(PluginError, RuntimeError):
    """Training cannot go on as it is: its numbers are no longer finite."""


class ShapeError(PluginError, ValueError):
    """A tensor does not have the shape that the called function documents."""


class BackendUnavailable(PluginError, RuntimeError):
    """A backend asked for by name cannot run here."""


def out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, by the error's type or, as libraries have no common one, by its words."""
    return isinstance(error, MemoryError | MemoryShortage) or bool(_MEMORY.search(str(error)))


def one_line(error: BaseException) -> str:
    """All that an error of somebody's code says, in a line of at most some 300 characters; else its name."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]}…'


def first_line(error: BaseException) -> str:
    """The first line of what an error of somebody's code says, or its name: torch's go on with what helps nobody."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def class_of_failure(error: Exception, stage: str) -> str:
    """Return the class of what failed one item of a batch, whose other items go on: 'memory', or the stage.

    Args:
        error: any error of any code.
        stage: 'unreadable', 'network', 'metric' or 'unwritable'.
    Raises:
        The error, where no other item would fare better: wrong options, a missing backend, a disk that takes no more.
    """
    if out_of_memory(error):
        return 'memory'
    if isinstance(error, OptionError | BackendUnavailable | FileError):
        raise error
    return stage


@contextmanager
def tell_place(place: str) -> Iterator[None]:
    """Let what is said about a fault in the block begin with the place: `base_weights: w.pth does not exist`."""
    try:
        yield
    except PluginError as error:
        raise type(error)(f'{place}: {error}') from error


@contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Let the failure of what a run can do without, a drawing or a log, be one warning: `what`, and why."""
    try:
        yield
    except Exception as error:  # of somebody's code
        if what not in _warned:
            _warned.add(what)
            logging.getLogger('basicsr').warning(f'{what}: {one_line(error)}')


_warned: set[str] = set()


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`', did you mean NAME?'`, to be put behind a complaint; empty when nothing is near."""
    match = nearest(name, known)
    return f', did you mean {match}?' if match else ''


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, whatever the case of its letters; None when nothing is near."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None
