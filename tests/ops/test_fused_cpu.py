"""The fused path on CPUs against the reference in float64: outputs, and gradients of every input and parameter."""

import pytest
import torch

from ast_plugin import ops
from ast_plugin.errors import BackendUnavailable, ShapeError
from ast_plugin.ops import Residual, fused_cpu_ffn, fused_cpu_kernels

C, HEADS, HIDDEN = 8, 2, 12
# Sides that are odd, longer one way, shorter than a strip; several images in a strip.
MAPS = [(2, 9, 7), (1, 1, 5), (1, 21, 3), (5, 2, 3)]
# (images, height, width, window, shift); one window, one row of them, windows of one token.
WINDOWS = [(2, 8, 12, 4, 2), (1, 4, 4, 4, 1), (3, 6, 3, 3, 0), (1, 20, 10, 5, 3), (1, 4, 16, 4, 2), (1, 3, 2, 1, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(params=['kept', 'one strip', 'many strips'], autouse=True)
def _strips(request, monkeypatch):
    if request.param != 'kept':
        monkeypatch.setattr(fused_cpu_ffn, 'KEPT_BYTES', 0)
    if request.param == 'many strips':
        monkeypatch.setattr(fused_cpu_kernels, 'STRIP_BYTES', 1)


@pytest.fixture(params=['oneDNN', 'plain'])
def _operators(request, monkeypatch):
    """With oneDNN's operators, and as where they are missing."""
    if request.param == 'plain':
        monkeypatch.setattr(fused_cpu_kernels, 'has_onednn', lambda dtype: False)


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64) * (shape[-1] ** -0.5 if len(shape) > 1 else 1)


def feed_forward(kind, residual, shape, bias=True):
    """A function of tensors, and these."""
    tensors = {'x': torch.randn(*shape, C, dtype=torch.float64)}
    tensors |= {'expand': draw(HIDDEN * (1 + (kind == 'frfn')), C), 'project': draw(C, HIDDEN)}
    if kind != 'mlp':
        tensors['depthwise'] = torch.randn(HIDDEN, 1, 3, 3, dtype=torch.float64) / 3
    biases = {
        f'{name}_bias': draw(len(tensors[name])) for name in ('expand', 'project', 'depthwise') if name in tensors
    }
    tensors |= biases if bias else {}
    if kind == 'frfn':
        tensors['partial'] = draw(C // 4, C // 4, 3, 3)
    if residual:
        tensors |= {'norm': 1 + 0.1 * draw(C), 'norm_bias': draw(C)}
    scale = torch.tensor([2.0, 0.0, 1.0, 0.5, 1.5])[: shape[0]].reshape(-1, 1, 1, 1) if residual == 'scaled' else None

    def function(x, expand, project, depthwise=None, partial=None, norm=None, norm_bias=None, **biases):
        layers = [(expand, biases.get('expand_bias')), (depthwise, biases.get('depthwise_bias'))]
        layers = [layer for layer in layers if layer[0] is not None] + [(project, biases.get('project_bias'))]
        layers = ([] if partial is None else [partial]) + layers
        around = Residual(norm, norm_bias, 1e-5, None if scale is None else scale.to(x.dtype)) if residual else None
        return getattr(ops, kind)(x, *layers, around)

    return function, tensors


def attention(kind, shape, residual=True, masked=False, bias=True):
    """A function of tensors, and these."""
    B, H, W, window, shift = shape
    tensors = {'x': torch.randn(B, H, W, C, dtype=torch.float64), 'q': draw(C, C), 'kv': draw(2 * C, C)}
    tensors |= {'proj': draw(C, C), 'table': torch.randn((2 * window - 1) ** 2, HEADS, dtype=torch.float64)}
    if bias:
        tensors |= {'q_bias': draw(C), 'kv_bias': draw(2 * C), 'proj_bias': draw(C)}
    if kind == 'assa':
        tensors['gate'] = draw(2)
    if residual:
        tensors |= {'norm': 1 + 0.1 * draw(C), 'norm_bias': draw(C)}
    mask = None
    if masked:
        picture = (torch.rand(B if masked == 'each' else 1, 1, H, W) < 0.5).float()
        mask = ops.pair_mask(picture, (H, W), window)

    def function(x, q, kv, proj, table, gate=None, norm=None, norm_bias=None, **biases):
        return ops.window_attention(
            x,
            (q, biases.get('q_bias')),
            (kv, biases.get('kv_bias')),
            (proj, biases.get('proj_bias')),
            table,
            num_heads=HEADS,
            window=window,
            shift=shift,
            kind=kind,
            gate=gate,
            mask=mask,
            residual=Residual(norm, norm_bias) if residual else None,
        )

    return function, tensors


def outputs_and_gradients(backend, function, tensors, dtype):
    leaves = {name: tensor.detach().to(dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}
    with ops.use_backend(backend):
        output = function(**leaves)
        with torch.no_grad():
            error = (function(**leaves).double() - output.double()).norm() / (output.double().norm() + 1e-12)
        assert error <= {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((output.double() * direction).sum(), list(leaves.values()))
    return {'output': output.detach(), **dict(zip(leaves, gradients, strict=True))}


def check(function, tensors, dtype, tolerance):
    want = outputs_and_gradients('reference', function, tensors, torch.float64)
    got = outputs_and_gradients('fused', function, tensors, dtype)
    # What rounding makes of a steep function is no fault of a backend: it may be off by twice what the reference is.
    plain = outputs_and_gradients('reference', function, tensors, dtype)
    for name, value in got.items():
        assert value.dtype == dtype, name
        size = want[name].norm() + 1e-12
        error, usual = ((tensor[name].double() - want[name]).norm() / size for tensor in (got, plain))
        assert error <= max(tolerance, 2 * usual), (name, float(error), float(usual))


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', MAPS, ids=str)
@pytest.mark.parametrize('residual', [False, True, 'scaled'])
@pytest.mark.usefixtures('_operators')
def test_frfn(dtype, shape, residual, tolerances):
    check(*feed_forward('frfn', residual, shape), dtype, tolerances[dtype])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kind', ['frfn', 'leff', 'mlp'])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_feed_forwards(dtype, kind, residual, bias, tolerances):
    check(*feed_forward(kind, residual, (2, 6, 5), bias), dtype, tolerances[dtype])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', WINDOWS, ids=str)
@pytest.mark.parametrize('masked', [False, 'all', 'each'])
@pytest.mark.usefixtures('_operators')
def test_assa(dtype, shape, masked, tolerances):
    check(*attention('assa', shape, masked=masked), dtype, tolerances[dtype])


@pytest.mark.parametrize('kind', ops.ATTENTION_KINDS)
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_attentions(kind, residual, bias, tolerances):
    function, tensors = attention(kind, WINDOWS[0], residual, bias=bias)
    for dtype in (torch.float64, torch.float32):
        check(function, tensors, dtype, tolerances[dtype])


@pytest.mark.parametrize('missing', [{'q_bias'}, {'kv_bias'}, {'norm', 'norm_bias'}, {'norm_bias'}], ids=str)
def test_layers_may_lack_some_parameters(missing, tolerances):
    for function, tensors in (attention('assa', WINDOWS[0]), feed_forward('frfn', True, (2, 6, 5))):
        some = {name: tensor for name, tensor in tensors.items() if name not in missing}
        check(function, some, torch.float64, tolerances[torch.float64])


CASES = {'frfn': lambda: feed_forward('frfn', True, (2, 8, 8)), 'assa': lambda: attention('assa', (2, 8, 8, 4, 2))}


@pytest.mark.parametrize('case', CASES)
def test_any_layout_of_a_map(case):
    function, tensors = CASES[case]()
    want = function(**tensors)
    x = tensors['x']
    layouts = {
        'NCHW': x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        'transposed': x.transpose(1, 2).contiguous().transpose(1, 2),
        'every other': torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2],
        'expanded': x[:1].expand(2, -1, -1, -1),
    }
    for name, view in layouts.items():
        with ops.use_backend('fused'):
            got = function(**{**tensors, 'x': view})
        expected = want[:1].expand_as(want) if name == 'expanded' else want
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('case', CASES)
def test_inputs_are_left_as_they_are(case):
    function, tensors = CASES[case]()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with ops.use_backend('fused'):
        outputs_and_gradients('fused', function, tensors, torch.float64)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('case', CASES)
def test_the_output_may_be_changed_in_place(case, dtype):
    """Networks of others go on with ReLU(inplace=True), on NCHW views of what a block gives."""
    function, tensors = CASES[case]()
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    with ops.use_backend('fused'):
        output = function(**leaves).permute(0, 3, 1, 2)
        output.relu_().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize('case', CASES)
def test_only_gradients_that_are_asked_for(case):
    function, tensors = CASES[case]()
    every = outputs_and_gradients('fused', function, tensors, torch.float64)
    for name in tensors:
        leaves = {key: tensor.clone().requires_grad_(key == name) for key, tensor in tensors.items()}
        with ops.use_backend('fused'):
            output = function(**leaves)
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (output * direction).sum().backward()
        torch.testing.assert_close(leaves[name].grad, every[name], rtol=1e-9, atol=1e-9)
        assert all(leaf.grad is None for key, leaf in leaves.items() if key != name)


@pytest.mark.parametrize('case', CASES)
def test_gradients_of_gradients(case):
    function, tensors = CASES[case]()
    found = []
    for backend in ('reference', 'fused'):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        with ops.use_backend(backend):
            output = function(**leaves).square().sum()
            (first,) = torch.autograd.grad(output, leaves['x'], create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), [leaves['x'], leaves['norm']]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('case', CASES)
def test_inference_mode_autocast_and_checkpoints(case, tolerances):
    function, tensors = CASES[case]()
    single = {name: tensor.float() for name, tensor in tensors.items()}
    want = function(**tensors)
    with ops.use_backend('fused'):
        with torch.inference_mode():
            torch.testing.assert_close(function(**single).double(), want, rtol=1e-4, atol=1e-4)
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in single.items()}
        with torch.autocast('cpu', torch.bfloat16):
            output = function(**leaves)
        # The map in float32 and its branch in bfloat16 sum up in float32, as in the reference.
        with ops.use_backend('reference'), torch.autocast('cpu', torch.bfloat16):
            assert output.dtype == function(**single).dtype
        assert (output.double() - want).norm() / want.norm() < tolerances[torch.bfloat16]
        output.sum().backward()
        assert {leaf.grad.dtype for leaf in leaves.values()} == {torch.float32}
        exact = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        again = torch.utils.checkpoint.checkpoint(lambda: function(**exact), use_reentrant=False)
        again.square().sum().backward()
        direct = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        function(**direct).square().sum().backward()
        assert all(torch.equal(exact[name].grad, direct[name].grad) for name in tensors)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('backend', ['auto', 'fused'])
def test_compiled_callers(case, backend):
    function, tensors = CASES[case]()
    want = function(**tensors)
    torch.compiler.reset()
    with ops.use_backend(backend):
        compiled = torch.compile(lambda x: function(**{**tensors, 'x': x}) * 2, backend='aot_eager')
        torch.testing.assert_close(compiled(tensors['x']), 2 * want, rtol=1e-9, atol=1e-9)
    torch.compiler.reset()


@pytest.mark.parametrize('case', CASES)
def test_parameters_may_change_in_any_way(case):
    """Nothing that is made of parameters is kept: neither a version counter nor `.data` could make it stale."""
    function, tensors = CASES[case]()
    with torch.inference_mode(False), ops.use_backend('fused'):
        parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items() if name != 'x'}
        with torch.no_grad():
            function(x=tensors['x'], **parameters)
            for parameter in parameters.values():
                parameter.data.mul_(0.9)  # as BasicSR's moving average writes
            got = function(x=tensors['x'], **parameters)
    with ops.use_backend('reference'):
        want = function(x=tensors['x'], **{name: parameter.detach() for name, parameter in parameters.items()})
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('case', CASES)
def test_the_same_again_bit_for_bit(case):
    function, tensors = CASES[case]()
    first, second = (outputs_and_gradients('fused', function, tensors, torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('case', CASES)
def test_nothing_to_compute(case):
    function, tensors = CASES[case]()
    empty = {**tensors, 'x': tensors['x'][:0]}
    with ops.use_backend('fused'), pytest.raises(BackendUnavailable, match=r'nothing to compute in \[0, 8, 8, 8\]'):
        function(**empty)
    assert function(**empty).shape == (0, 8, 8, 8)


def test_sizes_that_do_not_divide():
    function, tensors = attention('assa', (1, 8, 8, 4, 0))
    with ops.use_backend('fused'), pytest.raises(ShapeError, match='7x8'):
        function(**{**tensors, 'x': tensors['x'][:, :7]})


@pytest.mark.parametrize('backend', ['reference', 'fused'])
@pytest.mark.parametrize('shift', [-1, 4, 5])
def test_a_shift_is_within_a_window(backend, shift):
    function, tensors = attention('assa', (1, 8, 8, 4, shift))
    with ops.use_backend(backend), pytest.raises(ShapeError, match=rf'shift of {shift} is not in \[0, 4\)'):
        function(**tensors)


@pytest.mark.parametrize('shape', [(0, 8), (8, 0)])
def test_maps_of_nothing_have_no_windows(shape):
    function, tensors = attention('assa', (1, 8, 8, 4, 1))
    with pytest.raises(ShapeError, match='{}x{} map'.format(*shape)):
        function(**{**tensors, 'x': torch.zeros(1, *shape, C)})
    with pytest.raises(ShapeError, match=r'expected a map \[B, H, W, C\], got \[8, 8, 8\]'):
        function(**{**tensors, 'x': tensors['x'][0]})


def test_memory_of_a_call_does_not_grow_with_hidden_channels():
    """Beside its output, a call holds a few strips: no map of hidden channels."""
    from ast_plugin.evaluation.cost import peak_bytes

    hidden, side = 64, 64
    weights = [draw(*shape).float() for shape in ((2 * hidden, C), (2 * hidden,), (C, hidden), (C,))]
    depthwise = (torch.randn(hidden, 1, 3, 3), torch.randn(hidden))
    x = torch.randn(1, side, side, C)

    def run(x):
        layers = (weights[0], weights[1]), depthwise, (weights[2], weights[3])
        return ops.frfn(x, draw(C // 4, C // 4, 3, 3).float(), *layers)

    hidden_map = side * side * hidden * 4
    strip = 5 * max(fused_cpu_kernels.STRIP_BYTES, 4 * side * hidden * 4)
    with torch.no_grad(), ops.use_backend('fused'):
        peak = peak_bytes(run, x)
    with torch.no_grad(), ops.use_backend('reference'):
        assert peak_bytes(run, x) > 4 * hidden_map
    assert peak < x.nbytes + strip
    if fused_cpu_kernels.STRIP_BYTES == 1:
        assert peak < x.nbytes + hidden_map
