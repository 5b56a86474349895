"""The list of what is registered, and what happens when a name is taken."""

import importlib

import pytest

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin import registration

PROMISED = {
    'ARCH_REGISTRY': {'AST', 'AST_XS', 'AST_T', 'AST_B', 'Mixed', 'Spandrel'},
    'MODEL_REGISTRY': {'RestorationModel'},
    'DATASET_REGISTRY': {'PairsDataset', 'SyntheticPairsDataset'},
    'LOSS_REGISTRY': {'ASTCharbonnierLoss', 'TVLoss', 'EdgeLoss', 'FFTLoss', 'PSNRLoss'},
    'METRIC_REGISTRY': {
        'calculate_psnr_matlab',
        'calculate_ssim_matlab',
        'calculate_psnr_skimage',
        'calculate_ssim_skimage',
        'calculate_psnr_y_float',
        'pyiqa',
    },
}


def registries():
    return importlib.import_module('basicsr.utils.registry')


@pytest.mark.parametrize('registry', PROMISED)
def test_promised_names_are_registered(registry):
    entries = dict(iter(getattr(registries(), registry)))
    ours = {name for name, item in entries.items() if item.__module__.startswith('ast_plugin.')}
    assert ours == PROMISED[registry]
    assert ours == {entry.partition(':')[2] for entry in registration.REGISTERED[registry]}


def test_registering_again_changes_nothing():
    before = {name: dict(iter(getattr(registries(), name))) for name in PROMISED}
    registration.register_all()
    assert before == {name: dict(iter(getattr(registries(), name))) for name in PROMISED}


def test_basicsr_builds_what_is_registered():
    from basicsr.archs import build_network
    from basicsr.losses import build_loss

    assert type(build_network({'type': 'AST_XS', 'img_size': 128})).__name__ == 'AST'
    assert type(build_loss({'type': 'ASTCharbonnierLoss'})).__name__ == 'ASTCharbonnierLoss'


def named(module: str, name: str = 'Net', qualname: str | None = None) -> type:
    return type(name, (), {'__module__': module, '__qualname__': qualname or name})


def test_collision_names_both_modules():
    registry = registries().Registry('arch')
    theirs, ours = named('their_plugin.nets'), named('ast_plugin.archs.ast_arch')
    registration.add(registry, 'Net', theirs)
    with pytest.raises(registration.RegistrationError) as caught:
        registration.add(registry, 'Net', ours)
    for told in ('their_plugin.nets', 'ast_plugin.archs.ast_arch', 'Net', 'arch registry'):
        assert told in str(caught.value)
    assert dict(iter(registry)) == {'Net': theirs}


def test_collision_within_a_module():
    registry = registries().Registry('arch')
    registration.add(registry, 'Net', named('nets'))
    with pytest.raises(registration.RegistrationError):
        registration.add(registry, 'Net', named('nets', qualname='Outer.Net'))


def test_same_object_and_its_reloaded_self():
    registry = registries().Registry('arch')
    first, second = named('nets'), named('nets')
    registration.add(registry, 'Net', first)
    registration.add(registry, 'Net', first)
    assert registry.get('Net') is first
    registration.add(registry, 'Net', second)
    assert registry.get('Net') is second
    assert set(vars(second)) == set(vars(named('nets')))  # nothing but the entry was set
