"""Switches of training that change how a network computes, and neither what it computes nor its state's names."""

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
    """Switch on what `train` asks for, in place: `channels_last`, `gradient_checkpointing`, `compile`.

    Args:
        network: without the wrappers of parallel training, which must come after.
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
            f'train.{wanted[0]} works on repeated blocks, and {type(network).__name__} has none: leave it out, or name '
            "them in the network's class attribute block_classes"
        )
    if 'gradient_checkpointing' in wanted:
        _checkpoint(network, found)
    if 'compile' in wanted:
        _compile(found, DEFAULT_BACKEND if train['compile'] is True else train['compile'])
    return network


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated building blocks of a network in the order of its modules, none inside another.

    They are the instances of the classes that the network names in `block_classes`; of networks without that, the
    outermost modules with weights whose class, not one of torch's, comes more than once.
    """
    wanted = getattr(network, 'block_classes', None)
    if wanted is None:
        counts = Counter(type(module) for module in network.modules())
        wanted = tuple(
            kind for kind, count in counts.items() if count > 1 and kind.__module__.partition('.')[0] != 'torch'
        )
    return _outermost(network, tuple(wanted))


def eager_blocks() -> AbstractContextManager:
    """Run compiled blocks as they were: validation shows them images of every size, each worth a compilation."""
    # Asking the compiler loads it, which takes seconds: nothing has been compiled before it was there.
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
            module.use_checkpoint = False  # the network's own option would compute everything a third time
    for block in found:
        # A class rather than a wrapper: the names in the state stay, and so does what isinstance says.
        kind = type(block)
        block.__class__ = type(kind.__name__, (_Checkpointed, kind), {'__module__': kind.__module__})


class _Checkpointed:
    """Before an nn.Module among the bases: its backward pass computes the forward pass again instead of keeping it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        return run_checkpointed(super().__call__, *args, **kwargs)


def _compile(found: list[nn.Module], backend: str) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise OptionError(f'train.compile: torch has no backend {backend!r}: true, or one of {", ".join(known)}')
    import torch._dynamo.config as config

    # Blocks of one class share torch's count of compilations, whose limit of 8 a U-shaped network's levels exceed.
    name = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'  # its name until torch 2.6
    setattr(config, name, max(2 * len(found), getattr(config, name)))
    for block in found:
        block.compile(backend=backend, dynamic=False)  # patches have one size throughout a run
