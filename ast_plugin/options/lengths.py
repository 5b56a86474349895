"""Epochs of the training set, turned into the iterations that BasicSR counts in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ast_plugin.errors import OptionError


def iterations_per_epoch(num_samples: int, opt: Mapping[str, Any]) -> int:
    """How many batches of all processes an epoch has; its last one is filled up, see `EpochSampler`.

    Args:
        num_samples: length of the training set.
        opt: options completed for BasicSR, but for what is given in epochs.
    """
    dataset = opt['datasets']['train']
    # One process alone feeds all of its GPUs, each a batch of its own; of many processes each feeds one.
    num_devices = opt['world_size'] if opt['dist'] else max(1, opt['num_gpu'])
    batch = dataset['batch_size_per_gpu'] * num_devices
    return max(1, math.ceil(num_samples * (dataset.get('dataset_enlarge_ratio') or 1) / batch))


def resolve(opt: dict[str, Any], length_of: Callable[[Mapping[str, Any]], int] | None) -> None:
    """Put iterations where `opt` says epochs, in place, and the iterations of an epoch in `train.iters_per_epoch`.

    A schedule keeps its `warmup_epochs`; those that the run is too short for are left out.

    Raises:
        OptionError: if epochs cannot be counted because there is no `length_of`.
    """
    train, val, logger = opt['train'], opt.get('val') or {}, opt.get('logger') or {}
    in_epochs = [
        key
        for section, key in (
            (train, 'total_epochs'),
            (train, 'warmup_epochs'),
            (val, 'times_per_epoch'),
            (logger, 'save_checkpoint_epochs'),
        )
        if section.get(key) is not None
    ]
    if length_of is None or 'train' not in opt['datasets']:
        if in_epochs:
            raise OptionError(f'{", ".join(in_epochs)}: epochs cannot be counted without the training set')
        return
    _shorten_warmup(train)
    epoch = iterations_per_epoch(length_of(opt['datasets']['train']), opt)
    train['iters_per_epoch'] = epoch
    _replace(train, 'total_epochs', 'total_iter', lambda epochs: epochs * epoch)
    _replace(train, 'warmup_epochs', 'warmup_iter', lambda epochs: epochs * epoch or -1)
    _replace(val, 'times_per_epoch', 'val_freq', lambda times: max(1, epoch // times))
    _replace(logger, 'save_checkpoint_epochs', 'save_checkpoint_freq', lambda epochs: epochs * epoch)


def _shorten_warmup(train: dict[str, Any]) -> None:
    """Let a run that was cut to a few epochs, to try it, keep one after its warm-up: there is no schedule otherwise."""
    scheduler, total = train.get('scheduler'), train.get('total_epochs')
    warmup = scheduler.get('warmup_epochs') if isinstance(scheduler, dict) else None
    if total is not None and isinstance(warmup, int) and warmup >= total:
        train['scheduler'] = {**scheduler, 'warmup_epochs': int(total) - 1}


def _replace(section: dict[str, Any], key: str, plain_key: str, convert: Callable[[int], int]) -> None:
    """Whole numbers may have been written as `2e3`: BasicSR wants plain ones."""
    value = section.pop(key, None)
    if value is not None:
        section[plain_key] = convert(int(value))
