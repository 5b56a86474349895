"""Pictures that a dataset holds twice, by their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ast_plugin.data.prepare.checked_pairs import Found
from ast_plugin.data.prepare.splits import Split


@dataclass(frozen=True)
class Twins:
    """Pictures of two splits that have the same pixels, or of one.

    Attributes:
        first, second: names of the splits.
        what: `degraded` or `clean`.
        examples: files, of the first split and of the second; a few of them.
        num: pictures of the second split that are in the first, too.
    """

    first: str
    second: str
    what: str
    examples: tuple[tuple[str, str], ...]
    num: int


_EXAMPLES = 3


def within(split: Split, found: Found) -> Twins | None:
    """Find degraded pictures that one split holds twice. Clean ones may well have many degraded ones."""
    digests = _flat(found, 0)
    order = np.argsort(digests, kind='stable')
    again = np.flatnonzero(digests[order][1:] == digests[order][:-1]) + 1
    examples = tuple(
        (_path(split, found, order[at - 1], 0), _path(split, found, order[at], 0)) for at in again[:_EXAMPLES]
    )
    return Twins(split.name, split.name, 'degraded', examples, len(again)) if len(again) else None


def across(splits: Sequence[Split], found: Sequence[Found]) -> list[Twins]:
    """Find pictures to be tested with that are trained on."""
    twins = []
    for train, train_found in zip(splits, found, strict=True):
        for test, test_found in zip(splits, found, strict=True):
            if (train.phase, test.phase) == ('train', 'test'):
                both = (_shared(train, train_found, test, test_found, which) for which in (0, 1))
                twins += [one for one in both if one]
    return twins


def num_unchanged(found: Found) -> int:
    """Count the pairs whose two pictures are the same."""
    return int((_flat(found, 0) == _flat(found, 1)).sum())


def num_clean(found: Found) -> int:
    """Count the different clean pictures."""
    return len(np.unique(_flat(found, 1)))


def _shared(train: Split, train_found: Found, test: Split, test_found: Found, which: int) -> Twins | None:
    trained, tested = _flat(train_found, which), _flat(test_found, which)
    hits = np.flatnonzero(np.isin(tested, trained))
    if not len(hits):
        return None
    order = np.argsort(trained, kind='stable')
    examples = []
    for at in hits[:_EXAMPLES]:
        place = order[np.searchsorted(trained[order], tested[at])]
        examples.append((_path(train, train_found, place, which), _path(test, test_found, at, which)))
    return Twins(train.name, test.name, ('degraded', 'clean')[which], tuple(examples), len(hits))


def _flat(found: Found, which: int) -> np.ndarray:
    """The start of each picture's digest."""
    return found.digests[:, which]


def _path(split: Split, found: Found, place: int, which: int) -> str:
    pair = split.pairs[found.good[int(place)]]
    return (pair.lq, pair.gt)[which]
