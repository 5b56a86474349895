"""Triton's kernels against the plain reference in float64: outputs and gradients of every input.

On a machine with CUDA they run there, elsewhere in Triton's interpreter on the CPU:

    pip install triton==3.7.1 && python -m pytest tests/ops/test_triton.py
"""

import importlib.util
from importlib.metadata import version

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ast_plugin import ops
from ast_plugin.errors import BackendUnavailable, ShapeError
from ast_plugin.ops import assa, triton_assa, triton_check, triton_frfn
from ast_plugin.ops.frfn import frfn as plain_frfn
from ast_plugin.ops.frfn import leff as plain_leff
from ast_plugin.ops.frfn import mlp as plain_mlp

if importlib.util.find_spec('triton') is None:
    pytest.skip('needs Triton: pip install "ast_plugin[triton]"', allow_module_level=True)
INTERPRETED = not torch.cuda.is_available()
if INTERPRETED and tuple(map(int, version('triton').split('.')[:2])) < (3, 7):
    pytest.skip("older interpreters do not go with today's NumPy: pip install triton==3.7.1", allow_module_level=True)
if INTERPRETED:
    # Triton reads it when a kernel is defined, which is when it is imported.
    with pytest.MonkeyPatch.context() as _patch:
        _patch.setenv('TRITON_INTERPRET', '1')
        from ast_plugin.ops import triton_assa_kernels, triton_frfn_kernels

HALVES = [torch.bfloat16, torch.float16]
ATTENDS = triton_assa.attend, triton_assa.plain_attend
ACTIVATES = triton_frfn.activate, triton_frfn.plain_activate
SPREAD = torch.float64  # what references are computed in


@pytest.fixture(autouse=True)
def place(monkeypatch, device):
    """The device of the test; everything asked for is computed by Triton."""
    if INTERPRETED:
        monkeypatch.setenv('TRITON_INTERPRET', '1')
        device = torch.device('cpu')
    elif device.type != 'cuda':
        device = torch.device('cuda')
    # TF32, which convolutions take by default, is none of the precisions that are compared here.
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    with ops.use_backend('triton'):
        yield device


def draw(*shape):
    return torch.randn(shape, dtype=SPREAD)


def attention_inputs(size, window, heads=2, dim=32, batch=2):
    return {
        'x': draw(batch, *size, dim),
        'q': (draw(dim, dim) / dim**0.5, draw(dim)),
        'kv': (draw(2 * dim, dim) / dim**0.5, draw(2 * dim)),
        'proj': (draw(dim, dim) / dim**0.5, draw(dim)),
        'position_bias': draw((2 * window - 1) ** 2, heads),
        'gate': draw(2),
    }


def cast(value, dtype, device):
    """As leaves of another dtype and device; None and constants stay as they are."""
    if isinstance(value, tuple):
        return tuple(cast(part, dtype, device) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(device, dtype).requires_grad_()


def leaves_of(inputs):
    parts = [part for value in inputs.values() for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in parts if isinstance(part, torch.Tensor) and part.requires_grad]


def compare(function, reference, inputs, dtype, place, near):
    """Output and gradients of a function in a dtype against a reference in float64 of the same rounded numbers."""
    lower = {name: cast(value, dtype, place) for name, value in inputs.items()}
    exact = {name: cast(value, SPREAD, 'cpu') for name, value in lower.items()}
    got, want = function(**lower), reference(**exact)
    assert got.dtype == dtype and got.shape == want.shape
    target = draw(*want.shape).to(dtype)
    results = []
    for out, leaves in ((got, leaves_of(lower)), (want, leaves_of(exact))):
        grads = torch.autograd.grad(out, leaves, target.to(out), allow_unused=True)
        results.append([out, *grads])
    for index, (ours, theirs) in enumerate(zip(*results, strict=True)):
        assert (ours is None or not ours.any()) if theirs is None else True
        if theirs is not None:
            error = (ours.to('cpu', SPREAD) - theirs).norm() / theirs.norm()
            assert error < near, f'{"output" if index == 0 else f"gradient {index}"}: {error:.1e}'


def check_attention(place, near, size, window, shift, kind='assa', mask=None, dtype=torch.float32, **options):
    inputs = attention_inputs(size, window, **options)
    given = {'num_heads': inputs['position_bias'].shape[1], 'window': window, 'shift': shift, 'kind': kind}
    compare(
        lambda **tensors: ops.window_attention(**tensors, **given, mask=None if mask is None else mask.to(place)),
        lambda **tensors: assa.window_attention(**tensors, **given, mask=mask),
        inputs,
        dtype,
        place,
        near,
    )


@pytest.mark.parametrize('programs', [2048, 2])
@pytest.mark.parametrize(
    ('size', 'window', 'shift', 'options'),
    [
        ((8, 4), 4, 2, {}),
        ((3, 6), 3, 1, {'dim': 10}),
        ((5, 5), 5, 3, {'heads': 1, 'dim': 20}),
        ((1, 2), 1, 0, {}),
        ((8, 8), 8, 0, {'heads': 1, 'dim': 64}),
        ((9, 18), 9, 4, {'heads': 1, 'dim': 16}),
    ],
)
def test_shapes_and_shifts(place, tolerances, monkeypatch, size, window, shift, options, programs):
    monkeypatch.setattr(triton_assa, '_PROGRAMS', programs)
    check_attention(place, tolerances[torch.float32], size, window, shift, **options)


def test_the_last_group_has_fewer_windows(place, monkeypatch):
    """Of three windows a program takes two; behind them in memory lies another picture, which is not to be read."""
    monkeypatch.setattr(triton_assa, '_PROGRAMS', 2)
    settings, qkv, grad = triton_assa.Settings(1, 4, 0, 'dense'), draw(2, 4, 12, 24), draw(2, 4, 12, 8)
    qkv, grad, bias = qkv.float().to(place), grad.float().to(place), draw(1, 16, 16).float().to(place).requires_grad_()
    got, want = (
        torch.autograd.grad(attend(settings, qkv[:1], bias, None, None), bias, grad[:1])[0] for attend in ATTENDS
    )
    near(got, want)


@pytest.mark.parametrize('kind', ['assa', 'dense', 'sparse', 'sparse_relu'])
@pytest.mark.parametrize('masks', [0, 2, 4])
def test_kinds_and_masks(place, tolerances, kind, masks):
    """Masks for every window of a picture, and for every window of the batch."""
    mask = (torch.rand(masks, 16, 16) > 0.6) * -100.0 if masks else None
    check_attention(place, tolerances[torch.float32], (4, 8), 4, 1, kind, mask)


@pytest.mark.parametrize('masks', [2, 4])
def test_large_windows_with_masks(place, tolerances, masks):
    mask = (torch.rand(masks, 81, 81) > 0.6) * -100.0
    check_attention(place, tolerances[torch.float32], (9, 18), 9, 4, mask=mask, heads=1, dim=8)


def test_masks_of_minus_infinity(place, tolerances):
    mask = torch.zeros(2, 16, 16)
    mask[:, :8, 8:] = float('-inf')
    check_attention(place, tolerances[torch.float32], (4, 8), 4, 2, mask=mask)


@pytest.mark.parametrize('dtype', HALVES)
@pytest.mark.parametrize(('kind', 'shift'), [('assa', 0), ('assa', 2), ('sparse_relu', 2), ('dense', 1)])
def test_half_types(place, tolerances, dtype, kind, shift):
    check_attention(place, tolerances[dtype], (8, 4), 4, shift, kind, dtype=dtype)


def test_weights_beyond_float16(place):
    """Squares of scores reach 10⁶; the sums, over values of about 10⁻³, have their place in float16."""
    settings = triton_assa.Settings(1, 4, 0, 'sparse')
    qkv = torch.cat([30 * draw(1, 4, 4, 16), 10 * draw(1, 4, 4, 16), 1e-3 * draw(1, 4, 4, 16)], -1).half()
    bias = torch.zeros(1, 16, 16, device=place)
    got = triton_assa.attend(settings, qkv.to(place), bias, None, None)
    want = triton_assa.plain_attend(settings, qkv.double(), bias.double().cpu(), None, None)
    assert (qkv[..., :16].double().flatten(0, 2) @ qkv[..., 16:32].double().flatten(0, 2).T / 4).max() > 256
    assert (got.cpu().double() - want).norm() < 5e-3 * want.norm()


@pytest.mark.parametrize('function', ['frfn', 'leff'])
@pytest.mark.parametrize(
    ('size', 'hidden', 'dtype', 'has_bias'),
    [
        ((1, 1), 8, torch.float32, True),
        ((5, 9), 12, torch.float32, True),
        ((4, 8), 80, torch.float32, False),
        ((5, 3), 16, torch.bfloat16, True),
        ((3, 9), 16, torch.float16, True),
    ],
)
def test_feed_forward_networks(place, tolerances, function, size, hidden, dtype, has_bias):
    C = 8
    bias = lambda number: draw(number) if has_bias else None  # noqa: E731
    wide = hidden if function == 'leff' else 2 * hidden
    inputs = {'x': draw(2, *size, C)}
    if function == 'frfn':
        inputs['partial_conv'] = draw(C // 4, C // 4, 3, 3) / 4
    inputs['expand'] = draw(wide, C) / C**0.5, bias(wide)
    inputs['depthwise'] = draw(hidden, 1, 3, 3) / 3, bias(hidden)
    inputs['project'] = draw(C, hidden) / hidden**0.5, bias(C)
    reference = {'frfn': plain_frfn, 'leff': plain_leff}[function]
    compare(getattr(ops, function), reference, inputs, dtype, place, tolerances[dtype])


def test_sums_over_many_tiles(place, tolerances, monkeypatch):
    monkeypatch.setattr(triton_frfn, '_PROGRAMS', 2)
    tensors = {'z': draw(2, 9, 10, 20), 'weight': draw(10, 1, 3, 3), 'bias': draw(10)}
    compare(triton_frfn.activate, triton_frfn.plain_activate, tensors, torch.float32, place, tolerances[torch.float32])


def test_mlp_is_left_to_pytorch(place):
    x, layers = draw(2, 4, 4, 8).to(place), [(draw(8, 8).to(place), draw(8).to(place))] * 2
    assert torch.equal(ops.mlp(x.float(), *layers_of(layers)), plain_mlp(x.float(), *layers_of(layers)))


def layers_of(layers):
    return [tuple(part.float() for part in layer) for layer in layers]


def small_block(place, dtype=torch.float32, batch=2):
    """A call of each function on a map of 4×8, and its parameters in float32."""
    attention = {name: cast(value, torch.float32, place) for name, value in attention_inputs((4, 8), 4).items()}
    layers = [cast(pair, torch.float32, place) for pair in ((draw(24, 32), draw(24)), (draw(12, 1, 3, 3), draw(12)))]
    layers += [cast((draw(32, 12), draw(32)), torch.float32, place)]
    partial = cast(draw(8, 8, 3, 3), torch.float32, place)
    x = attention.pop('x')[:batch].to(dtype).detach().requires_grad_()

    def half(x):
        y = ops.window_attention(x, **attention, num_heads=2, window=4, shift=2)
        return ops.frfn(y, partial, *layers)

    parameters = [*leaves_of(attention), partial, *(part for layer in layers for part in layer)]
    return half, x, parameters


def by_reference(function, *args):
    with ops.use_backend('reference'):
        return function(*args)


def near(got, want, limit=2e-5):
    assert (got.double() - want.double()).norm() <= limit * want.double().norm()


def test_inputs_and_gradients_with_gaps(place):
    half, x, parameters = small_block(place)
    turned = x.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1).requires_grad_()
    assert not turned.is_contiguous()
    y, want = half(turned), by_reference(half, x)
    near(y, want)
    # the sum's gradient is one number, spread without strides
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), [turned, *parameters]),
        torch.autograd.grad(want.sum(), [x, *parameters]),
        strict=True,
    ):
        near(ours, theirs, 1e-4)


@pytest.mark.parametrize('turned', [False, True])
def test_maps_of_kernels_may_have_gaps(place, turned):
    """Between positions, as halves of a map have them, or between channels, as turned maps have them."""

    def gappy(channels):
        if turned:
            return draw(1, channels, 4, 8).float().to(place).permute(0, 2, 3, 1)
        return draw(1, 4, 8, channels + 7).float().to(place)[..., 3 : channels + 3]

    settings, bias = triton_assa.Settings(1, 4, 2, 'dense'), draw(1, 16, 16).float().to(place)
    weight = draw(20, 1, 3, 3).float().to(place)
    cases = [
        (gappy(30), gappy(10), [lambda x, f=f: f(settings, x, bias, None, None) for f in ATTENDS]),
        (gappy(40), gappy(20), [lambda x, f=f: f(x, weight, None) for f in ACTIVATES]),
    ]
    for x, grad, functions in cases:
        assert not x.is_contiguous() and not grad.is_contiguous()
        x.requires_grad_()
        got, want = ((y, *torch.autograd.grad(y, x, grad)) for y in (function(x) for function in functions))
        for ours, theirs in zip(got, want, strict=True):
            near(ours, theirs)


def test_no_pictures(place):
    half, x, parameters = small_block(place)
    y = half(x.new_zeros(0, 4, 8, 32, requires_grad=True))
    assert y.shape == (0, 4, 8, 32)
    assert not any(grad.any() for grad in torch.autograd.grad(y.sum(), parameters))
    for size in ((2, 0, 8), (2, 4, 0)):
        with pytest.raises(BackendUnavailable, match='there is nothing to compute'):
            half(x.new_zeros(*size, 32))


def test_callers_without_gradients_and_in_autocast(place):
    half, x, _ = small_block(place)
    want = by_reference(half, x)
    with torch.inference_mode():
        near(half(x), want)
    with torch.autocast(place.type, torch.bfloat16):
        y = half(x)
        assert y.dtype == torch.bfloat16
        near(y, by_reference(half, x), 3e-2)
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()


def test_checkpointed_and_compiled_callers(place):
    half, x, _ = small_block(place)
    want = torch.autograd.grad(half(x).square().sum(), x)[0]
    near(torch.autograd.grad(checkpoint(half, x, use_reentrant=False).square().sum(), x)[0], want, 1e-6)
    compiled = torch.compile(half, backend='eager')
    near(torch.autograd.grad(compiled(x).square().sum(), x)[0], want, 1e-6)


def test_gradients_of_gradients(place):
    half, x, _ = small_block(place, batch=1)

    def twice():
        gradient = torch.autograd.grad(half(x).square().sum(), x, create_graph=True)[0]
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    near(twice(), by_reference(twice), 1e-4)


def test_the_same_bits_again(place, monkeypatch):
    monkeypatch.setattr(triton_assa, '_PROGRAMS', 4)
    half, x, parameters = small_block(place)
    first, second = (torch.autograd.grad(half(x).square().sum(), [x, *parameters]) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_what_is_kept_for_the_backward_pass(place):
    """Per position: what layers take, q, k and v, and the hidden channels; nothing per pair of tokens."""
    half, x, parameters = small_block(place)
    own = {part.data_ptr() for part in parameters}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = half(x)
    positions, C, h = 2 * 4 * 8, 32, 12
    fixed = 3 * C * C + 2 * 16 * 16 + 2 * 16 * 16  # joined weights, position bias and its 64-bit indices
    assert sum(kept.values()) <= 4 * (positions * (4 * C + 3 * C + 3 * h) + fixed)
    assert y.requires_grad


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        ({'position_bias': (49, 3)}, r'bias is \[3, 16, 16\]: expected \[2, 16, 16\]'),
        ({'mask': (3, 16, 16)}, r'mask is \[3, 16, 16\]: expected \[2 or 4, 16, 16\]'),
        ({'x': (2, 4, 6, 32)}, '4x6 map does not divide into windows of 4x4'),
        ({'x': (2, 4, 8, 33)}, '33 channels do not divide into 2 heads'),
    ],
)
def test_sizes_that_do_not_go_together(place, changed, message):
    tensors = {name: cast(value, torch.float32, place) for name, value in attention_inputs((4, 8), 4).items()}
    tensors |= {name: draw(*shape).float().to(place) for name, shape in changed.items()}
    with pytest.raises(ShapeError, match=message):
        ops.window_attention(**tensors, num_heads=2, window=4)


def test_hidden_channels_that_do_not_go_together(place):
    z, weight = draw(1, 2, 2, 9).float().to(place), draw(4, 1, 3, 3).float().to(place)
    with pytest.raises(ShapeError, match=r'are \[1, 2, 2, 9\], \[4, 1, 3, 3\]: expected'):
        triton_frfn.activate(z, weight, None)


@pytest.mark.parametrize('needs_grad', [False, True])
def test_the_check_passes_where_kernels_are_right(place, needs_grad):
    errors = triton_check.attention_errors(place, torch.float32, needs_grad, 'assa', 4, 16, True)
    errors |= triton_check.activation_errors(place, torch.float32, needs_grad, 'leff')
    assert len(errors) == (12 if needs_grad else 3)
    assert max(errors.values()) < triton_check.NEAR[torch.float32]


def test_the_check_finds_what_is_wrong(place, monkeypatch):
    variant = (place, torch.float32, True, ('assa', 4, 16, False))
    right = triton_assa._Launch.backward

    def wrong(self, grad):
        d_qkv, d_bias, d_gate = right(self, grad)
        return d_qkv, d_bias * 1.01, d_gate

    monkeypatch.setattr(triton_assa._Launch, 'backward', wrong)
    reason = triton_check._fault('window_attention', *variant)
    assert "what the reference does: the bias's gradient (shift 0) is off by 1e-02" in reason

    def fails(self):
        raise RuntimeError('no compiler\nand more')

    monkeypatch.setattr(triton_assa._Launch, 'forward', fails)
    reason = triton_check._fault('window_attention', *variant)
    assert reason == f'its kernels fail on {place} (RuntimeError: no compiler)'


@pytest.mark.skipif(not INTERPRETED, reason='changes a kernel, which the interpreter reads again')
@pytest.mark.parametrize(('kernels', 'name', 'value'), [(0, '_MASKED', 0.0), (0, '_softmax', None), (1, '_gelu', None)])
def test_these_tests_would_see_a_wrong_kernel(place, tolerances, monkeypatch, kernels, name, value):
    module = (triton_assa_kernels, triton_frfn_kernels)[kernels]
    monkeypatch.setattr(module, name, value if value is not None else lambda x: x)
    with pytest.raises(AssertionError, match=r'output|gradient'):
        if kernels == 0:
            check_attention(place, tolerances[torch.float32], (4, 8), 4, 2)
        else:
            tensors = {'z': draw(1, 4, 4, 8), 'weight': draw(4, 1, 3, 3), 'bias': draw(4)}
            compare(
                triton_frfn.activate,
                triton_frfn.plain_activate,
                tensors,
                torch.float32,
                place,
                tolerances[torch.float32],
            )
