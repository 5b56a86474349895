"""Images of a batch blended with one another, degraded and clean ones alike: MixUp and CutMix."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.options.sections import MixupOptions
from ast_plugin.options.validation import model_faults, raise_faults

# Keeps the random numbers here apart from those that datasets draw with the same seed.
_STREAM = 0x6D6978


class Mixup:
    """MixUp or CutMix, drawn by (seed, rank, iteration) alone: a resumed run needs no state to go on with the same.

    MixUp is AST's: a share λ ~ Beta(alpha, alpha) for each sample, λ · sample + (1 − λ) · partner, the partners a
    random permutation of the batch. CutMix puts a rectangle of the partner over each sample: one rectangle for the
    whole batch, 1 − λ of the area, its centre anywhere, cut off at the border.

    Args:
        options: the section `train.mixing`.
        seed: the run's.
        rank: the process's; each mixes its own batches its own way.
        iters_per_epoch: tells the epoch of an iteration; may be left out where `start_epoch` is 1.
    Raises:
        OptionError: if `start_epoch` cannot be told.
    Source: Zhang et al., ICLR 2018, with the released scripts' per-sample shares; Yun et al., ICCV 2019.
    """

    def __init__(self, options: MixupOptions, seed: int = 0, rank: int = 0, iters_per_epoch: int | None = None) -> None:
        if options.start_epoch > 1 and not iters_per_epoch:
            raise OptionError(
                f'train.mixing.start_epoch: {options.start_epoch} needs train.iters_per_epoch to tell the epoch; '
                'the command fills it in, elsewhere set it, or start_epoch: 1'
            )
        self.options = options
        self.seed, self.rank = seed, rank
        self.first_iteration = (options.start_epoch - 1) * (iters_per_epoch or 0) + 1

    def __call__(self, lq: Tensor, gt: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            lq, gt: [B, C, H, W]; gt may be larger by a whole factor. They stay as they are.
            iteration: counted from 1.
        Returns:
            Both, mixed in the same way; the same tensors where this batch is not mixed.
        """
        if iteration < self.first_iteration:
            return lq, gt
        generator = np.random.default_rng([_STREAM, self.seed, self.rank, iteration])
        if generator.random() >= self.options.probability:
            return lq, gt
        partners = torch.from_numpy(generator.permutation(len(lq))).to(lq.device)
        mix = _mix_up if self.options.type == 'mixup' else _cut_mix
        return mix(lq, gt, partners, self.options.alpha, generator)


def from_options(train: Mapping[str, Any], seed: int, rank: int) -> Mixup | None:
    """Build what `train.mixing` asks for; None if nothing."""
    options = train.get('mixing')
    if not options:
        return None
    raise_faults(model_faults(MixupOptions, options, ('train', 'mixing')), 'options')
    return Mixup(MixupOptions(**options), seed, rank, train.get('iters_per_epoch'))


def _mix_up(
    lq: Tensor, gt: Tensor, partners: Tensor, alpha: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    shares = torch.from_numpy(generator.beta(alpha, alpha, len(lq))).view(-1, *[1] * (lq.ndim - 1))
    mixed = []
    for images in (lq, gt):
        share = shares.to(images.device, images.dtype)
        mixed.append(share * images + (1 - share) * images[partners])
    return mixed[0], mixed[1]


def _cut_mix(
    lq: Tensor, gt: Tensor, partners: Tensor, alpha: float, generator: np.random.Generator
) -> tuple[Tensor, Tensor]:
    H, W = lq.shape[-2:]
    factor = gt.shape[-2] // H
    if gt.shape[-2:] != (factor * H, factor * W):
        raise ShapeError(
            f'CutMix needs clean images of the size of the degraded ones, or a multiple of it; got '
            f'{tuple(gt.shape[-2:])} for {(H, W)}'
        )
    side = (1 - generator.beta(alpha, alpha)) ** 0.5
    top, bottom = _cut(H, side, generator)
    left, right = _cut(W, side, generator)
    mixed = []
    for images, scale in ((lq, 1), (gt, factor)):
        images = images.clone()
        box = (..., slice(scale * top, scale * bottom), slice(scale * left, scale * right))
        images[box] = images[partners][box]
        mixed.append(images)
    return mixed[0], mixed[1]


def _cut(length: int, side: float, generator: np.random.Generator) -> tuple[int, int]:
    """Where a part of `side` times `length`, its centre anywhere, begins and ends."""
    cut = round(length * side)
    start = int(generator.integers(length)) - cut // 2
    return max(0, start), min(length, start + cut)
