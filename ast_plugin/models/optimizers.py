"""Optimisers by name: all of torch.optim, then those of the package pytorch_optimizer, an extra."""

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from ast_plugin.errors import OptionError, did_you_mean

EXTRA = 'pytorch_optimizer'

# What a loop that computes one gradient a step and hands over a list of parameters cannot serve.
_REFUSED = {
    reason: names.split()
    for reason, names in {
        'it calls back for the loss several times a step': 'LBFGS AliG BSAM',
        'it takes sparse gradients only': 'SparseAdam',
        'it needs second derivatives': 'AdaHessian SophiaH',
        'it works around another optimiser': (
            'FriendlySAM GSAM Lookahead LookSAM OrthoGrad PCGrad SAM SafeFP16Optimizer ScheduleFreeWrapper TRAC WSAM'
        ),
        'it steps inside the backward pass, or wants the network itself': 'AdaLOMO AdamMini LOMO',
        'it keeps other weights for testing than for training': 'ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD',
        'it wants to be told for each parameter how to treat it': 'AdaGO AdaMuon DistributedMuon MuonClip NorMuon',
        'it exchanges gradients between processes itself': 'DeMo',
    }.items()
}


def find_optimizer(name: str) -> type[Optimizer]:
    """The optimiser called `name`: of torch.optim, or else of pytorch_optimizer, which is imported only then.

    Raises:
        OptionError: if there is none, it cannot be served, or the package that may have it is not installed.
    """
    for reason, names in _REFUSED.items():
        if name in names:
            raise OptionError(f'the optimiser {name} cannot be used here: {reason}; AdamW is a good choice')
    offered = _optimizers(torch.optim)
    if name in offered:
        return offered[name]
    try:
        collection = importlib.import_module(EXTRA)
    except ModuleNotFoundError as error:
        if error.name != EXTRA:
            raise
        hint = did_you_mean(name, offered) or (
            f': {", ".join(sorted(offered))}; those of {EXTRA} can be used once it is installed: '
            'pip install "ast_plugin[optimizers]"'
        )
        raise OptionError(f'no optimiser of torch.optim is named {name}{hint}') from None
    more = _optimizers(collection)
    if name not in more:
        names = {**offered, **more}
        hint = did_you_mean(name, names) or f': {", ".join(sorted(names))}'
        raise OptionError(f'no optimiser of torch.optim or {EXTRA} is named {name}{hint}')
    return more[name]


def build_optimizer(name: str, parameters: Iterable, lr: float, **options: Any) -> Optimizer:
    """An optimiser by name.

    Raises:
        OptionError: if there is none of that name, or it refuses the options.
    """
    kind = find_optimizer(name)
    try:
        return kind(parameters, lr=lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f'the optimiser {name} refuses its options: {error}') from error


def _optimizers(module: Any) -> dict[str, type[Optimizer]]:
    refused = {name for names in _REFUSED.values() for name in names}
    return {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer and name not in refused
    }
