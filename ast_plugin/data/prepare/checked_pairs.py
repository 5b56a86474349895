"""Checking every pair of a split on all cores, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ast_plugin.data.manifest import Entry
from ast_plugin.data.matching import Fault, Faults, Pair
from ast_plugin.data.pair_table import PairTable
from ast_plugin.data.parallel import map_in_order
from ast_plugin.data.prepare.picture_checks import Checked, Finding, check_pair, quiet_threads
from ast_plugin.errors import DataError

_Item = tuple[Pair, str]


@dataclass
class Found:
    """What checking a split came to; of each good pair only numbers are kept.

    Attributes:
        num_pairs: pairs looked at, good ones and faulty ones.
        faults: of the faulty ones.
        good: the numbers of the good ones in the split.
        starts: the first 8 bytes of the digests of their pictures, degraded and clean by turns; among a million
            pictures two different ones share them with a chance of 1 in 10^7.
        sizes: how many have which height and width.
        num_bytes: of their files.
        traits: how many pictures are not plain RGB of 8 bits, by trait.
    """

    num_pairs: int = 0
    faults: Faults = field(default_factory=Faults)
    good: array = field(default_factory=lambda: array('Q'))
    starts: array = field(default_factory=lambda: array('Q'))
    sizes: Counter = field(default_factory=Counter)
    num_bytes: int = 0
    traits: Counter = field(default_factory=Counter)

    @property
    def digests(self) -> np.ndarray:
        """What is kept of the digests, [N, 2], uint64: degraded and clean."""
        return np.array(self.starts, np.uint64).reshape(-1, 2)

    def add(self, checked: Checked) -> None:
        """Take in the next pair."""
        self.num_pairs += 1
        if checked.fault:
            self.faults.append(checked.fault)
            return
        self.good.append(self.num_pairs - 1)
        self.sizes[checked.lq.size] += 1
        for finding in (checked.lq, checked.gt):
            self.num_bytes += finding.num_bytes
            self.traits.update(finding.traits)
            self.starts.append(int.from_bytes(finding.digest[:8], 'big'))


class Journal:
    """A file with what is known of each pair of a split, in order, written while they are checked.

    What was known before is believed of files whose size and time of change are the same. Lines that a killed run left
    half-written are done again.

    Args:
        path: the file; another beside it is written, which takes its place in the end.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._new = path, path.with_name(path.name + '.new')
        if self._new.is_file() and (not path.is_file() or path.stat().st_size < self._new.stat().st_size):
            os.replace(self._new, path)

    def check(self, pairs: PairTable, workers: int, on_pair: Callable[[], None] = int) -> Found:
        """Check all pairs.

        Args:
            pairs: in order.
            workers: processes to read with.
            on_pair: called after each.
        Raises:
            DataError: if the journal cannot be written, or a process is killed.
        """
        found = Found()
        try:
            with open(self._new, 'w', encoding='utf-8') as file:
                items = zip(pairs, self._known_lines(), strict=False)
                for line in map_in_order(_check_line, items, workers, prepare=quiet_threads):
                    file.write(line + '\n')
                    found.add(_parse(line)[1])
                    on_pair()
            os.replace(self._new, self.path)
        except OSError as error:
            raise DataError(f'cannot write {self._new}: {error.strerror or error}. Nothing is prepared yet') from error
        return found

    def entries(self, pairs: PairTable, name_of: Callable[[str], str]) -> Iterator[Entry]:
        """Yield an entry for each good pair.

        Args:
            pairs: those that were checked.
            name_of: turns a path into the name that the manifest gives it.
        """
        with open(self.path, encoding='utf-8') as file:
            for pair, line in zip(pairs, file, strict=True):
                checked = _parse(line)[1]
                if not checked.fault:
                    lq, gt = checked.lq, checked.gt
                    digests = lq.digest.hex(), gt.digest.hex()
                    sizes = lq.num_bytes, gt.num_bytes
                    yield Entry(pair.key, name_of(pair.lq), name_of(pair.gt), tuple(lq.size), sizes, digests)

    def remove(self) -> None:
        """Forget what is known."""
        for path in (self.path, self._new):
            path.unlink(missing_ok=True)

    def _known_lines(self) -> Iterator[str]:
        """Yield the lines of before, and empty ones for ever after."""
        if self.path.is_file():
            with open(self.path, encoding='utf-8', errors='replace') as file:
                yield from file
        while True:
            yield ''


def _check_line(item: _Item) -> str:
    """Return the line of the journal for a pair: the known one, if it is still true."""
    pair, known = item
    stamp = [pair.lq, pair.gt, *_stamp(pair.lq), *_stamp(pair.gt)]
    try:
        if known and json.loads(known)[0] == stamp:
            _parse(known)
            return known.rstrip('\n')
    except (ValueError, TypeError, LookupError, RecursionError):
        pass  # cut off in the middle, or no journal at all
    checked = check_pair(pair)
    if checked.fault:
        return json.dumps([stamp, [checked.fault.kind, checked.fault.name, checked.fault.text]])
    return json.dumps([stamp, *([f.size, f.num_bytes, f.digest.hex(), f.traits] for f in (checked.lq, checked.gt))])


def _stamp(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def _parse(line: str) -> tuple[list, Checked]:
    stamp, *values = json.loads(line)
    if len(values) == 1:
        return stamp, Checked(None, None, Fault(*values[0]))
    lq, gt = (
        Finding(tuple(size), num_bytes, bytes.fromhex(digest), tuple(traits))
        for size, num_bytes, digest, traits in values
    )
    return stamp, Checked(lq, gt)
