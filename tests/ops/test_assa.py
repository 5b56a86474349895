"""Window attention against a second writing of the equations, loop by loop, in float64."""

import itertools
import math

import pytest
import torch

from ast_plugin import ops
from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops.windows import MASKED

SHAPES = [((8, 8), 4, 0), ((4, 12), 4, 2), ((10, 5), 5, 2), ((3, 3), 3, 0), ((2, 4), 1, 0)]


@pytest.fixture(autouse=True, params=['reference', 'auto'])
def _backend(request):
    """The equations hold for the plain reference, and for whatever is faster."""
    with ops.use_backend(request.param):
        yield


def attention_inputs(size, window, heads=2, dim=6, batch=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        'x': draw(batch, *size, dim),
        'q': (draw(dim, dim), draw(dim)),
        'kv': (draw(2 * dim, dim), draw(2 * dim)),
        'proj': (draw(dim, dim), draw(dim)),
        'position_bias': draw((2 * window - 1) ** 2, heads),
        'gate': draw(2),
    }


def slow_attention(x, q, kv, proj, position_bias, gate, *, window, shift, kind, mask, topk_ratio=0.5):
    """Each query against each token that shares its window: the definition, with nothing vectorised over windows."""
    B, H, W, C = x.shape
    heads = position_bias.shape[1]
    d = C // heads
    queries = x @ q[0].T + q[1]
    keys, values = (x @ kv[0].T + kv[1]).chunk(2, dim=-1)
    out = torch.zeros_like(x)
    for b, y, z, h in itertools.product(range(B), range(H), range(W), range(heads)):
        part = slice(h * d, (h + 1) * d)
        # coordinates in the rolled map; the token at rolled (i, j) lies at ((i + shift) % H, (j + shift) % W)
        i, j = (y - shift) % H, (z - shift) % W
        top, left = i - i % window, j - j % window
        scores, seen = [], []
        for k, m in itertools.product(range(top, top + window), range(left, left + window)):
            v, u = (k + shift) % H, (m + shift) % W
            row = (i - k + window - 1) * (2 * window - 1) + (j - m + window - 1)
            score = queries[b, y, z, part] @ keys[b, v, u, part] / math.sqrt(d) + position_bias[row, h]
            if ((i + shift) // H, (j + shift) // W) != ((k + shift) // H, (m + shift) // W):  # one came over the edge
                score = score + MASKED
            if mask is not None:
                # the official mask is cut as it lies, also where the map was rolled
                score = score + (MASKED if mask[0, 0, i, j] and mask[0, 0, k, m] else 0.0)
            scores.append(score)
            seen.append(values[b, v, u, part])
        scores, seen = torch.stack(scores), torch.stack(seen)
        dense = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
        sparse = scores.clamp(min=0) ** 2
        share = torch.exp(gate) / torch.exp(gate).sum()
        if kind == 'topk':
            keep = max(1, round(topk_ratio * len(scores)))
            kept = scores >= scores.sort(descending=True).values[keep - 1]
            dense = torch.exp(scores - scores.max()) * kept
            dense = dense / dense.sum()
        others = {'assa': share[0] * dense + share[1] * sparse, 'sparse': sparse, 'sparse_relu': scores.clamp(min=0)}
        weights = others.get(kind, dense)
        out[b, y, z, part] = weights @ seen
    return out @ proj[0].T + proj[1]


@pytest.mark.parametrize('kind', ops.ATTENTION_KINDS)
@pytest.mark.parametrize(('size', 'window', 'shift'), SHAPES)
@pytest.mark.parametrize('masked', [False, True])
def test_outputs_and_gradients_follow_the_definition(kind, size, window, shift, masked):
    inputs = attention_inputs(size, window)
    mask = None
    if masked:
        mask = torch.zeros(1, 1, *size)
        mask[..., size[1] // 2 :] = 1
    heads = inputs['position_bias'].shape[1]
    pairs = None if mask is None else ops.pair_mask(mask, size, window)
    fast = ops.window_attention(**inputs, num_heads=heads, window=window, shift=shift, kind=kind, mask=pairs)
    slow = slow_attention(**inputs, window=window, shift=shift, kind=kind, mask=mask)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
    leaves = [leaf for value in inputs.values() for leaf in (value if isinstance(value, tuple) else (value,))]
    target = torch.randn_like(slow)
    for ours, theirs in zip(
        torch.autograd.grad((fast * target).sum(), leaves, allow_unused=True),
        torch.autograd.grad((slow * target).sum(), leaves, allow_unused=True),
        strict=True,
    ):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


def test_gradcheck():
    inputs = attention_inputs((2, 4), 2, heads=1, dim=2, batch=1)

    def attend(x, position_bias, gate):
        rest = {**inputs, 'x': x, 'position_bias': position_bias, 'gate': gate}
        return ops.window_attention(**rest, num_heads=1, window=2, shift=1)

    assert torch.autograd.gradcheck(attend, (inputs['x'], inputs['position_bias'], inputs['gate']))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precisions_stay_near_float64(dtype, tolerances):
    exact = attention_inputs((8, 8), 4)
    want = ops.window_attention(**exact, num_heads=2, window=4, shift=2)
    lower = attention_inputs((8, 8), 4, dtype=dtype)
    got = ops.window_attention(**lower, num_heads=2, window=4, shift=2)
    assert got.dtype == dtype
    error = (got.double() - want).norm() / want.norm()
    assert error < tolerances[dtype]


def test_the_sparse_branch_survives_float16_under_autocast():
    inputs = attention_inputs((4, 4), 4, dtype=torch.float32)
    inputs = {k: v if isinstance(v, tuple) else v.detach() for k, v in inputs.items()}
    large = {**inputs, 'x': inputs['x'] * 30}
    # scores in the thousands: their squares leave float16, whose largest number is 65504
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = ops.window_attention(**large, num_heads=2, window=4, kind='sparse')
    assert torch.isfinite(out).all()
    scores = torch.full((1, 1), 300.0, dtype=torch.float32)
    assert ops.attention_weights(scores, 'sparse').item() == 90000.0


def test_dense_rows_sum_to_one_and_the_gate_blends():
    scores = torch.randn(3, 5, dtype=torch.float64)
    dense, sparse = ops.attention_weights(scores, 'dense'), ops.attention_weights(scores, 'sparse')
    torch.testing.assert_close(dense.sum(-1), torch.ones(3, dtype=torch.float64))
    gate = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(ops.attention_weights(scores, 'assa', gate), 0.25 * dense + 0.75 * sparse)
    kept = ops.attention_weights(scores, 'topk', topk_ratio=0.4)
    assert ((kept > 0).sum(-1) == 2).all()


def test_mistakes_are_named():
    with pytest.raises(OptionError, match=r'swin.*assa'):
        ops.attention_weights(torch.zeros(1, 1), 'swin')
    inputs = attention_inputs((4, 4), 4)
    with pytest.raises(ShapeError, match=r'6 channels.*4 heads'):
        ops.window_attention(**inputs, num_heads=4, window=4)
    with pytest.raises(ShapeError, match='4x4'):
        ops.window_attention(**inputs, num_heads=2, window=3)
