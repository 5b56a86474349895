"""In which number format a training step computes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ast_plugin.errors import OptionError

PRECISIONS: dict[str, torch.dtype | None] = {'fp32': None, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class Precision:
    """Autocast for the network, and for float16 the loss scaling that keeps small gradients from vanishing.

    Weights, gradients, losses and the optimiser stay in float32; so do validation and testing, as in the paper's
    protocol, whatever a run trains in.

    Args:
        name: `fp32`, `bf16` or `fp16`.
        device: where the network runs.
    Attributes:
        scaler: its state belongs to a run's; it does nothing unless `name` is `fp16`.
    Raises:
        OptionError: if the format is unknown, or the device cannot compute in it.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name not in PRECISIONS:
            raise OptionError(f'train.precision must be one of {", ".join(PRECISIONS)}, not {name!r}')
        self.name = name
        self.device_type = device.type
        self.dtype = PRECISIONS[name]
        if self.dtype is not None:
            self._try(device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == 'fp16')

    def check_wrapper(self, network: nn.Module) -> None:
        """Refuse what torch's DataParallel cannot do.

        Raises:
            OptionError: if its threads, which forget the format of autocast, would compute in float16 instead.
        """
        if self.dtype is torch.bfloat16 and isinstance(network, nn.DataParallel):
            raise OptionError(
                'train.precision: bf16 with several GPUs needs a process for each: torchrun --nproc_per_node=N '
                '-m ast_plugin train … --launcher pytorch; or use fp16, or num_gpu: 1'
            )

    def autocast(self) -> torch.autocast:
        """The context in which the network runs."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)

    def widen(self, output: Tensor) -> Tensor:
        """The network's output as the losses want it: no shorter than float32."""
        return output.float() if isinstance(output, Tensor) and output.dtype == self.dtype else output

    def _try(self, device: torch.device) -> None:
        """A convolution there and back: what a device lacks shows only then, and autocast may switch itself off."""
        image = torch.ones(1, 4, 4, 4, device=device)
        weight = torch.ones(4, 4, 3, 3, device=device, requires_grad=True)
        reason = ''
        try:
            with self.autocast():
                output = F.conv2d(image, weight)
            output.float().sum().backward()
        except RuntimeError as error:
            reason = f' ({str(error).splitlines()[0]})'
        if reason or output.dtype != self.dtype:
            others = ' or '.join(name for name in PRECISIONS if name != self.name)
            raise OptionError(
                f'train.precision: {self.name} does not work on this {self.device_type} with torch '
                f'{torch.__version__}{reason}; use {others}'
            )
