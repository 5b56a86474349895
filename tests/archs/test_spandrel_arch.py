"""Networks of spandrel: any size, original weight names, recognition from state dicts, errors if not installed."""

import copy
import sys
from pathlib import Path

import pytest
import torch

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin.archs.networks import network_of
from ast_plugin.archs.spandrel_arch import Spandrel
from ast_plugin.checkpoints import Checkpoint, read_checkpoint, save_torch
from ast_plugin.errors import BackendUnavailable, CheckpointError, OptionError
from ast_plugin.evaluation.restorer import Restorer
from ast_plugin.models import preflight
from ast_plugin.options import validation

TINY = {  # by class name: options, and the name of the first weight in released files
    'NAFNet': ({'width': 4, 'middle_blk_num': 1, 'enc_blk_nums': [1, 1], 'dec_blk_nums': [1, 1]}, 'intro.weight'),
    'Uformer': (
        {'embed_dim': 4, 'depths': [1] * 9, 'num_heads': [1] * 9, 'win_size': 2, 'img_size': 32},
        'input_proj.proj.0.weight',
    ),
    'Restormer': (
        {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'heads': [1, 1, 1, 1]},
        'patch_embed.proj.weight',
    ),
}


@pytest.fixture
def installed():
    import basicsr.archs  # noqa: F401 (makes torchvision, which spandrel imports, work with any build of torch)

    pytest.importorskip('spandrel_extra_arches', reason='the extra `baselines` is not installed')
    return pytest.importorskip('spandrel', reason='the extra `baselines` is not installed')


@pytest.mark.parametrize('name', TINY)
def test_any_size(installed, name):
    network = Spandrel(name, **TINY[name][0]).eval()
    for parameter in network.parameters():  # some are initialised to zero
        parameter.data.copy_(0.1 * torch.randn(parameter.shape))
    for size in ((1, 1), (7, 37)):
        output = network(torch.rand(1, 3, *size))
        assert output.shape == (1, 3, *size) and torch.isfinite(output).all()
    output.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    if name != 'NAFNet':  # which pads internally
        image = torch.rand(2, 3, network.sizes.multiple_of, network.sizes.multiple_of)
        torch.testing.assert_close(network(image), network.network(image), rtol=0, atol=0)


@pytest.mark.parametrize('name', TINY)
def test_weights_have_released_names(installed, name, tmp_path):
    options, first = TINY[name]
    network, other = (Spandrel(name, **options).eval() for _ in range(2))
    state = network.state_dict()
    assert first in state and not any(key.startswith('network.') for key in state)
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert copy.deepcopy(network).state_dict().keys() == state.keys()
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        restored = network(image)
        theirs = installed.ModelLoader().load_from_state_dict(dict(state)).model.eval()(image)
    torch.testing.assert_close(restored, theirs)
    with pytest.raises(RuntimeError, match=r'Missing key.*\n.*Unexpected key'):
        other.load_state_dict({**{k: v for k, v in state.items() if k != first}, 'more': image})
    # The weights file alone is enough, but for options that affect neither names nor shapes.
    save_torch(tmp_path / 'w.pth', {'params': state})
    inferred, assumed = network_of(read_checkpoint(tmp_path / 'w.pth'))
    assert (inferred['type'], inferred['name']) == ('Spandrel', name)
    assert [note.split()[0] for note in assumed] == (['img_size'] if name == 'Uformer' else [])
    told = {**inferred, 'img_size': options['img_size']} if name == 'Uformer' else None
    restorer = Restorer.from_weights(tmp_path / 'w.pth', network=told, device='cpu')
    pixels = restorer.restore(image[0].permute(1, 2, 0).numpy())
    assert pixels == pytest.approx(restored[0].clamp(0, 1).permute(1, 2, 0).numpy(), abs=1e-6)


@pytest.mark.parametrize(
    ('options', 'complaint'),
    [
        ({'name': 'NAFNett'}, r'did you mean NAFNet\?'),
        ({'name': 'x'}, 'available: '),
        ({'name': None}, 'expected the name of a network, got None'),
        ({'name': 'NAFNet', 'widht': 4}, r'NAFNet has no option widht, did you mean width\?'),
        ({'name': 'LaMa'}, 'LaMa is an inpainting network'),
    ],
)
def test_bad_options(installed, options, complaint):
    with pytest.raises(OptionError, match=complaint):
        Spandrel(**options)


def test_option_check_knows_hyperparameters(installed):
    network = {'type': 'Spandrel', 'name': 'NAFNet', 'widht': 8}
    opt = {'name': 'a', 'model_type': 'RestorationModel', 'datasets': {}, 'network_g': network}
    faults = validation.find_faults(opt, preflight.load_registered(), is_train=False)
    found = [str(fault) for fault in faults if 'network_g' in fault.where]
    assert found == ['network_g.widht: unknown key, did you mean width?']


@pytest.mark.parametrize(('package', 'name'), [('spandrel', 'NAFNet'), ('spandrel_extra_arches', 'Restormer')])
def test_not_installed(monkeypatch, package, name):
    if package != 'spandrel':
        spandrel = pytest.importorskip('spandrel', reason='the extra `baselines` is not installed')
        monkeypatch.setattr(spandrel, 'MAIN_REGISTRY', [])
    monkeypatch.setitem(sys.modules, package, None)
    words = rf'{package}.*is not installed.*pip install "ast_plugin\[baselines\]"'
    with pytest.raises(BackendUnavailable, match=words):
        Spandrel(name)


def test_unknown_weights_without_spandrel(monkeypatch):
    monkeypatch.setitem(sys.modules, 'spandrel', None)
    with pytest.raises(CheckpointError):
        network_of(Checkpoint(Path('w.pth'), {'intro.weight': torch.zeros(4, 3, 3, 3)}))
