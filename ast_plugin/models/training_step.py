"""A step of training: gradients in micro-batches, and whether they may be used."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ast_plugin.errors import OptionError, TrainingError
from ast_plugin.models.precision import Precision

Losses = dict[str, Tensor]
# Loss scaling begins at 2**16 and halves at each overflow: below this it was not the scale that was too large.
_SMALLEST_SCALE = 2.0**-24


class TrainingStep:
    """Computes gradients and lets the optimiser use them, by the switches of `train`.

    Every process of a distributed run decides alike, for which the losses are averaged over all of them; the host
    waits for the device once a step, to read the losses together with the gradients' length.

    Args:
        network: in its wrapper of parallel training, if any.
        optimizer: of the network's parameters.
        precision: in what the network computes.
        train: `accumulate`, micro-batches that a batch is cut into; `clip_grad_norm`, the length to which longer
            gradients are cut; `on_nonfinite`, `stop` or `skip`, for a loss or a gradient that is NaN or Inf;
            `channels_last`, how images are laid out.
        is_distributed: whether other processes train the same network.
        batch: images that a batch has, where that is known.
    Raises:
        OptionError: if a value is out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        train: Mapping[str, Any],
        is_distributed: bool = False,
        batch: int | None = None,
    ) -> None:
        self.network, self.optimizer, self.precision = network, optimizer, precision
        self.is_distributed = is_distributed
        self.parameters = [p for group in optimizer.param_groups for p in group['params']]
        self.accumulate = train.get('accumulate') or 1
        self.clip_grad_norm = train.get('clip_grad_norm')
        self.on_nonfinite = train.get('on_nonfinite') or 'stop'
        if self.accumulate < 1 or self.on_nonfinite not in ('stop', 'skip'):
            raise OptionError(
                'train.accumulate must be 1 or more and train.on_nonfinite stop or skip, '
                f'not {self.accumulate!r} and {self.on_nonfinite!r}'
            )
        if batch is not None and batch < self.accumulate:
            raise OptionError(
                f'train.accumulate: a batch of {batch} cannot be cut into {self.accumulate} micro-batches; the batch '
                'stays what batch_size_per_gpu says, and accumulate only saves memory'
            )
        self.memory_format = torch.channels_last if train.get('channels_last') else torch.preserve_format
        self.statistics = _running_statistics(network) if self.on_nonfinite == 'skip' else []
        if self.on_nonfinite == 'skip' or precision.scaler.is_enabled():
            # BasicSR steps in the right order, but a first step that is skipped looks to torch as if it did not.
            warnings.filterwarnings('ignore', r'Detected call of `lr_scheduler.step\(\)` before', UserWarning)

    def __call__(
        self,
        lq: Tensor,
        gt: Tensor,
        compute_losses: Callable[[Tensor, Tensor], Losses],
        iteration: int,
        images: Sequence[str] = (),
    ) -> tuple[dict[str, float], bool]:
        """Make a step on a batch.

        Args:
            lq, gt: [B, C, H, W] each.
            compute_losses: of the network's output and `gt`; means over the batch, which is what makes micro-batches
                add up to the whole.
            iteration: for messages.
            images: where the batch is from, likewise.
        Returns:
            Each loss, the mean over the processes, and whether the weights have changed.
        Raises:
            TrainingError: if a loss or a gradient is not finite and that shall stop the run. The weights are as before.
        """
        statistics = [buffer.clone() for buffer in self.statistics]
        losses = self.compute_gradients(lq, gt, compute_losses)
        values, changed = self._apply(losses, iteration, images)
        if not changed and not all(map(math.isfinite, values.values())):
            for buffer, before in zip(self.statistics, statistics, strict=True):
                buffer.copy_(before)
        return values, changed

    def compute_gradients(self, lq: Tensor, gt: Tensor, compute_losses: Callable[[Tensor, Tensor], Losses]) -> Losses:
        """Leave the gradient of the summed losses in the parameters, times the loss scale; return the losses."""
        self.optimizer.zero_grad(set_to_none=True)
        lq = lq.contiguous(memory_format=self.memory_format)
        count = min(self.accumulate, len(lq))
        losses: Losses = {}
        for number, (part, target) in enumerate(zip(lq.tensor_split(count), gt.tensor_split(count), strict=True)):
            share = len(part) / len(lq)
            with self._gradients_stay_here() if number < count - 1 else nullcontext():
                with self.precision.autocast():
                    output = self.network(part)
                found = compute_losses(self.precision.widen(output), target)
                self.precision.scaler.scale(share * sum(found.values())).backward()
            for name, value in found.items():
                losses[name] = losses.get(name, 0) + share * value.detach()
        return losses

    def _gradients_stay_here(self):
        """Processes exchange gradients once a step, after the last micro-batch."""
        return self.network.no_sync() if isinstance(self.network, DistributedDataParallel) else nullcontext()

    def _apply(self, losses: Losses, iteration: int, images: Sequence[str]) -> tuple[dict[str, float], bool]:
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        own, values, norm = self._read(losses, self._cut_gradients())
        losses_are_finite = all(map(math.isfinite, values.values()))
        if losses_are_finite and math.isfinite(norm):
            scaler.step(self.optimizer)
            scaler.update()
            return values, True
        if losses_are_finite and scaler.is_enabled() and scaler.get_scale() > _SMALLEST_SCALE:
            scaler.update()  # an overflow, which is how loss scaling finds its scale
            return values, False
        self._report(own, norm, iteration, images)
        if scaler.is_enabled():
            scaler.update(scaler.get_scale())  # forget this step
        self.optimizer.zero_grad(set_to_none=True)
        return values, False

    def _cut_gradients(self) -> Tensor:
        """Cut the gradients to `clip_grad_norm`, and return how long they were. Equal in all processes."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self.clip_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad_norm, norm)
        return norm

    def _read(self, losses: Losses, norm: Tensor) -> tuple[dict[str, float], dict[str, float], float]:
        """Each loss here and on average over the processes, and the gradients' length."""
        own = torch.stack([value.mean() for value in losses.values()])
        mean = own.clone()
        if self.is_distributed:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        numbers = torch.cat([own, mean, norm.to(own.device)[None]]).tolist()
        count = len(losses)
        return (
            dict(zip(losses, numbers[:count], strict=True)),
            dict(zip(losses, numbers[count:-1], strict=True)),
            numbers[-1],
        )

    def _report(self, own: Mapping[str, float], norm: float, iteration: int, images: Sequence[str]) -> None:
        """Say what is not finite, at which iteration and with which images: in the log, or as the error to stop by."""
        found = [([f'{name} is {value}' for name, value in own.items() if not math.isfinite(value)], list(images))]
        if self.is_distributed:
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, found[0])
            found = [(faults, paths) for faults, paths in everyones if faults] or everyones
        faults = dict.fromkeys(fault for some, _ in found for fault in some)
        what = f'the loss {", ".join(faults)}' if faults else f'the length of the gradients is {norm}'
        paths = ', '.join(path for _, some in found for path in some)
        message = f'iteration {iteration}: {what}; images: {paths or "not told by the dataset"}'
        if self.on_nonfinite == 'stop':
            raise TrainingError(
                f'{message}. Expected finite numbers: look at these images, lower the rate or set '
                'train.clip_grad_norm; with train.on_nonfinite: skip such steps are left out'
            )
        logging.getLogger('basicsr').warning(f'{message}. The step is left out')


def _running_statistics(network: nn.Module) -> list[Tensor]:
    """What a forward pass changes: the buffers of BatchNorm and its like."""
    return [buffer for module in network.modules() if isinstance(module, _NormBase) for buffer in module.buffers()]


def batch_size(opt: Mapping[str, Any]) -> int | None:
    """Images that a process trains on at a time, by BasicSR's options; None where they do not tell."""
    per_device = opt.get('datasets', {}).get('train', {}).get('batch_size_per_gpu')
    return per_device and per_device * (1 if opt['dist'] else max(1, opt['num_gpu']))
