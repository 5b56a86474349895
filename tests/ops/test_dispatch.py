"""Selection of backends, and the reported reasons."""

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ast_plugin import ops
from ast_plugin.errors import BackendUnavailable, OptionError
from ast_plugin.ops import dispatch

from .op_cases import attention_case

X = torch.zeros(1, 4, 4, 8)


@pytest.fixture(autouse=True)
def _nothing_requested(monkeypatch):
    monkeypatch.delenv('AST_BACKEND', raising=False)
    dispatch._warn_once.cache_clear()


@pytest.mark.parametrize(
    ('x', 'reason'),
    [
        (X.half(), 'cannot run feed_forward: it supports float32, bfloat16, float64, not float16'),
        (X.to('meta'), 'the input is on meta'),
        (X[:0], r'the feature map \[0, 4, 4, 8\] is empty'),
        (X[0], r'expects a feature map \[B, H, W, C\], not \[4, 4, 8\]'),
        (FakeTensorMode().from_tensor(X), 'it expects plain tensors, not FakeTensor'),
    ],
)
def test_named_backend_reports_the_reason(x, reason):
    with ops.use_backend('fused'), pytest.raises(BackendUnavailable, match=reason):
        ops.explain(x)
    assert ops.explain(x).backend == 'reference'


def test_choice_as_text():
    assert str(ops.explain(X)) == 'fused (fastest available)'
    reason = 'it supports float32, bfloat16, float64, not float16'
    assert str(ops.explain(X.half())) == f'reference (fastest available; not fused: {reason})'


def test_tensors_of_several_types():
    op = ops.FeedForward(*[torch.zeros(8, 8, dtype=torch.float64)] * 4)
    with ops.use_backend('fused'), pytest.raises(BackendUnavailable, match='tensors are float32, float64'):
        ops.explain(X, op)
    with torch.autocast('cpu', torch.bfloat16):
        assert ops.explain(X, ops.FeedForward(*[torch.zeros(8, 8).bfloat16()] * 4)).backend == 'fused'
    with torch.autocast('cpu', torch.float16):
        assert ops.explain(X).backend == 'reference'


def test_environment_context_and_their_order(monkeypatch):
    monkeypatch.setenv('AST_BACKEND', 'reference')
    assert ops.explain(X).backend == 'reference'
    assert str(ops.explain(X)) == 'reference (requested by name)'
    with ops.use_backend('fused'):
        assert ops.explain(X).backend == 'fused'
        with ops.use_backend('auto'):
            assert ops.explain(X).requested == 'auto'
        with ops.use_backend(None):
            assert ops.explain(X).requested == 'fused'
    assert ops.explain(X).backend == 'reference'


def test_unknown_names(monkeypatch):
    with (
        pytest.raises(OptionError, match="backend is 'fussed': expected one of auto, fused, triton, reference"),
        ops.use_backend('fussed'),
    ):
        pass
    monkeypatch.setenv('AST_BACKEND', 'cuda')
    with pytest.raises(OptionError, match="variable AST_BACKEND is 'cuda'"):
        ops.explain(X)


def test_use_backend_stays_in_its_thread():
    with ops.use_backend('reference'), ThreadPoolExecutor(1) as other:
        assert other.submit(ops.explain, X).result().backend == 'fused'


def test_falling_back_is_logged_once(caplog):
    function, tensors = attention_case((4, 4), 2)
    with caplog.at_level(logging.WARNING, 'ast_plugin.ops.dispatch'):
        for _ in range(3):
            function(**{**tensors, 'x': tensors['x'][:0]})
    assert [record.getMessage() for record in caplog.records] == [
        "using backend 'reference' instead of 'fused': the feature map [0, 4, 4, 8] is empty"
    ]


def test_watched_calls_use_plain_operators():
    function, tensors = attention_case((4, 4), 2, batch=1)
    x = tensors.pop('x')

    def attend(x):
        return function(x, **tensors)

    want = attend(x)
    traced = torch.jit.trace(attend, (x,))
    torch.testing.assert_close(traced(x), want)
    assert 'aten::softmax' in str(traced.graph)
    _, directional = torch.func.jvp(attend, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = attend(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, directional)
    torch.testing.assert_close(torch.func.vmap(attend)(x[None])[0], want)


def test_masks_may_have_gradients():
    mask = torch.zeros(4, 4, 4, dtype=torch.float64, requires_grad=True)
    function, tensors = attention_case((4, 4), 2, mask=mask)
    function(**tensors).sum().backward()
    assert mask.grad.abs().sum() > 0
