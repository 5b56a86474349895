"""How a backend is chosen, and what is said about it."""

import logging
import subprocess
import sys
import threading

import pytest
import torch

from ast_plugin import ops
from ast_plugin.archs.blocks import ASSA
from ast_plugin.errors import BackendUnavailable, OptionError
from ast_plugin.ops import backend, fused_cpu_kernels

X = torch.zeros(1, 4, 4, 8)


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch):
    monkeypatch.delenv('AST_BACKEND', raising=False)
    monkeypatch.setattr(backend, '_said', set())


def attend(x, **options):
    C = x.shape[-1]
    layer = lambda out: (torch.ones(out, C, dtype=x.dtype) / C, None)  # noqa: E731
    table = torch.zeros(9, 1, dtype=x.dtype)
    given = {'num_heads': 1, 'window': 2, 'gate': torch.zeros(2, dtype=x.dtype), **options}
    return ops.window_attention(x, layer(C), layer(2 * C), layer(C), table, **given)


def test_auto_takes_the_fastest_that_can():
    assert ops.explain(X).backend == 'fused'
    choice = ops.explain(X.half())
    assert choice.backend == 'reference'
    assert str(choice).startswith('reference (the fastest that can; not fused: it computes in float32')
    assert 'float16' in choice.rejected['fused']


@pytest.mark.parametrize(
    ('x', 'reason'),
    [
        (X.half(), 'float16'),
        (X.to('meta'), 'the map is on meta'),
        (X[:0], r'nothing to compute in \[0, 4, 4, 8\]'),
        (X[0], r'\[B, H, W, C\], not \[4, 4, 8\]'),
    ],
)
def test_a_backend_by_name_runs_or_says_what_is_missing(x, reason):
    with ops.use_backend('fused'), pytest.raises(BackendUnavailable, match=reason):
        ops.explain(x)
    assert ops.explain(x).backend == 'reference'


def test_tensors_of_several_types():
    with ops.use_backend('fused'), pytest.raises(BackendUnavailable, match='tensors are float32, float64'):
        ops.explain(X, X.double())
    with torch.autocast('cpu', torch.bfloat16):
        assert ops.explain(X, X.bfloat16()).backend == 'fused'
    with torch.autocast('cpu', torch.float16):
        assert ops.explain(X).backend == 'reference'


def test_environment_context_and_their_order(monkeypatch):
    monkeypatch.setenv('AST_BACKEND', 'reference')
    assert ops.explain(X).backend == 'reference'
    assert str(ops.explain(X)) == 'reference (asked for by name)'
    with ops.use_backend('fused'):
        assert ops.explain(X).backend == 'fused'
        with ops.use_backend('auto'):
            assert ops.explain(X).asked == 'auto'
        with ops.use_backend(None):
            assert ops.explain(X).asked == 'fused'
    assert ops.explain(X).backend == 'reference'


def test_names_that_are_not_known(monkeypatch):
    with (
        pytest.raises(OptionError, match="backend is 'fussed': expected one of auto, fused, triton, reference"),
        ops.use_backend('fussed'),
    ):
        pass
    monkeypatch.setenv('AST_BACKEND', 'cuda')
    with pytest.raises(OptionError, match="variable AST_BACKEND is 'cuda'"):
        ops.explain(X)


def test_the_command_says_what_is_wrong_with_the_environment(tmp_path):
    from PIL import Image

    from ast_plugin.archs.ast_arch import AST_XS

    Image.new('RGB', (8, 8)).save(tmp_path / 'picture.png')
    torch.save(AST_XS(embed_dim=4, num_heads=[1] * 9).state_dict(), tmp_path / 'weights.pth')
    words = ['infer', '-i', 'picture.png', '-o', 'restored', '--weights', 'weights.pth']
    result = subprocess.run(
        [sys.executable, '-m', 'ast_plugin', *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={'PATH': '/usr/bin:/bin', 'AST_BACKEND': 'no such', 'OMP_NUM_THREADS': '1'},
    )
    assert result.returncode == 2
    assert "basicsr: error: the environment variable AST_BACKEND is 'no such': expected one of auto" in result.stderr
    assert 'Traceback' not in result.stderr


def test_what_is_asked_for_stays_in_its_thread():
    seen = {}
    inside, over = threading.Event(), threading.Event()

    def other():
        with ops.use_backend('reference'):
            inside.set()
            over.wait(10)
            seen['other'] = ops.explain(X).backend

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    seen['here'] = ops.explain(X).backend
    over.set()
    thread.join()
    assert seen == {'other': 'reference', 'here': 'fused'}


def test_an_export_by_name_says_what_is_missing():
    with ops.use_backend('fused'), pytest.raises(BackendUnavailable, match='it is given a FakeTensor, no plain tensor'):
        torch.export.export(ASSA(4, 1, window_size=2), (torch.rand(1, 4, 4, 4),), strict=False)


def test_falling_back_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, 'ast_plugin.ops.backend'):
        for _ in range(3):
            attend(X[:0])
    assert [record.getMessage() for record in caplog.records] == [
        "computing by the backend 'reference' and not by 'fused': there is nothing to compute in [0, 4, 4, 8]"
    ]


def test_callers_that_follow_single_operators():
    x = torch.rand(1, 4, 4, 8, dtype=torch.float64)
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
    mask = torch.zeros(4, 4, 4, dtype=torch.float64, requires_grad=True)
    attend(x, mask=mask).sum().backward()
    assert mask.grad.abs().sum() > 0


def test_operators_that_compute_something_else_are_not_used(monkeypatch):
    fused_cpu_kernels.has_onednn.cache_clear()
    try:
        for fault in (lambda x, *rest: x.new_zeros(*x.shape[:-1], 8), lambda *rest: (_ for _ in ()).throw(TypeError())):
            with monkeypatch.context() as patch:
                patch.setattr(fused_cpu_kernels, '_onednn_linear', fault)
                assert not fused_cpu_kernels.has_onednn(torch.float32)
            fused_cpu_kernels.has_onednn.cache_clear()
    finally:
        fused_cpu_kernels.has_onednn.cache_clear()
    assert not fused_cpu_kernels.has_onednn(torch.float64)


def test_strips_cover_a_map_once(monkeypatch):
    for limit in (1, 100, 10**6):
        monkeypatch.setattr(fused_cpu_kernels, 'STRIP_BYTES', limit)
        for B, H, unit in ((1, 1, 1), (3, 7, 1), (2, 24, 8), (2, 40, 5)):
            covered = torch.zeros(B, H, 1, 1)
            for strip in fused_cpu_kernels.strips(B, H, 10, unit):
                strip.of(covered).add_(1)
                assert strip.first % unit == strip.last % unit == 0
                assert strip.num_images == 1 or strip.last - strip.first == H
            assert (covered == 1).all()
