"""Gradient checkpoints: what is computed again in a backward pass is computed as it was the first time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ast_plugin.archs.block_adapters import known_sizes, with_sizes
from ast_plugin.ops import use_backend
from ast_plugin.ops.backend import asked


def recomputed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a function gives, which is computed again in the backward pass instead of keeping what that needs."""
    # torch.compile recomputes in a graph of its own, where backend and sizes are constants; it takes no `context_fn`.
    own = {} if torch.compiler.is_compiling() else {'context_fn': lambda: (nullcontext(), _Surroundings())}
    return checkpoint(function, *args, use_reentrant=False, **own, **kwargs)


class _Surroundings(AbstractContextManager):
    """Backend and tokens' sizes as they are now, for whatever thread computes again, once in each backward pass."""

    def __init__(self) -> None:
        self.backend, self.sizes = asked(), known_sizes()

    def __enter__(self) -> None:
        self.entered = ExitStack()
        self.entered.enter_context(use_backend(self.backend))
        self.entered.enter_context(with_sizes(self.sizes))

    def __exit__(self, *error: object) -> None:
        self.entered.__exit__(*error)
