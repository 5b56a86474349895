"""Learning-rate schedules that BasicSR lacks."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ast_plugin.errors import OptionError


class WarmupCosineLR(LRScheduler):
    """Linear warm-up, then half a cosine down to a floor; changing every iteration, or only from epoch to epoch.

    With `iters_per_epoch` it is AST's recipe: over W warm-up epochs LR/W, 2LR/W, …, LR, then LR again and down the
    cosine, each rate held for a whole epoch.

    Args:
        optimizer: its groups' rates are the highest ones.
        total_iter: iterations of the whole run; past it the rate stays at `eta_min`.
        warmup_iter: how many of them warm up, in [0, total_iter).
        eta_min: the floor.
        iters_per_epoch: iterations for which a rate is held.
    Raises:
        OptionError: if the numbers contradict one another.
    Source: the official training scripts' gradual warm-up with cosine annealing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_iter: int,
        warmup_iter: int = 0,
        eta_min: float = 0.0,
        iters_per_epoch: int = 1,
        last_epoch: int = -1,
    ) -> None:
        if iters_per_epoch < 1 or not 0 <= warmup_iter < total_iter:
            raise OptionError(
                f'the schedule needs iters_per_epoch >= 1 and 0 <= warmup_iter < total_iter, '
                f'not {iters_per_epoch}, {warmup_iter} and {total_iter}'
            )
        self.warmup_epochs = math.ceil(warmup_iter / iters_per_epoch)
        self.num_epochs = max(math.ceil(total_iter / iters_per_epoch), self.warmup_epochs + 1)
        self.eta_min = eta_min
        self.iters_per_epoch = iters_per_epoch
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        """Rates of the groups at `last_epoch`, which BasicSR counts in iterations."""
        epoch = self.last_epoch // self.iters_per_epoch
        if epoch < self.warmup_epochs:
            return [base * (epoch + 1) / self.warmup_epochs for base in self.base_lrs]
        done = min(1.0, (epoch - self.warmup_epochs) / (self.num_epochs - self.warmup_epochs))
        share = (1 + math.cos(math.pi * done)) / 2
        return [self.eta_min + (base - self.eta_min) * share for base in self.base_lrs]


SCHEDULERS = {'WarmupCosineLR': WarmupCosineLR}
