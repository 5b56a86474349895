"""Optimisers by name, from torch.optim and the optional package pytorch_optimizer, and learning-rate schedules."""

import importlib
import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ast_plugin.errors import OptionError, did_you_mean

EXTRA = 'pytorch_optimizer'

# Not supported: the training loop computes one gradient per step and passes a plain list of parameters.
_UNSUPPORTED = {
    'it evaluates the loss several times per step': 'LBFGS AliG BSAM',
    'it accepts sparse gradients only': 'SparseAdam',
    'it needs second derivatives': 'AdaHessian SophiaH',
    'it wraps another optimiser': (
        'FriendlySAM GSAM Lookahead LookSAM OrthoGrad PCGrad SAM SafeFP16Optimizer ScheduleFreeWrapper TRAC WSAM'
    ),
    'it steps inside the backward pass, or requires the network itself': 'AdaLOMO AdamMini LOMO',
    'it uses different weights for testing than for training': 'ScheduleFreeAdamW ScheduleFreeRAdam ScheduleFreeSGD',
    'it requires settings for each parameter': 'AdaGO AdaMuon DistributedMuon MuonClip NorMuon',
    'it exchanges gradients between processes itself': 'DeMo',
}


def find_optimizer(name: str) -> type[Optimizer]:
    """Return an optimiser class by name, from torch.optim or else from pytorch_optimizer, imported only if needed."""
    for reason, names in _UNSUPPORTED.items():
        if name in names.split():
            raise OptionError(f'the optimiser {name} is not supported: {reason}. Use AdamW, for example')
    known = _optimizers(torch.optim)
    where, advice = 'torch.optim', ''
    if name not in known:
        try:
            known = {**_optimizers(importlib.import_module(EXTRA)), **known}
            where = f'torch.optim or {EXTRA}'
        except ModuleNotFoundError as error:
            if error.name != EXTRA:
                raise
            advice = f'; those of {EXTRA} require its installation: pip install "ast_plugin[optimizers]"'
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
        raise OptionError(f'the optimiser {name} rejects its options: {error}') from error


class WarmupCosineLR(LRScheduler):
    """Linear warm-up followed by cosine annealing to `eta_min`, updated every iteration or every epoch.

    With `by: epoch` this is AST's schedule: LR/W, 2LR/W, …, LR over W warm-up epochs, then cosine annealing from LR,
    each rate held for a whole epoch. Without warm-up it is plain cosine annealing.

    Args:
        optimizer: the rates of its parameter groups are the maximum rates.
        total_iter: iterations of the whole run; afterwards the rate stays at `eta_min`.
        warmup_iter: number of warm-up iterations, in [0, total_iter); with `by: epoch` rounded up to whole epochs.
        warmup_epochs: number of warm-up epochs, instead of `warmup_iter`.
        eta_min: minimum rate.
        by: `iter` or `epoch`, the interval between updates.
        iters_per_epoch: iterations per epoch; required if `by` or the warm-up is in epochs.
    Raises:
        OptionError: if the values contradict each other.
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
            raise OptionError(f'the schedule expects by: iter or epoch, got {by!r}')
        if warmup_iter is not None and warmup_epochs is not None:
            raise OptionError('the schedule accepts warmup_iter or warmup_epochs, not both')
        if iters_per_epoch is None and (by == 'epoch' or warmup_epochs is not None):
            raise OptionError(
                'the schedule counts epochs and needs train.iters_per_epoch; only `basicsr train` sets it automatically'
            )
        if warmup_epochs is not None:
            warmup_iter = warmup_epochs * iters_per_epoch
        warmup_iter = warmup_iter or 0
        self.held = iters_per_epoch if by == 'epoch' else 1
        if self.held < 1:
            raise OptionError(f'the schedule expects iters_per_epoch of 1 or more, got {iters_per_epoch}')
        if not 0 <= warmup_iter < total_iter:
            raise OptionError(
                f'the warm-up of {warmup_iter} iterations does not fit into a run of {total_iter}: '
                f'lower {"warmup_iter" if warmup_epochs is None else "warmup_epochs"}, or train longer'
            )
        self.warmup_steps = math.ceil(warmup_iter / self.held)
        self.num_steps = max(math.ceil(total_iter / self.held), self.warmup_steps + 1)
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """Return the rates of the parameter groups at `last_epoch`, which counts iterations in BasicSR."""
        step = self.last_epoch // self.held
        if step < self.warmup_steps:
            return [base * (step + 1) / self.warmup_steps for base in self.base_lrs]
        done = min(1.0, (step - self.warmup_steps) / (self.num_steps - self.warmup_steps))
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]


SCHEDULERS = {'WarmupCosineLR': WarmupCosineLR}
BASICSR_SCHEDULERS = {
    'MultiStepLR': MultiStepRestartLR,
    'MultiStepRestartLR': MultiStepRestartLR,
    'CosineAnnealingRestartLR': CosineAnnealingRestartLR,
}


def build_schedule(optimizer: Optimizer, train: Mapping[str, Any]) -> LRScheduler:
    """Build the schedule of `train.scheduler` by name, the plugin's or BasicSR's."""
    options, known = dict(train['scheduler']), {**BASICSR_SCHEDULERS, **SCHEDULERS}
    name = options.pop('type')
    if name not in known:
        raise OptionError(f'no schedule is named {name}{did_you_mean(name, known)}')
    accepted = inspect.signature(known[name]).parameters
    lengths = {key: train.get(key) for key in ('total_iter', 'iters_per_epoch') if key in accepted}
    return known[name](optimizer, **{**lengths, **options})


def restore_rates(schedule: LRScheduler) -> None:
    """Restore a schedule's own rates before it steps.

    BasicSR's warm-up overwrites them; schedules that scale the current rate (MultiStepLR) would remain too low.
    """
    for group, rate in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group['lr'] = rate


def _optimizers(module: Any) -> dict[str, type[Optimizer]]:
    unsupported = {name for names in _UNSUPPORTED.values() for name in names.split()}
    return {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer and name not in unsupported
    }
