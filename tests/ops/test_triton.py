"""Triton kernels against the reference in float64: outputs and gradients of every input; see conftest."""

import pytest
import torch
import torch.nn.functional as F

from ast_plugin import ops
from ast_plugin.ops import attention as plain_attention
from ast_plugin.ops import ffn as plain_ffn
from ast_plugin.ops import triton as triton_backend

from .conftest import load_kernels
from .op_cases import as_leaves, attention_case, check, draw, feed_forward_case, relative_error

attention, ffn, norm = load_kernels()


@pytest.fixture(autouse=True)
def _by_triton(place):
    with ops.use_backend('triton'):
        yield


def settings(heads, window, shift, kind):
    return ops.Attention(*[None] * 8, heads, window, shift, kind)


def masks(count, tokens):
    return (torch.rand(count, tokens, tokens) > 0.6) * -100.0 if count else None


def infinite_mask():
    mask = torch.zeros(2, 16, 16)
    mask[:, :8, 8:] = float('-inf')
    return mask


ATTENTIONS = {
    'several heads': lambda: attention_case((8, 4), 4, 2, dim=32),
    'padded tokens and channels': lambda: attention_case((3, 6), 3, 1, dim=10),
    'one window': lambda: attention_case((5, 5), 5, 3, heads=1, dim=20),
    'one token': lambda: attention_case((1, 2), 1, dim=32),
    'wide head': lambda: attention_case((8, 8), 8, heads=1, dim=64),
    'blocks of queries': lambda: attention_case((9, 18), 9, 4, heads=1, dim=16),
    # Masks per window of an image, and per window of the batch.
    'large windows, masks': lambda: attention_case((9, 18), 9, 4, heads=1, mask=masks(2, 81)),
    'large windows, masks of each image': lambda: attention_case((9, 18), 9, 4, heads=1, mask=masks(4, 81)),
    'infinite mask': lambda: attention_case((4, 8), 4, 2, dim=32, mask=infinite_mask()),
}


@pytest.mark.parametrize('programs', [2048, 2])
@pytest.mark.parametrize('name', ATTENTIONS)
def test_attention_by_shape(place, tolerances, monkeypatch, name, programs):
    monkeypatch.setattr(attention, '_PROGRAMS', programs)
    check('triton', ATTENTIONS[name](), torch.float32, tolerances[torch.float32], place)


@pytest.mark.parametrize('kind', ['assa', 'dense', 'sparse', 'sparse_relu'])
@pytest.mark.parametrize('count', [0, 2, 4])
def test_attention_by_kind_and_masks(place, tolerances, kind, count):
    case = attention_case((4, 8), 4, 1, kind, dim=32, mask=masks(count, 16))
    check('triton', case, torch.float32, tolerances[torch.float32], place)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(('kind', 'shift'), [('assa', 0), ('assa', 2), ('sparse_relu', 2), ('dense', 1)])
def test_attention_in_half_types(place, tolerances, dtype, kind, shift):
    case = attention_case((8, 4), 4, shift, kind, dim=32, residual=False)
    check('triton', case, dtype, tolerances[dtype], place)


@pytest.mark.parametrize('kind', ['frfn', 'leff', 'mlp'])
@pytest.mark.parametrize(
    ('size', 'hidden', 'dtype', 'bias', 'programs'),
    [
        ((1, 1), 8, torch.float32, True, 2048),
        ((5, 9), 12, torch.float32, True, 2),  # sums over many tiles
        ((4, 8), 80, torch.float32, False, 2048),
        ((5, 3), 16, torch.bfloat16, True, 2048),
        ((3, 9), 16, torch.float16, True, 2048),
    ],
)
def test_feed_forward_by_shape(place, tolerances, monkeypatch, kind, size, hidden, dtype, bias, programs):
    monkeypatch.setattr(ffn, '_PROGRAMS', programs)
    case = feed_forward_case(kind, size, hidden=hidden, bias=bias, residual=False)
    check('triton', case, dtype, tolerances[dtype], place)


@pytest.mark.parametrize(('channels', 'rows'), [(8, 3), (80, 5), (512, 9), (1, 4)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_norm_by_shape(place, tolerances, monkeypatch, channels, rows, dtype):
    """A program processes several blocks of rows, the last of which is incomplete."""
    monkeypatch.setattr(norm, '_PROGRAMS', 2)
    monkeypatch.setattr(norm, '_ELEMENTS', 1024)
    x, grad = 2 + torch.randn(2, rows, 11, channels), torch.randn(2, rows, 11, channels)
    weight, bias = torch.randn(channels), torch.randn(channels)
    leaves = [tensor.to(place, dtype).requires_grad_() for tensor in (x, weight, bias)]
    got = norm.layer_norm(leaves[0], [channels], *leaves[1:], 1e-5)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = F.layer_norm(wide[0], [channels], *wide[1:], 1e-5)
    gradients = torch.autograd.grad(got, leaves, grad.to(got)), torch.autograd.grad(want, wide, grad.to(dtype).to(want))
    assert relative_error(got, want) < tolerances[dtype]
    assert all(relative_error(*pair) < tolerances[dtype] for pair in zip(*gradients, strict=True) if channels > 1)


def test_last_group_has_fewer_windows(place, monkeypatch):
    """A program handles two of three windows; the memory behind them holds another image, which must not be read."""
    monkeypatch.setattr(attention, '_PROGRAMS', 2)
    op, bias = settings(1, 4, 0, 'dense'), draw(1, 16, 16).float().to(place).requires_grad_()
    qkv, grad = (torch.randn(2, 4, 12, channels).to(place) for channels in (24, 8))
    got, want = (
        torch.autograd.grad(module.attend(qkv[:1], bias, None, None, op), bias, grad[:1])[0]
        for module in (attention, plain_attention)
    )
    assert relative_error(got, want) < 2e-5


def test_weights_beyond_float16(place):
    """Squared scores reach 10⁶; their products with values of about 10⁻³ are in the range of float16."""
    op, bias = settings(1, 4, 0, 'sparse'), torch.zeros(1, 16, 16)
    parts = [factor * torch.randn(1, 4, 4, 16) for factor in (30, 10, 1e-3)]
    qkv = torch.cat(parts, -1).half()
    got = attention.attend(qkv.to(place), bias.to(place), None, None, op)
    assert (parts[0].flatten(0, 2) @ parts[1].flatten(0, 2).T / 4).max() > 256
    assert relative_error(got, plain_attention.attend(qkv.double(), bias.double(), None, None, op)) < 5e-3


@pytest.mark.parametrize('is_turned', [False, True])
@pytest.mark.parametrize('name', ['attend', 'activate'])
def test_kernels_take_maps_with_gaps(place, name, is_turned):
    """Gaps between positions, as in halves of a map, or between channels, as in permuted maps."""

    def gappy(channels):
        if is_turned:
            return torch.randn(1, channels, 4, 8).to(place).permute(0, 2, 3, 1)
        return torch.randn(1, 4, 8, channels + 7).to(place)[..., 3 : channels + 3]

    if name == 'attend':
        x, grad, modules = gappy(30), gappy(10), (attention, plain_attention)
        rest = torch.randn(1, 16, 16).to(place), None, None, settings(1, 4, 2, 'dense')
    else:
        x, grad, modules = gappy(40), gappy(20), (ffn, plain_ffn)
        rest = torch.randn(20, 1, 3, 3).to(place), None
    assert not x.is_contiguous() and not grad.is_contiguous()
    outputs = [getattr(module, name)(x.requires_grad_(), *rest) for module in modules]
    got, want = ((y, *torch.autograd.grad(y, x, grad)) for y in outputs)
    assert all(relative_error(*pair) < 2e-5 for pair in zip(got, want, strict=True))


def test_memory_saved_for_backward(place):
    """Saved per position: layer inputs, q, k, v and hidden channels; nothing per pair of tokens."""
    attend, first = attention_case((4, 8), 4, 2, dim=32, residual=False)
    refine, second = feed_forward_case('frfn', (4, 8), dim=32, residual=False)
    first, second = as_leaves(first, torch.float32, place), as_leaves(second, torch.float32, place)
    del second['x']
    own = {leaf.data_ptr() for leaf in (*first.values(), *second.values()) if leaf is not first['x']}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = refine(attend(**first), **second)
    positions, C, h = 2 * 4 * 8, 32, 12
    fixed = 3 * C * C + 2 * 16 * 16 + 2 * 16 * 16  # concatenated weights, position bias and its 64-bit indices
    assert sum(kept.values()) <= 4 * (positions * (4 * C + 3 * C + 3 * h) + fixed)
    assert y.requires_grad


@pytest.mark.parametrize('needs_grad', [False, True])
def test_check_passes_right_kernels(place, needs_grad):
    errors = {}
    for variant in (('assa', 4, 16, True), (False,)):
        errors |= triton_backend.kernel_errors(place, torch.float32, needs_grad, variant)
    assert len(errors) == (16 if needs_grad else 4)
    assert max(errors.values()) < triton_backend.TOLERANCES[torch.float32]


def test_check_finds_wrong_kernels(place, monkeypatch):
    variant = place, torch.float32, True, ('assa', 4, 16, False)
    right = attention._Launch.backward

    def wrong(self, grad):
        d_qkv, d_bias, d_gate = right(self, grad)
        return d_qkv, d_bias * 1.01, d_gate

    monkeypatch.setattr(attention._Launch, 'backward', wrong)
    reason = triton_backend.find_fault(*variant)
    assert f'differ from the reference on {place}: the gradient of the bias (shift 0) is off by 1e-02' in reason

    def fails(self):
        raise RuntimeError('no compiler\nand more')

    monkeypatch.setattr(attention._Launch, 'forward', fails)
    assert triton_backend.find_fault(*variant) == f'its kernels fail on {place} (RuntimeError: no compiler)'
