"""What is registered once BasicSR and every installed plugin are imported."""

from __future__ import annotations

from ast_plugin.options.checks import Registered

KINDS = ('arch', 'dataset', 'loss', 'metric', 'model')


def load_registered() -> Registered:
    """Import BasicSR and the plugins (seconds), and say what is registered."""
    import ast_plugin  # noqa: F401 - registers, also from a checkout that is not installed
    from ast_plugin.evaluation.protocols import PROTOCOLS
    from ast_plugin.models.optimizers import SCHEDULERS, find_optimizer
    from ast_plugin.plugins import load_plugins

    failed = load_plugins()
    # Each of these packages registers its contents when it is imported.
    import basicsr.archs
    import basicsr.data
    import basicsr.losses
    import basicsr.metrics
    import basicsr.models  # noqa: F401
    from basicsr.models.lr_scheduler import CosineAnnealingRestartLR, MultiStepRestartLR
    from basicsr.utils import registry

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
