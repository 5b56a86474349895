"""What backends make of weights before they compute, made once where a caller says that weights stay as they are."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from torch import Tensor, nn

T = TypeVar('T')
# Beside what was made stand the weights it was made of: an id is not given to another tensor while its own lives.
_kept: ContextVar[dict[Hashable, tuple[tuple[Tensor | None, ...], object]] | None] = ContextVar(
    'ast_plugin_frozen_weights', default=None
)


@contextmanager
def frozen_weights() -> Iterator[None]:
    """Say that no weights change within a `with`: in this thread, casts and joins of weights are made once and kept.

    For inference over many pictures or tiles. Where weights change after all, calls without gradients go on with those
    of before: no trace of the change is looked for, as writes through `.data`, such as those of BasicSR's moving
    average, leave none. What is kept is given up at the end of the outermost `with`.
    """
    token = _kept.set({}) if _kept.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _kept.reset(token)


def made_of(make: Callable[[], T], weights: Iterable[Tensor | None], *settings: Hashable) -> T:
    """`make()`, or what it gave before for the same weights and settings within `frozen_weights`.

    Args:
        make: computes from the weights and the settings alone; its result is shared, not to be written to.
        weights: what it reads. What is no parameter is another tensor in each call, and nothing is kept of it.
        settings: what else it depends on, itself included where several share weights.
    """
    kept, weights = _kept.get(), tuple(weights)
    if kept is None or not all(weight is None or isinstance(weight, nn.Parameter) for weight in weights):
        return make()
    key = (*map(id, weights), *settings)
    if key not in kept:
        kept[key] = weights, make()
    return kept[key][1]
