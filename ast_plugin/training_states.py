"""Training states on disk: read only if they are whole, found again, and the newest ones kept.

A state is what torch.save writes, a zip file in which each part has its checksum. Reading by torch does not look at
those; reading here does.
"""

import functools
import re
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ast_plugin.checkpoints import TEMPORARY_SUFFIX
from ast_plugin.errors import CheckpointError

STATE, WEIGHTS = '{}.state', 'net_g_{}.pth'
ABANDONED_SUFFIX = '.abandoned'


def read_state(path: str | Path) -> dict[str, Any]:
    """Read a training state, ours or BasicSR's, onto the CPU, after its checksums were found right.

    Raises:
        CheckpointError: if the file is missing, damaged, no training state, or holds anything but data.
    """
    import torch

    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged is not None:
                raise CheckpointError(f'the part {damaged} is damaged')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what torch has to say about pickle protocols helps nobody here
            state = torch.load(path, map_location='cpu', weights_only=True)
        iteration = state['iter']
        if not isinstance(iteration, int) or iteration < 0:
            raise CheckpointError(f'it says that its iteration is {iteration!r}')
    except Exception as error:  # torch raises half a dozen kinds for files that are not what they should be
        reason = str(error).splitlines()[0].split('. ')[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f'{path} is no training state that can be resumed from: {reason}; name another .state '
            'file in path.resume_state, or remove this one to resume from the one before'
        ) from error
    return state


@functools.cache  # a folder is looked through before a run starts and once more when it does
def _tell(line: str) -> None:
    print(f'basicsr: warning: {line}', file=sys.stderr, flush=True)


def newest_whole(folder: str | Path, warn: Callable[[str], None] = _tell) -> Path | None:
    """The state of the highest iteration that can be read; None if there is none.

    Args:
        folder: an experiment's `training_states`; it need not be there.
        warn: takes a line on each newer one that cannot be read.
    """
    for _, path in sorted(_numbered(Path(folder), STATE).items(), reverse=True):
        try:
            read_state(path)
        except CheckpointError as error:
            warn(f'passed over: {error}')
            continue
        return path
    return None


def keep_newest(folder: str | Path, name: str, iteration: int, count: int) -> None:
    """Delete what is older than the `count` newest files up to `iteration`, and what a killed process left unfinished.

    States beyond `iteration` are of a run that was given up when this one was resumed from an earlier state, or they
    are damaged; they are put aside under another name, so that nobody resumes from them by mistake.

    Args:
        folder: where the files lie.
        name: `STATE` or `WEIGHTS`; files of other names stay.
        iteration: of the file just written.
        count: at least 1.
    Raises:
        CheckpointError: if a file cannot be deleted.
    """
    folder = Path(folder)
    numbered = _numbered(folder, name)
    past = sorted(number for number in numbered if number <= iteration)
    try:
        for number in past[:-count]:
            numbered[number].unlink(missing_ok=True)
        for leftover in folder.glob(f'.*{TEMPORARY_SUFFIX}'):
            leftover.unlink(missing_ok=True)
        for number in numbered.keys() - set(past):
            if name == STATE:
                numbered[number].replace(f'{numbered[number]}{ABANDONED_SUFFIX}')
    except OSError as error:
        raise CheckpointError(f'older files in {folder} cannot be removed: {error.strerror}') from error


def _numbered(folder: Path, name: str) -> dict[int, Path]:
    pattern = re.compile(re.escape(name).replace(r'\{\}', r'(\d+)'), re.ASCII)
    if not folder.is_dir():
        return {}
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}
