from collections import Counter
from copy import deepcopy

import pytest
import torch
from torch import nn

from ast_plugin import ops
from ast_plugin.archs.ast_arch import AST
from ast_plugin.archs.blocks import ASTBlock
from ast_plugin.errors import OptionError
from ast_plugin.models import network_switches

TINY = {'img_size': 32, 'window_size': 4, 'embed_dim': 4, 'depths': [1, 1, 1, 1, 1, 2, 1, 1, 1], 'num_heads': [1] * 9}


def ast(**options):
    torch.manual_seed(0)
    return AST(**{**TINY, 'drop_path_rate': 0.5, **options})


def swinir():
    from basicsr.archs.swinir_arch import SwinIR

    torch.manual_seed(0)
    return SwinIR(img_size=8, window_size=4, embed_dim=8, depths=[2, 2], num_heads=[1, 1], upscale=1)


def msrresnet():
    from basicsr.archs.srresnet_arch import MSRResNet

    torch.manual_seed(0)
    return MSRResNet(num_feat=8, num_block=3, upscale=4)


def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 3, 3))


def gradients(network, size=32):
    """Return output and gradients of a step with stochastic depth."""
    torch.manual_seed(1)
    output = network.train()(torch.rand(2, 3, size, size))
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in network.parameters())]


def kept_bytes(network):
    """Return the bytes that the forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.train()(torch.rand(1, 3, 32, 32))
    return sum(kept.values())


def test_the_blocks_of_networks():
    assert Counter(type(block) for block in network_switches.blocks(ast())) == {ASTBlock: 10}
    names = [type(block).__name__ for block in network_switches.blocks(swinir())]
    assert names.count('RSTB') == 2 and 'SwinTransformerBlock' not in names
    assert [type(block).__name__ for block in network_switches.blocks(msrresnet())] == ['ResidualBlockNoBN'] * 3
    assert network_switches.blocks(plain()) == []


@pytest.mark.parametrize(
    ('build', 'switches', 'tolerance'),
    [
        (ast, {'gradient_checkpointing': True}, 0),
        (swinir, {'gradient_checkpointing': True}, 0),
        (msrresnet, {'compile': 'aot_eager', 'gradient_checkpointing': True}, 1e-4),
        (msrresnet, {'channels_last': True}, 1e-4),
    ],
)
def test_switches_compute_the_same(build, switches, tolerance):
    """See test_restoration_model.py for a run of AST with compiled blocks."""
    original, network = build(), network_switches.apply(build(), switches)
    assert list(network.state_dict()) == list(original.state_dict())
    for module, other in zip(network.modules(), original.modules(), strict=True):
        assert isinstance(module, type(other)) and type(module).__name__ == type(other).__name__
    for got, expected in zip(gradients(network, 16), gradients(original, 16), strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 100)
    if 'channels_last' in switches:
        assert network.conv_first.weight.is_contiguous(memory_format=torch.channels_last)


def test_checkpointing_replaces_the_networks_own():
    before, own = kept_bytes(ast()), kept_bytes(ast(use_checkpoint=True))
    for options in ({}, {'use_checkpoint': True}):
        network = network_switches.apply(ast(**options), {'gradient_checkpointing': True})
        assert kept_bytes(network) == own < before / 3
    assert kept_bytes(network_switches.apply(swinir(), {'gradient_checkpointing': True})) < kept_bytes(swinir())


@pytest.mark.parametrize('options', [{}, {'use_checkpoint': True}], ids=['switch', 'own'])
def test_checkpoints_keep_the_backend(options):
    """The backward pass uses the backend of the forward pass, also in autograd's GPU threads, outside the `with`."""
    network = ast(**options)
    if not options:
        network_switches.apply(network, {'gradient_checkpointing': True})
    with ops.use_backend('fused'):
        loss = network(torch.rand(1, 3, 32, 32)).square().mean()
    with ops.use_backend('reference'):
        first, second = (torch.autograd.grad(loss, list(network.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_copies_of_checkpointed_networks():
    network = network_switches.apply(ast(drop_path_rate=0.0), {'gradient_checkpointing': True})
    copy = deepcopy(network)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
        image = torch.rand(1, 3, 32, 32)
        assert torch.equal(copy(image), image)
        assert not torch.equal(network(image), image)


def test_compilation_is_for_one_size_of_patches():
    """Training compiles each block size once; images of other sizes are validated eagerly."""
    seen = []

    def backend(graph, inputs):
        seen.append(tuple(inputs))
        return graph.forward

    torch._dynamo.reset()
    torch._dynamo.register_backend(backend, name='counting')
    network = network_switches.apply(ast(drop_path_rate=0.0), {'compile': 'counting'})
    for _ in range(2):
        network(torch.rand(1, 3, 32, 32))
        compiled = len(seen)
    assert 8 < compiled <= 20  # more than torch's default limit
    with torch.inference_mode(), network_switches.eager_blocks():
        network.eval()(torch.rand(1, 3, 33, 47))
    assert len(seen) == compiled
    network.train()(torch.rand(1, 3, 32, 32))
    assert len(seen) == compiled


@pytest.mark.parametrize(
    ('build', 'options', 'told'),
    [
        (plain, {'gradient_checkpointing': True}, 'gradient_checkpointing needs repeated blocks, and Sequential'),
        (plain, {'compile': 'eager'}, 'compile needs repeated blocks, and Sequential'),
        (ast, {'compile': 'inductr'}, "no backend 'inductr'"),
    ],
)
def test_switches_that_do_not_apply(build, options, told):
    with pytest.raises(OptionError, match=told):
        network_switches.apply(build(), options)
