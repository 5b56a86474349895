"""What is registered once BasicSR and every installed plugin are imported, which takes seconds."""

from __future__ import annotations

import basicsr.archs
import basicsr.data
import basicsr.losses
import basicsr.metrics
import basicsr.models  # noqa: F401 - each of these packages registers its contents when it is imported
from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
from basicsr.utils import registry

from ast_plugin.evaluation.protocols import PROTOCOLS
from ast_plugin.models.optimizers import SCHEDULERS, find_optimizer
from ast_plugin.options.sections import Registered
from ast_plugin.plugins import load_plugins

KINDS = ('arch', 'dataset', 'loss', 'metric', 'model')


def load_registered() -> Registered:
    """Load the plugins, and say what is registered."""
    failed = load_plugins()
    return Registered(
        by_kind={kind: dict(iter(getattr(registry, f'{kind.upper()}_REGISTRY'))) for kind in KINDS},
        schedulers={
            'MultiStepLR': MultiStepRestartLR,
            'MultiStepRestartLR': MultiStepRestartLR,
            'CosineAnnealingRestartLR': CosineAnnealingRestartLR,
        },
        own_schedulers=SCHEDULERS,
        protocols={name: tuple(protocol.metrics) for name, protocol in PROTOCOLS.items()},
        failed_plugins=failed,
        find_optimizer=find_optimizer,
    )
