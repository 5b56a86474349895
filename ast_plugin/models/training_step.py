"""Components of a training step: mixup, losses, precision, gradient accumulation, non-finite values, moving average."""

import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from basicsr.losses import build_loss
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ast_plugin.errors import OptionError, ShapeError, TrainingError
from ast_plugin.models import network_switches
from ast_plugin.ops.cuda_graphs import TrainingGraph
from ast_plugin.options.sections import MixupOptions
from ast_plugin.options.validation import model_faults, raise_faults

Losses = dict[str, Tensor]

PRECISIONS: dict[str, torch.dtype | None] = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}
# The loss scale starts at 2**16 and halves at each overflow; below this limit, it is not the cause of an overflow.
_SMALLEST_SCALE = 2.0**-24
_MIXUP_STREAM = 0x6D6978  # separates its random numbers from those of datasets with the same seed


class Precision:
    """Autocast for the network in `fp32`, `bf16` or `fp16`, with loss scaling for `fp16`.

    Weights, gradients, losses, the optimiser, validation and testing stay in float32.

    Raises:
        OptionError: if the precision is unknown or not supported by the device.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in PRECISIONS:
            raise OptionError(f'train.precision: expected one of {", ".join(PRECISIONS)}, got {name!r}')
        self.name = name
        self.device_type = device.type
        self.dtype = PRECISIONS[name]
        if self.dtype is not None:
            self._try(device)
        self.scaler = self._scaler(device)

    def _scaler(self, device: torch.device) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(device.type, enabled=self.name == 'fp16')

    def check_wrapper(self, network: nn.Module) -> None:
        """Reject torch's DataParallel with bf16: its threads ignore autocast's dtype and compute in float16."""
        if self.dtype is torch.bfloat16 and isinstance(network, nn.DataParallel):
            raise OptionError(
                'train.precision: bf16 with several GPUs needs one process per GPU: torchrun --nproc_per_node=N '
                '-m ast_plugin train … --launcher pytorch; or use fp16, or num_gpu: 1'
            )

    def autocast(self) -> torch.autocast:
        """Return the autocast context for the network."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)

    def widen(self, output: Tensor) -> Tensor:
        """Return the network's output in at least float32, for the losses."""
        return output.float() if isinstance(output, Tensor) and output.dtype == self.dtype else output

    def _try(self, device: torch.device) -> None:
        """Test forward and backward passes of a convolution, as devices report missing support only when used."""
        image, scaler = torch.ones(1, 4, 4, 4, device=device), self._scaler(device)
        weight = torch.ones(4, 4, 3, 3, device=device, requires_grad=True)
        reason = ''
        try:
            with self.autocast():
                output = F.conv2d(image, weight)
            scaler.scale(output.float().sum()).backward()
            scaler.unscale_(torch.optim.SGD([weight]))
        except RuntimeError as error:
            reason = f' ({str(error).splitlines()[0]})'
        if reason or output.dtype != self.dtype:
            others = ' or '.join(name for name in PRECISIONS if name != self.name)
            raise OptionError(
                f'train.precision: {self.name} does not work on this {self.device_type} with torch '
                f'{torch.__version__}{reason}; use {others}'
            )


class TrainingStep:
    """Training step: computes gradients and updates the weights, with the switches of `train`.

    Losses are averaged over all processes of a distributed run, so that all make the same decision. The host waits for
    the device once per step, to read the losses and the gradient norm.

    Args:
        network: the network, in its wrapper for parallel training if any.
        optimizer: the optimiser of the network's parameters.
        precision: the precision of the network.
        train: `accumulate`, number of micro-batches per batch; `clip_grad_norm`, maximum norm of the gradients;
            `on_nonfinite`, `stop` or `skip`, for a loss or a gradient that is NaN or Inf; `channels_last`, memory
            format of the images; `cuda_graph`, whether the network is replayed as a CUDA graph.
        batch: images per batch; None if not known.
        is_parallel: whether several processes or devices will train the network, if it is not in its wrapper yet.
    Raises:
        OptionError: if a value is out of range, or a batch has fewer images than micro-batches.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: Optimizer,
        precision: Precision,
        train: Mapping[str, Any],
        batch: int | None = None,
        is_parallel: bool = False,
    ) -> None:
        self.network, self.optimizer, self.precision = network, optimizer, precision
        self.is_distributed = isinstance(network, DistributedDataParallel)
        is_parallel = is_parallel or self.is_distributed or isinstance(network, nn.DataParallel)
        self.forward = TrainingGraph(network, train, is_parallel) if train.get('cuda_graph') else network
        self.parameters = [p for group in optimizer.param_groups for p in group['params']]
        self.accumulate = train.get('accumulate') or 1
        self.clip_grad_norm = train.get('clip_grad_norm')
        self.on_nonfinite = train.get('on_nonfinite') or 'stop'
        if self.accumulate < 1 or self.on_nonfinite not in ('stop', 'skip'):
            raise OptionError(
                'expected train.accumulate of 1 or more and train.on_nonfinite stop or skip, '
                f'got {self.accumulate!r} and {self.on_nonfinite!r}'
            )
        if batch is not None and batch < self.accumulate:
            raise OptionError(
                f'train.accumulate: a batch of {batch} cannot be split into {self.accumulate} micro-batches; '
                'accumulate only saves memory and does not enlarge the batch, see batch_size_per_gpu'
            )
        self.memory_format = torch.channels_last if train.get('channels_last') else torch.preserve_format
        # Buffers changed by a forward pass (BatchNorm and similar layers), restored if the step is skipped.
        norms = [m for m in network.modules() if isinstance(m, _NormBase)] if self.on_nonfinite == 'skip' else []
        self.statistics = [buffer for module in norms for buffer in module.buffers()]
        if self.on_nonfinite == 'skip' or precision.scaler.is_enabled():
            # If the first step is skipped, torch warns of a wrong order although BasicSR's is correct.
            warnings.filterwarnings('ignore', r'Detected call of `lr_scheduler.step\(\)` before', UserWarning)

    def __call__(
        self,
        lq: Tensor,
        gt: Tensor,
        compute_losses: Callable[[Tensor, Tensor], Losses],
        iteration: int,
        images: Sequence[str] = (),
    ) -> tuple[dict[str, float], bool]:
        """Perform a training step on a batch.

        Args:
            lq, gt: [B, C, H, W] each.
            compute_losses: function of the network's output and `gt`; losses must be means over the batch, so that
                micro-batches add up.
            iteration: for messages.
            images: paths of the images, for messages.
        Returns:
            The losses, averaged over the processes, and whether the weights have changed.
        Raises:
            TrainingError: if a loss or a gradient is not finite and `on_nonfinite` is `stop`; weights are unchanged.
        """
        statistics = [buffer.clone() for buffer in self.statistics]
        losses = self.compute_gradients(lq, gt, compute_losses)
        values, changed = self._apply(losses, iteration, images)
        if not changed and not all(map(math.isfinite, values.values())):
            for buffer, before in zip(self.statistics, statistics, strict=True):
                buffer.copy_(before)
        return values, changed

    def compute_gradients(self, lq: Tensor, gt: Tensor, compute_losses: Callable[[Tensor, Tensor], Losses]) -> Losses:
        """Compute the gradient of the summed losses, times the loss scale; return the losses."""
        self.optimizer.zero_grad(set_to_none=True)
        lq = lq.contiguous(memory_format=self.memory_format)
        count = min(self.accumulate, len(lq))
        losses: Losses = {}
        for number, (part, target) in enumerate(zip(lq.tensor_split(count), gt.tensor_split(count), strict=True)):
            share = len(part) / len(lq)
            # Gradients are synchronized once per step, after the last micro-batch.
            is_exchanged = number == count - 1 or not self.is_distributed
            with nullcontext() if is_exchanged else self.network.no_sync():
                with self.precision.autocast():
                    output = self.forward(part)
                parts = compute_losses(self.precision.widen(output), target)
                self.precision.scaler.scale(share * sum(parts.values())).backward()
            for name, value in parts.items():
                losses[name] = losses.get(name, 0) + share * value.detach()
        return losses

    def _apply(self, losses: Losses, iteration: int, images: Sequence[str]) -> tuple[dict[str, float], bool]:
        scaler = self.precision.scaler
        scaler.unscale_(self.optimizer)
        total_norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.clip_grad_norm:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip_grad_norm, total_norm)
        own, values, norm = self._read(losses, total_norm)
        losses_are_finite = all(map(math.isfinite, values.values()))
        if losses_are_finite and math.isfinite(norm):
            scaler.step(self.optimizer)
            scaler.update()
            return values, True
        if losses_are_finite and scaler.is_enabled() and scaler.get_scale() > _SMALLEST_SCALE:
            scaler.update()  # overflow, the normal way in which loss scaling adapts
            return values, False
        self._report(own, norm, iteration, images)
        if scaler.is_enabled():
            scaler.update(scaler.get_scale())  # discard this step
        self.optimizer.zero_grad(set_to_none=True)
        return values, False

    def _read(self, losses: Losses, norm: Tensor) -> tuple[dict[str, float], dict[str, float], float]:
        """Return the losses of this process, their means over all processes, and the gradient norm."""
        own = torch.stack([value.mean() for value in losses.values()])
        mean = own.clone()
        if self.is_distributed:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        numbers = torch.cat([own, mean, norm.to(own.device)[None]]).tolist()
        count = len(losses)
        here, everywhere = (dict(zip(losses, part, strict=True)) for part in (numbers[:count], numbers[count:-1]))
        return here, everywhere, numbers[-1]

    def _report(self, own: Mapping[str, float], norm: float, iteration: int, images: Sequence[str]) -> None:
        """Report non-finite values with iteration and images, as a warning or as TrainingError."""
        reports = [([f'{name} is {value}' for name, value in own.items() if not math.isfinite(value)], list(images))]
        if self.is_distributed:
            everyones: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyones, reports[0])
            reports = [(faults, paths) for faults, paths in everyones if faults] or everyones
        faults = dict.fromkeys(fault for some, _ in reports for fault in some)
        what = f'the loss {", ".join(faults)}' if faults else f'the gradient norm is {norm}'
        paths = ', '.join(path for _, some in reports for path in some)
        message = f'iteration {iteration}: {what}; images: {paths or "not reported by the dataset"}'
        if self.on_nonfinite == 'stop':
            raise TrainingError(
                f'{message}. Expected finite values: check these images, lower the learning rate or set '
                'train.clip_grad_norm; train.on_nonfinite: skip skips such steps'
            )
        logging.getLogger('basicsr').warning(f'{message}. The step is skipped')


class Mixup:
    """Mixup or CutMix of a batch, a function of (seed, rank, iteration), so that resuming needs no state.

    Mixup as in AST: λ · sample + (1 − λ) · partner with λ ~ Beta(alpha, alpha) for each sample, where partners are a
    random permutation of the batch. CutMix pastes a rectangle of the partner into each sample: one rectangle for the
    whole batch, with 1 − λ of the area and a uniformly sampled centre, clipped at the border.

    Args:
        options: the section `train.mixing`.
        seed: seed of the run.
        rank: rank of the process; processes mix their batches independently.
        iters_per_epoch: iterations per epoch; not needed if `start_epoch` is 1.
    Raises:
        OptionError: if `start_epoch` is set and `iters_per_epoch` is not known.
    Source: Zhang et al., ICLR 2018, with the released scripts' per-sample shares; Yun et al., ICCV 2019.
    """

    def __init__(self, options: MixupOptions, seed: int = 0, rank: int = 0, iters_per_epoch: int | None = None) -> None:
        if options.start_epoch > 1 and not iters_per_epoch:
            raise OptionError(
                f'train.mixing.start_epoch: {options.start_epoch} needs train.iters_per_epoch, which only '
                '`basicsr train` sets automatically; set it, or start_epoch: 1'
            )
        self.options = options
        self.seed, self.rank = seed, rank
        self.first_iteration = (options.start_epoch - 1) * (iters_per_epoch or 0) + 1

    def __call__(self, lq: Tensor, gt: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Args:
            lq, gt: [B, C, H, W], not modified; gt may be larger by an integer factor.
            iteration: counted from 1.
        Returns:
            Both, mixed in the same way; the input tensors if this batch is not mixed.
        """
        if iteration < self.first_iteration:
            return lq, gt
        generator = np.random.default_rng([_MIXUP_STREAM, self.seed, self.rank, iteration])
        if generator.random() >= self.options.probability:
            return lq, gt
        partners = torch.from_numpy(generator.permutation(len(lq))).to(lq.device)
        mix = self._mix_up if self.options.type == 'mixup' else self._cut_mix
        return mix(lq, gt, partners, generator)

    def _mix_up(self, lq: Tensor, gt: Tensor, partners: Tensor, generator: np.random.Generator) -> tuple[Tensor, ...]:
        shares = torch.from_numpy(generator.beta(self.options.alpha, self.options.alpha, (len(lq), 1, 1, 1)))

        def mix(images: Tensor) -> Tensor:
            share = shares.to(images)
            return share * images + (1 - share) * images[partners]

        return mix(lq), mix(gt)

    def _cut_mix(self, lq: Tensor, gt: Tensor, partners: Tensor, generator: np.random.Generator) -> tuple[Tensor, ...]:
        factor = gt.shape[-2] // lq.shape[-2]
        if gt.shape[-2:] != (factor * lq.shape[-2], factor * lq.shape[-1]):
            raise ShapeError(
                f'CutMix expects clean images whose size equals or is a multiple of the degraded size; got '
                f'{tuple(gt.shape[-2:])} for {tuple(lq.shape[-2:])}'
            )
        share = (1 - generator.beta(self.options.alpha, self.options.alpha)) ** 0.5
        bounds = []
        for length in lq.shape[-2:]:
            cut = round(length * share)
            start = int(generator.integers(length)) - cut // 2
            bounds.append((max(0, start), min(length, start + cut)))

        def mix(images: Tensor, scale: int) -> Tensor:
            box = (..., *(slice(scale * first, scale * last) for first, last in bounds))
            mixed = images.clone()
            mixed[box] = images[partners][box]
            return mixed

        return mix(lq, 1), mix(gt, factor)


def build_mixup(train: Mapping[str, Any], seed: int, rank: int) -> Mixup | None:
    """Build the mixup of `train.mixing`; return None if it is not set."""
    options = train.get('mixing')
    if not options:
        return None
    raise_faults(model_faults(MixupOptions, options, ('train', 'mixing')), 'options')
    return Mixup(MixupOptions(**options), seed, rank, train.get('iters_per_epoch'))


def build_losses(train: Mapping[str, Any], device: torch.device) -> dict[str, nn.Module]:
    """Build the losses by their names in the log: `l_pix` for `pixel_opt`, `l_NAME` for any other `NAME_opt`."""
    losses = {
        f'l_{key.removesuffix("_opt").replace("pixel", "pix")}': build_loss(options).to(device)
        for key, options in train.items()
        if key.endswith('_opt') and options
    }
    if not losses:
        raise OptionError('train has no loss: set pixel_opt, for example to {type: ASTCharbonnierLoss}')
    check_reductions(train, losses)
    return losses


def check_reductions(train: Mapping[str, Any], losses: Mapping[str, nn.Module]) -> None:
    """Reject losses that are not means over the batch if `accumulate` splits it into micro-batches."""
    sums = [name for name, criterion in losses.items() if getattr(criterion, 'reduction', 'mean') != 'mean']
    if sums and (train.get('accumulate') or 1) > 1:
        raise OptionError(f'train.accumulate needs losses with reduction: mean, but {", ".join(sums)} has another')


def compute_losses(losses: Mapping[str, nn.Module], output: Tensor, target: Tensor) -> Losses:
    """Return the values of all losses. BasicSR's perceptual loss has two parts, either of which may be None.

    Raises:
        ShapeError: if output and target differ in shape; losses would broadcast them silently.
    """
    if isinstance(output, Tensor) and output.shape != target.shape:
        raise ShapeError(f'the network returns {list(output.shape)} for a clean image of {list(target.shape)}')
    values: Losses = {}
    for name, criterion in losses.items():
        value = criterion(output, target)
        if isinstance(value, tuple):
            content, style = value
            values.update({k: v for k, v in ((name, content), ('l_style', style)) if v is not None})
        else:
            values[name] = value
    return values


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Update a moving average in place: average = decay · average + (1 − decay) · network.

    Floating-point parameters and buffers (e.g. BatchNorm's statistics) are averaged; integer buffers are copied.
    """
    old, new = (list(chain(each.parameters(), each.buffers())) for each in (average, network))
    pairs = list(zip(old, new, strict=True))
    numbers = [pair for pair in pairs if pair[0].is_floating_point()]
    if numbers:
        old, new = map(list, zip(*numbers, strict=True))
        # Computed as old + (1 − decay)(new − old), which leaves constant buffers such as masks bitwise unchanged.
        get_ema_multi_avg_fn(decay)(old, new, None)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


def batch_size(opt: Mapping[str, Any]) -> int | None:
    """Return the number of images per step of one process; None if the options do not define it."""
    per_device = opt.get('datasets', {}).get('train', {}).get('batch_size_per_gpu')
    return per_device and per_device * (1 if opt['dist'] else max(1, opt['num_gpu']))


def check_switches(opt: Mapping[str, Any], network: nn.Module, losses: Mapping[str, nn.Module]) -> None:
    """Check the switches of `train` before a run, with a network that is discarded afterwards and may be on `meta`.

    Raises:
        OptionError: for the first switch that does not apply to network, losses, batch or device.
    """
    train = opt['train']
    check_reductions(train, losses)
    network_switches.apply(network, train)
    build_mixup(train, seed=0, rank=0)
    # CUDA is not initialized here: each process selects its GPU later, and would now allocate on the first one.
    device = 'cpu' if opt['num_gpu'] else opt.get('device', 'cpu')
    precision = Precision((train.get('precision') or 'fp32') if not opt['num_gpu'] else 'fp32', torch.device(device))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    TrainingStep(
        network, optimizer, precision, train, batch_size(opt), is_parallel=bool(opt.get('dist')) or opt['num_gpu'] > 1
    )
