"""Training in stages: one file, several runs, each from the best weights of the one before.

`stages` is a list. An entry holds what differs from the rest of the file, see `ast_plugin.options.merging`, and may
have a `name`; without one the stages are called stage_1, stage_2 … Stage N trains in experiments/RUN/NAME.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_plugin.errors import OptionError
from ast_plugin.options.merging import merge

KEY = 'stages'
# As models/ of an experiment holds them, the better first.
WEIGHTS = ('net_g_best.pth', 'net_g_latest.pth')

_FINISHED = 'finished.json'


@dataclass(frozen=True)
class Stage:
    """One of the runs that an option file stands for.

    Attributes:
        number: its place, from 1 on.
        name: of its folder in the experiment's; None for the one run of a file without stages.
        opt: all its options; `name` in them is the whole file's.
        own: what the file says of this stage alone.
    """

    number: int
    name: str | None
    opt: dict[str, Any]
    own: Mapping[str, Any]

    @property
    def has_own_start(self) -> bool:
        """Whether the file says itself what weights this stage starts from."""
        return bool((self.own.get('path') or {}).get('pretrain_network_g'))


def expand(opt: Mapping[str, Any]) -> list[Stage]:
    """The runs that options as read stand for: one, unless they have `stages`.

    Raises:
        OptionError: if `stages` is no list of mappings, or two of them are of one name.
    """
    if KEY not in opt:
        return [Stage(1, None, dict(opt), {})]
    entries = opt[KEY]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise OptionError(f'{KEY}: expected a list of mappings, each of what differs in a stage')
    names = [name_of(number, entry) for number, entry in enumerate(entries, 1)]
    if len(set(names)) < len(names):
        raise OptionError(f'{KEY}: each stage needs a name of its own, not {", ".join(names)}')
    return [
        Stage(number, name, merged(opt, entry), entry)
        for number, (name, entry) in enumerate(zip(names, entries, strict=True), 1)
    ]


def merged(opt: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the stage that `entry` describes. The run keeps the file's name.

    The weights that the file starts from are those of its first stage: `Stage.has_own_start` tells of others.
    """
    base = {key: value for key, value in opt.items() if key != KEY}
    return merge(base, {key: value for key, value in entry.items() if key != 'name'})


def name_of(number: int, entry: Mapping[str, Any]) -> str:
    """The name of a stage, and of its folder."""
    return entry.get('name') or f'stage_{number}'


def weights(experiment: Path) -> Path | None:
    """The weights that a run has left: its best ones, else its latest, else None."""
    return next((path for name in WEIGHTS if (path := experiment / 'models' / name).is_file()), None)


def mark_finished(experiment: Path, total_iter: int) -> None:
    """Say that a run has reached its end: `is_finished` knows then.

    Raises:
        FileError: if that cannot be written.
    """
    from ast_plugin.files import write_file

    content = json.dumps({'total_iter': total_iter}).encode()
    write_file(experiment / _FINISHED, content)


def is_finished(experiment: Path, total_iter: int) -> bool:
    """Whether a run of at least `total_iter` iterations has ended here, and its weights are there."""
    try:
        done = json.loads((experiment / _FINISHED).read_text(encoding='utf-8'))['total_iter']
        return done >= total_iter and weights(experiment) is not None
    except (OSError, ValueError, KeyError, TypeError):
        return False
