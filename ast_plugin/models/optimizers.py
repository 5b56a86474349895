"""Optimisers by name, of torch.optim and of the package pytorch_optimizer, an extra; and the rates they step at."""

import importlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ast_plugin.errors import OptionError, did_you_mean

EXTRA = 'pytorch_optimizer'

# What a loop that computes one gradient a step and hands over a list of parameters cannot serve.
_REFUSED = {
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
}


def find_optimizer(name: str) -> type[Optimizer]:
    """Return the optimiser called `name`: of torch.optim, or else of pytorch_optimizer, which is imported only then."""
    for reason, names in _REFUSED.items():
        if name in names.split():
            raise OptionError(f'the optimiser {name} cannot be used here: {reason}; AdamW is a good choice')
    known = _optimizers(torch.optim)
    where, advice = 'torch.optim', ''
    if name not in known:
        try:
            known = {**_optimizers(importlib.import_module(EXTRA)), **known}
            where = f'torch.optim or {EXTRA}'
        except ModuleNotFoundError as error:
            if error.name != EXTRA:
                raise
            advice = f'; those of {EXTRA} can be used once it is installed: pip install "ast_plugin[optimizers]"'
    if name not in known:
        hint = did_you_mean(name, known) or f': {", ".join(sorted(known))}{advice}'
        raise OptionError(f'no optimiser of {where} is named {name}{hint}')
    return known[name]


def build_optimizer(name: str, parameters: Iterable, lr: float, **options: Any) -> Optimizer:
    """Build an optimiser by name."""
    kind = find_optimizer(name)
    try:
        return kind(parameters, lr=lr, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f'the optimiser {name} refuses its options: {error}') from error


class WarmupCosineLR(LRScheduler):
    """Linear warm-up, then half a cosine down to a floor; changing every iteration, or only from epoch to epoch.

    By epoch it is AST's recipe: over W warm-up epochs LR/W, 2LR/W, …, LR, then LR again and down the cosine, each rate
    held for a whole epoch. Without warm-up it is the plain cosine.

    Args:
        optimizer: its groups' rates are the highest ones.
        total_iter: iterations of the whole run; past it the rate stays at `eta_min`.
        warmup_iter: how many of them warm up, in [0, total_iter); by epoch, the epoch begun counts as a whole one.
        warmup_epochs: the same in epochs, in the place of `warmup_iter`.
        eta_min: the floor.
        by: `iter` or `epoch`: how long a rate is held.
        iters_per_epoch: iterations of an epoch; asked for where anything is counted in epochs.
    Raises:
        OptionError: if the numbers contradict one another.
    Source: the official training scripts' gradual warm-up with cosine annealing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iter: int,
        warmup_iter: int | None = None,
        warmup_epochs: int | None = None,
        eta_min: float = 0.0,
        by: Literal['iter', 'epoch'] = 'iter',
        iters_per_epoch: int | None = None,
        last_epoch: int = -1,
    ) -> None:
        if by not in ('iter', 'epoch'):
            raise OptionError(f'the schedule goes by iter or epoch, not by {by!r}')
        if warmup_iter is not None and warmup_epochs is not None:
            raise OptionError('the schedule takes warmup_iter or warmup_epochs, not both')
        if iters_per_epoch is None and (by == 'epoch' or warmup_epochs is not None):
            raise OptionError(
                'the schedule counts epochs and needs train.iters_per_epoch; the command fills it in, elsewhere set it'
            )
        if warmup_epochs is not None:
            warmup_iter = warmup_epochs * iters_per_epoch
        warmup_iter = warmup_iter or 0
        self.held = iters_per_epoch if by == 'epoch' else 1
        if self.held < 1:
            raise OptionError(f'the schedule needs iters_per_epoch of 1 or more, not {iters_per_epoch}')
        if not 0 <= warmup_iter < total_iter:
            raise OptionError(
                f'the warm-up of {warmup_iter} iterations does not fit into a run of {total_iter}; expected less: '
                f'lower {"warmup_iter" if warmup_epochs is None else "warmup_epochs"}, or train longer'
            )
        self.warmup_steps = math.ceil(warmup_iter / self.held)
        self.num_steps = max(math.ceil(total_iter / self.held), self.warmup_steps + 1)
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """Return the rates of the groups at `last_epoch`, which BasicSR counts in iterations."""
        step = self.last_epoch // self.held
        if step < self.warmup_steps:
            return [base * (step + 1) / self.warmup_steps for base in self.base_lrs]
        done = min(1.0, (step - self.warmup_steps) / (self.num_steps - self.warmup_steps))
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]


SCHEDULERS = {'WarmupCosineLR': WarmupCosineLR}


def build_schedule(optimizer: Optimizer, train: Mapping[str, Any]) -> LRScheduler | None:
    """Build the schedule that `train.scheduler` names, in a run of `train.total_iter`; None if it is none of ours."""
    options = dict(train['scheduler'])
    kind = SCHEDULERS.get(options.pop('type'))
    if kind is None:
        return None
    given = {key: train[key] for key in ('total_iter', 'iters_per_epoch') if train.get(key) is not None}
    return kind(optimizer, **{**given, **options})


def restore_rates(schedule: LRScheduler) -> None:
    """Return a schedule to its own rates before it steps.

    BasicSR's warm-up overwrites them, and schedules that work on the present rate (MultiStepLR) would stay below it.
    """
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group['lr'] = rate


def _optimizers(module: Any) -> dict[str, type[Optimizer]]:
    refused = {name for names in _REFUSED.values() for name in names.split()}
    return {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer and name not in refused
    }
