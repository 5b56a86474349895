"""Hundreds of thousands of pairs in little memory, which processes that are forked from this one share."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# Names of files need not be UTF-8.
_ENCODING = ('utf-8', 'surrogateescape')


@dataclass(frozen=True, slots=True)
class Pair:
    """Paths of a degraded image and its clean partner, and the key that they share."""

    key: str
    lq: str
    gt: str


class PairTable(Sequence[Pair]):
    """A list of pairs kept as one run of bytes: 640,000 take some 60 MB, as objects of their own four times that.

    Workers that are forked share it for good: reading it writes nothing, not even counts of references.

    Args:
        pairs: in order; each path begins with `root`, which is then kept once.
        root: what all paths begin with, the separator included; empty if they have nothing in common.
    """

    def __init__(self, pairs: Iterable[Pair] = (), root: str = '') -> None:
        self._root, cut = root, len(root)
        text, ends = bytearray(), array('Q', [0])
        for pair in pairs:
            lq, gt = pair.lq[cut:], pair.gt[cut:]
            # SPAD's keys are its degraded names, which need no second place.
            text += f'{"" if pair.key == lq else pair.key}\0{lq}\0{gt}'.encode(*_ENCODING)
            ends.append(len(text))
        self._text, self._ends = text, ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> Pair | PairTable:
        if isinstance(index, slice):
            return PairTable((self._pair(number) for number in range(*index.indices(len(self)))), self._root)
        if not -len(self) <= index < len(self):
            raise IndexError(f'there are {len(self)} pairs; got index {index}')
        return self._pair(index % len(self))

    def __iter__(self) -> Iterator[Pair]:
        return map(self._pair, range(len(self)))

    def _pair(self, number: int) -> Pair:
        key, lq, gt = self._text[self._ends[number] : self._ends[number + 1]].decode(*_ENCODING).split('\0')
        return Pair(key or lq, self._root + lq, self._root + gt)
