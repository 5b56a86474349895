"""Caching of prepared weights within `frozen_weights`, and no caching elsewhere."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn

from ast_plugin import ops
from ast_plugin.archs.ast_arch import AST_XS
from ast_plugin.ops.backend import frozen_weights, make_once

tiny_ast = partial(AST_XS, embed_dim=4, num_heads=[1] * 9, img_size=32)


class Counted:
    """A function of a weight that counts its calls."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight, self.count = weight, 0

    def __call__(self, *settings) -> float:
        def make() -> float:
            self.count += 1
            return self.weight.sum().item()

        with torch.no_grad():
            return make_once(make, (self.weight, None), *settings)


@pytest.fixture
def counted() -> Counted:
    return Counted(nn.Parameter(torch.ones(3)))


def test_make_once_per_setting(counted):
    assert [counted(), counted()] == [3, 3] and counted.count == 2
    with frozen_weights():
        assert [counted('a'), counted('a'), counted('b'), counted('a')] == [3] * 4
        with ThreadPoolExecutor(1) as other:  # has no cache
            assert other.submit(counted, 'a').result() == 3
    assert counted.count == 5


def test_cache_ends_with_the_outermost(counted):
    with pytest.raises(KeyError), frozen_weights():
        counted()
        with frozen_weights():
            counted()
        assert counted.count == 1
        raise KeyError
    counted.weight.data.zero_()
    with frozen_weights():
        assert counted() == 0


def test_new_weights_at_an_old_address():
    other = Counted(torch.ones(3))
    with frozen_weights():
        assert [other(), other()] == [3, 3] and other.count == 2  # not a parameter: not cached
        sums = [Counted(nn.Parameter(torch.full((3,), float(value))))() for value in range(20)]
    assert sums == [3.0 * value for value in range(20)]


def test_tensors_with_gradients_are_not_cached():
    weight, count = nn.Parameter(torch.ones(3)), []
    with frozen_weights():
        for context in (torch.no_grad(), torch.enable_grad(), torch.enable_grad(), torch.no_grad()):
            with context:
                doubled = make_once(lambda: count.append(1) or 2 * weight, [weight])
            if torch.is_grad_enabled() and doubled.requires_grad:
                doubled.sum().backward()
    assert len(count) == 3 and weight.grad.tolist() == [4, 4, 4]


@pytest.mark.parametrize('attention', ['assa', 'topk'])
def test_frozen_network_computes_the_same(attention):
    network, images = tiny_ast(attention=attention).eval(), torch.rand(2, 1, 3, 48, 72)

    def compute():
        outputs = []
        for is_lower in (False, True, False):  # with autocast and without, weights are cached separately
            with torch.autocast('cpu', torch.bfloat16, enabled=is_lower):
                outputs += [network(image) for image in images]
        return outputs

    with torch.inference_mode():
        plain = compute()
        with ops.frozen_weights():
            frozen = compute()
    assert all(torch.equal(a, b) for a, b in zip(plain, frozen, strict=True))


def test_network_prepares_weights_once(monkeypatch):
    from ast_plugin.ops.cpu.ffn import _FeedForwardBranch

    calls = []
    prepare = _FeedForwardBranch.prepare
    monkeypatch.setattr(_FeedForwardBranch, 'prepare', lambda self, op: calls.append(op) or prepare(self, op))
    network = tiny_ast().eval()
    with ops.use_backend('fused'), torch.inference_mode(), ops.frozen_weights():
        for side in (32, 64, 64):
            network(torch.rand(1, 3, side, side))
    assert len(calls) == 9  # a feed-forward network at each of the nine levels
