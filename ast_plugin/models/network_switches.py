"""Training switches that change how a network computes, but not its results or the names in its state dictionary."""

import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from ast_plugin.archs.blocks import run_checkpointed
from ast_plugin.errors import OptionError

DEFAULT_BACKEND = 'inductor'


def apply(network: nn.Module, train: Mapping[str, Any]) -> nn.Module:
    """Apply `channels_last`, `gradient_checkpointing` and `compile` to a network in place, as set in `train`.

    Args:
        network: the bare network; wrappers for parallel training must be applied afterwards.
        train: the section of the option file. `compile` is true, or the name of a backend of torch.compile.
    Returns:
        The network.
    Raises:
        OptionError: if a switch does not apply to this network or installation.
    """
    if train.get('channels_last'):
        network.to(memory_format=torch.channels_last)
    wanted = [key for key in ('gradient_checkpointing', 'compile') if train.get(key)]
    found = blocks(network) if wanted else []
    if wanted and not found:
        raise OptionError(
            f'train.{wanted[0]} needs repeated blocks, and {type(network).__name__} has none: remove the option, or '
            "name the blocks in the network's class attribute block_classes"
        )
    if 'gradient_checkpointing' in wanted:
        _checkpoint(network, found)
    if 'compile' in wanted:
        _compile(found, DEFAULT_BACKEND if train['compile'] is True else train['compile'])
    return network


def blocks(network: nn.Module) -> list[nn.Module]:
    """Return the repeated building blocks of a network in module order, without nested ones.

    Blocks are the instances of the classes in the network's attribute `block_classes`. Without that attribute, they are
    the outermost modules with weights whose class occurs more than once and is not one of torch's.
    """
    wanted = getattr(network, 'block_classes', None)
    if wanted is None:
        counts = Counter(type(module) for module in network.modules())
        wanted = tuple(
            kind for kind, count in counts.items() if count > 1 and kind.__module__.partition('.')[0] != 'torch'
        )
    return _outermost(network, tuple(wanted))


def eager_blocks() -> AbstractContextManager:
    """Return a context in which compiled blocks run eagerly: validation would compile for every image size."""
    # Accessing the compiler loads it, which takes seconds; if it is not loaded, nothing has been compiled.
    return torch.compiler.set_stance('force_eager') if 'torch._dynamo' in sys.modules else nullcontext()


def _outermost(module: nn.Module, wanted: tuple[type, ...]) -> list[nn.Module]:
    found = []
    for child in module.children():
        if isinstance(child, wanted) and next(child.parameters(), None) is not None:
            found.append(child)
        else:
            found += _outermost(child, wanted)
    return found


def _checkpoint(network: nn.Module, found: list[nn.Module]) -> None:
    for module in network.modules():
        if getattr(module, 'use_checkpoint', False):
            module.use_checkpoint = False  # avoids recomputation by the network's own option in addition
    for block in found:
        # A subclass instead of a wrapper keeps the names in the state dictionary and the results of isinstance.
        kind = type(block)
        block.__class__ = type(kind.__name__, (_Checkpointed, kind), {'__module__': kind.__module__})


class _Checkpointed:
    """Mixin, placed before an nn.Module among the bases, that adds gradient checkpointing to its forward pass."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        return run_checkpointed(super().__call__, *args, **kwargs)


def _compile(found: list[nn.Module], backend: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise OptionError(f'train.compile: no backend {backend!r} in torch; expected true or one of {", ".join(known)}')
    import torch._dynamo.config as config

    # Blocks of one class share torch's recompilation limit of 8, which the levels of a U-shaped network exceed.
    name = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'  # its name up to torch 2.6
    setattr(config, name, max(2 * len(found), getattr(config, name)))
    for block in found:
        block.compile(backend=backend, dynamic=False)  # patch size is constant during a run
