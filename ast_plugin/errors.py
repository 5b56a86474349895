"""Exceptions of the plugin. Every message states what was expected, what was found, and what to do."""

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
    """Base class of errors that a user can fix. The command line prints the message and exits with status 2."""


class OptionError(PluginError, ValueError):
    """An option file or command-line argument is invalid."""


class MemoryShortage(OptionError):
    """An image does not fit in memory with the requested settings."""


class DataError(PluginError, ValueError):
    """An image, a folder or a list of pairs is not usable."""


class CheckpointError(PluginError, RuntimeError):
    """A weights file or training state cannot be read, is unsafe, or belongs to another network."""


class FileError(PluginError, RuntimeError):
    """A file cannot be written, or another process is using its folder."""


class TrainingError(PluginError, RuntimeError):
    """Training cannot continue because values are not finite."""


class ShapeError(PluginError, ValueError):
    """A tensor does not have the documented shape."""


class BackendUnavailable(PluginError, RuntimeError):
    """An explicitly requested backend cannot run on this machine."""


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory, by its type or, since libraries have no common type, its message."""
    return isinstance(error, MemoryError | MemoryShortage) or bool(_MEMORY.search(str(error)))


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of about 300 characters at most; without a message, its class name."""
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f'{text[:300]}…'


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the class name. The rest of torch's messages is rarely helpful."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def class_of_failure(error: Exception, stage: str) -> str:
    """Return the class of the failure of one item of a batch: 'memory', or the stage.

    Args:
        error: any exception.
        stage: 'unreadable', 'network', 'metric' or 'unwritable'.
    Raises:
        The error itself if it affects all items: wrong options, a missing backend, a full disk.
    """
    if out_of_memory(error):
        return 'memory'
    if isinstance(error, OptionError | BackendUnavailable | FileError):
        raise error
    return stage


@contextmanager
def tell_place(place: str) -> Iterator[None]:
    """Prefix the messages of PluginErrors in the block with a place: `base_weights: w.pth does not exist`."""
    try:
        yield
    except PluginError as error:
        raise type(error)(f'{place}: {error}') from error


@contextmanager
def only_warn(what: str) -> Iterator[None]:
    """Log exceptions in the block as a warning, once per run and `what`; for plots and logs, which must not stop it."""
    try:
        yield
    except Exception as error:  # third-party code may raise anything
        if what not in warned:
            warned.add(what)
            logging.getLogger('basicsr').warning(f'{what}: {one_line(error)}')


warned: set[str] = set()
"""What `only_warn` has warned of; cleared when a run starts."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `', did you mean NAME?'` to append to a message, or an empty string if no name is similar."""
    match = nearest(name, known)
    return f', did you mean {match}?' if match else ''


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name most similar to `name`, ignoring case, or None if no name is similar."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None
