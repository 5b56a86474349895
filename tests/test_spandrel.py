"""Tests of AST through spandrel's public interface: detection, options, and equal results."""

import pytest
import torch

from ast_plugin.archs.ast_arch import AST
from ast_plugin.archs.networks import build_network
from ast_plugin.checkpoints import save_torch, save_weights
from ast_plugin.errors import BackendUnavailable, OptionError

from .archs.golden import GoldenCase

try:
    from ast_plugin import spandrel as ours
    from ast_plugin.spandrel import spandrel
except BackendUnavailable:
    pytest.skip('the extra `baselines` is not installed', allow_module_level=True)
SMALL = {'type': 'AST', 'embed_dim': 4, 'num_heads': [1] * 9}


@pytest.fixture
def load(tmp_path):
    """Write weights, load them through spandrel, and return the descriptor."""
    ours.install()
    ours.install()

    def load(state, options=None):
        path = tmp_path / ('net.pth' if options is None else 'net.safetensors')
        if options is None:
            save_torch(path, {'state_dict': state})
        else:
            save_weights(path, state, options)
        descriptor = spandrel.ModelLoader().load_from_file(path).eval()
        assert descriptor.architecture.id == 'AST' and isinstance(descriptor.model, AST)
        assert (descriptor.purpose, descriptor.scale) == ('Restoration', 1)
        return descriptor

    return load


@pytest.mark.parametrize('name', ['tiny_frfn_4ch', 'tiny_leff_128'])
def test_load_official_names(name, load):
    case = GoldenCase(name)
    with torch.inference_mode():
        assert case.error(load(case.state()).model(case.input())) < 1e-5


@pytest.mark.parametrize(
    'options',
    [
        {'depths': [2] * 9, 'img_size': 64},  # the deepest levels shift differently than with 128
        {'depths': [1] * 9, 'attention': 'sparse'},  # not inferable from names and shapes
        {'depths': [1] * 9, 'ffn': 'leff', 'in_chans': 1, 'out_chans': 1},
    ],
    ids=str,
)
def test_load_options_of_metadata(options, load, tolerances):
    options, dtype = SMALL | options, torch.bfloat16
    network = build_network(options).eval()
    descriptor, image = load(network.state_dict(), options), torch.rand(2, network.in_chans, 37, 91)
    with torch.inference_mode():
        want = network(image).clamp(0, 1)
        torch.testing.assert_close(descriptor(image), want, rtol=0, atol=0)
        got = descriptor.to(dtype)(image.to(dtype))
    assert (descriptor.input_channels, descriptor.output_channels) == (network.in_chans, network.out_chans)
    assert descriptor.supports_half and descriptor.supports_bfloat16
    assert got.dtype == dtype and (got.float() - want).norm() < tolerances[dtype] * want.norm()


def test_tags_of_a_variant(load):
    assert load(build_network({'type': 'AST_XS'}).state_dict()).tags == ['AST_XS', '16dim', 'assa', 'frfn']


def test_uformer_is_not_ast():
    uformer = spandrel.MAIN_REGISTRY['Uformer'].architecture
    network = build_network({'type': 'Spandrel', 'name': 'Uformer', 'embed_dim': 4, 'num_heads': [1] * 9})
    assert spandrel.MAIN_REGISTRY.load(network.state_dict()).architecture is uformer


def test_install_with_another_ast():
    class Other(spandrel.Architecture):
        def __init__(self):
            super().__init__(id='AST', detect=lambda state: False)

        def load(self, state_dict):
            raise NotImplementedError

    registry = spandrel.ArchRegistry()
    registry.add(spandrel.ArchSupport.from_architecture(Other()))
    with pytest.raises(OptionError, match='already has another architecture named AST: Other'):
        ours.install(registry)
