"""Window attention against an independent float64 implementation over all pairs of tokens."""

import math

import pytest
import torch

from ast_plugin import ops
from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops.windows import MASKED

from .op_cases import attention_case, check_definition

SHAPES = [((8, 8), 4, 0), ((4, 12), 4, 2), ((10, 5), 5, 2), ((3, 3), 3, 0), ((2, 4), 1, 0)]
pytestmark = pytest.mark.usefixtures('_backend')


def defined_attention(t, heads, window, shift, kind, image_mask=None, topk_ratio=0.5):
    """Window attention computed over all pairs of tokens, with those in different windows masked."""
    B, H, W, C = t['x'].shape
    y, z = (part.flatten() for part in torch.meshgrid(torch.arange(H), torch.arange(W), indexing='ij'))
    i, j = (y - shift) % H, (z - shift) % W  # position of a token in the rolled map

    def differ(*keys):
        return sum((key[:, None] != key[None, :]).int() for key in keys) > 0

    def by_head(rows):
        return rows.reshape(B, H * W, heads, C // heads).transpose(1, 2)

    keys, values = map(by_head, (t['x'] @ t['kv'].T + t['kv_bias']).chunk(2, dim=-1))
    scores = by_head(t['x'] @ t['q'].T + t['q_bias']) @ keys.transpose(-2, -1) / math.sqrt(C // heads)
    apart = differ(i // window, j // window)
    offsets = (i[:, None] - i + window - 1) * (2 * window - 1) + (j[:, None] - j + window - 1)
    scores = scores + t['position_bias'][offsets.masked_fill(apart, 0)].permute(2, 0, 1)
    scores = scores + MASKED * differ((i + shift) // H, (j + shift) // W)  # one of the two wrapped around an edge
    if image_mask is not None:
        marked = image_mask[0, 0, i, j]  # the official mask is partitioned without the shift
        scores = scores + MASKED * marked[:, None] * marked
    exponentials = torch.exp(scores - scores.amax(-1, keepdim=True)) * ~apart
    if kind == 'topk':
        keep = max(1, round(topk_ratio * window**2))
        ordered = scores.masked_fill(apart, -math.inf).sort(descending=True).values
        exponentials = exponentials * (scores >= ordered[..., keep - 1 : keep])
    dense = exponentials / exponentials.sum(-1, keepdim=True)
    positive = scores.clamp(min=0) * ~apart
    weights = {'sparse': positive**2, 'sparse_relu': positive}.get(kind, dense)
    if kind == 'assa':
        shares = torch.exp(t['gate']) / torch.exp(t['gate']).sum()
        weights = shares[0] * dense + shares[1] * positive**2
    return (weights @ values).transpose(1, 2).reshape(B, H, W, C) @ t['proj'].T + t['proj_bias']


@pytest.mark.parametrize('kind', ops.ATTENTION_KINDS)
@pytest.mark.parametrize(('size', 'window', 'shift'), SHAPES)
@pytest.mark.parametrize('is_masked', [False, True])
def test_attention_follows_definition(kind, size, window, shift, is_masked):
    image_mask = (torch.arange(size[1]) >= size[1] // 2).double().expand(1, 1, *size) if is_masked else None
    mask = ops.pair_mask(image_mask, size, window) if is_masked else None
    case = attention_case(size, window, shift, kind, dim=6, residual=False, mask=mask)
    check_definition(case, lambda tensors: defined_attention(tensors, 2, window, shift, kind, image_mask))


def test_sparse_branch_is_finite_in_autocast():
    function, tensors = attention_case((4, 4), 4, kind='sparse', residual=False)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    # scores in the thousands: their squares exceed float16's largest number, 65504
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.isfinite(function(**{**single, 'x': 30 * single['x']})).all()


def test_attention_weights_of_a_kind():
    scores = torch.randn(3, 5)
    assert ((ops.attention_weights(scores, 'topk', topk_ratio=0.4) > 0).sum(-1) == 2).all()
    with pytest.raises(OptionError, match=r'swin.*assa'):
        ops.attention_weights(scores, 'swin')


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        ({'heads': 3}, '8 channels are not divisible by 3 heads'),
        ({'size': (7, 8)}, '7x8 feature map is not divisible into windows of 4x4'),
        ({'size': (0, 8)}, '0x8 feature map'),
        ({'shift': -1}, r'shift in \[0, 4\), the window size, got -1'),
        ({'shift': 4}, r'shift in \[0, 4\), the window size, got 4'),
        ({'mask': torch.zeros(3, 16, 16)}, r'mask: expected shape \[4, 16, 16\], got \[3, 16, 16\]'),
        ({'mask': torch.zeros(8, 1, 16)}, r'mask: expected shape \[8, 16, 16\], got \[8, 1, 16\]'),
        ({'position_bias': torch.zeros(49, 3)}, r'position_bias: expected shape \[49, 2\], got \[49, 3\]'),
        ({'gate': torch.zeros(1)}, r'gate: expected shape \[2\], got \[1\]'),
        ({'gate': None}, r'gate: expected shape \[2\], got None'),
        ({'q_bias': torch.zeros(16)}, r'q_bias: expected shape \[8\], got \[16\]'),
        ({'x': torch.zeros(8, 8, 8)}, r'expected a feature map \[B, H, W, C\], got \[8, 8, 8\]'),
        ({'x': torch.zeros(1, 8, 8, 12)}, r'^q: expected shape \[12, 12\], got \[8, 8\]'),
    ],
)
def test_attention_names_wrong_sizes(changed, message):
    given = {'x', 'position_bias', 'gate', 'q_bias'} & set(changed)
    options = {'size': (8, 8), 'window': 4, **{name: changed[name] for name in set(changed) - given}}
    function, tensors = attention_case(**options)
    with pytest.raises(ShapeError, match=message):
        function(**{**tensors, **{name: None if changed[name] is None else changed[name].double() for name in given}})
