"""The fused path on CPUs against the reference in float64: outputs, and gradients of every input and parameter."""

import pytest
import torch

from ast_plugin import ops
from ast_plugin.errors import BackendUnavailable
from ast_plugin.ops.cpu import ffn, operators

from .op_cases import as_leaves, attention_case, check, feed_forward_case, relative_error, results

# Images, height, width: sides that are odd, longer one way, shorter than a strip; several images in a strip.
MAPS = [(2, 9, 7), (1, 1, 5), (1, 21, 3), (5, 2, 3)]
# Images, size, window, shift: one window, one row of them, windows of one token.
WINDOWS = [
    (2, (8, 12), 4, 2),
    (1, (4, 4), 4, 1),
    (3, (6, 3), 3, 0),
    (1, (20, 10), 5, 3),
    (1, (4, 16), 4, 2),
    (1, (3, 2), 1, 0),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CASES = {
    'frfn': lambda: feed_forward_case('frfn', (8, 8)),
    'assa': lambda: attention_case((8, 8), 4, 2),
}


@pytest.fixture(params=['kept', 'one strip', 'many strips'])
def _strips(request, monkeypatch):
    if request.param != 'kept':
        monkeypatch.setattr(ffn, 'KEPT_BYTES', 0)
    if request.param == 'many strips':
        monkeypatch.setattr(operators, 'STRIP_BYTES', 1)


@pytest.fixture(params=['oneDNN', 'plain'])
def _operators(request, monkeypatch):
    """With oneDNN's operators, and as where they are missing."""
    if request.param == 'plain':
        monkeypatch.setattr(operators, 'has_onednn', lambda dtype: False)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', MAPS, ids=str)
@pytest.mark.parametrize(('residual', 'is_scaled'), [(False, False), (True, False), (True, True)])
@pytest.mark.usefixtures('_strips', '_operators')
def test_frfn_by_shape(dtype, shape, residual, is_scaled, tolerances):
    batch, *size = shape
    case = feed_forward_case('frfn', size, batch=batch, residual=residual, is_scaled=is_scaled)
    check('fused', case, dtype, tolerances[dtype])


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('kind', ['frfn', 'leff', 'mlp'])
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.usefixtures('_strips')
def test_feed_forward_by_kind(dtype, kind, residual, bias, tolerances):
    check('fused', feed_forward_case(kind, (6, 5), bias=bias, residual=residual), dtype, tolerances[dtype])


@pytest.mark.parametrize('strip_bytes', [operators.STRIP_BYTES, 1])
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('shape', WINDOWS, ids=str)
@pytest.mark.parametrize('masks', [0, 1, 2], ids=['no mask', 'one mask', 'mask of each image'])
@pytest.mark.usefixtures('_operators')
def test_assa_by_shape(dtype, shape, masks, strip_bytes, tolerances, monkeypatch):
    monkeypatch.setattr(operators, 'STRIP_BYTES', strip_bytes)
    batch, size, window, shift = shape
    image = (torch.rand(batch if masks > 1 else 1, 1, *size) < 0.5).float()
    mask = ops.pair_mask(image, size, window) if masks else None
    check('fused', attention_case(size, window, shift, batch=batch, mask=mask), dtype, tolerances[dtype])


@pytest.mark.parametrize('dtype', DTYPES[:2], ids=str)
@pytest.mark.parametrize('kind', ops.ATTENTION_KINDS)
@pytest.mark.parametrize('residual', [False, True])
@pytest.mark.parametrize('bias', [False, True])
def test_attention_by_kind(dtype, kind, residual, bias, tolerances):
    check('fused', attention_case((8, 12), 4, 2, kind, bias=bias, residual=residual), dtype, tolerances[dtype])


@pytest.mark.parametrize('missing', [{'q_bias'}, {'kv_bias'}, {'norm', 'norm_bias'}, {'norm_bias'}], ids=str)
@pytest.mark.parametrize('case', CASES)
def test_parameters_may_be_missing(case, missing, tolerances):
    function, tensors = CASES[case]()
    some = {name: tensor for name, tensor in tensors.items() if name not in missing}
    check('fused', (function, some), torch.float64, tolerances[torch.float64])


@pytest.mark.parametrize('case', CASES)
def test_any_strides_of_a_map(case):
    function, tensors = CASES[case]()
    x, want = tensors['x'], function(**tensors)
    views = {
        'NCHW': x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        'transposed': x.transpose(1, 2).contiguous().transpose(1, 2),
        'every other': torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2],
        'expanded': x[:1].expand(2, -1, -1, -1),
    }
    with ops.use_backend('fused'):
        for name, view in views.items():
            expected = want[:1].expand_as(want) if name == 'expanded' else want
            torch.testing.assert_close(function(**{**tensors, 'x': view}), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('case', CASES)
def test_inputs_unchanged_and_bits_repeat(case):
    function, tensors = CASES[case]()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    first, second = (results('fused', (function, tensors), torch.float32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.usefixtures('_strips')
def test_output_may_be_changed_in_place(case, dtype):
    """Networks of others go on with ReLU(inplace=True), on NCHW views of what a block gives."""
    function, tensors = CASES[case]()
    leaves = as_leaves(tensors, dtype)
    with ops.use_backend('fused'):
        function(**leaves).permute(0, 3, 1, 2).relu_().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize('case', CASES)
@pytest.mark.usefixtures('_strips')
def test_gradients_of_one_tensor_alone(case):
    function, tensors = CASES[case]()
    every = results('fused', (function, tensors))
    direction = torch.randn(tensors['x'].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in tensors:
        leaves = {key: tensor.clone().requires_grad_(key == name) for key, tensor in tensors.items()}
        with ops.use_backend('fused'):
            (function(**leaves) * direction).sum().backward()
        torch.testing.assert_close(leaves[name].grad, every[name], rtol=1e-9, atol=1e-9)
        assert all(leaf.grad is None for key, leaf in leaves.items() if key != name)


@pytest.mark.parametrize('case', CASES)
def test_gradients_of_gradients(case):
    function, tensors = CASES[case]()
    found = []
    for backend in ('reference', 'fused'):
        leaves = as_leaves(tensors)
        with ops.use_backend(backend):
            output = function(**leaves).square().sum()
            (first,) = torch.autograd.grad(output, leaves['x'], create_graph=True)
            found.append(torch.autograd.grad(first.square().sum(), [leaves['x'], leaves['norm']]))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('case', CASES)
def test_inference_mode_and_autocast(case, tolerances):
    function, tensors = CASES[case]()
    want, single = function(**tensors), as_leaves(tensors, torch.float32)
    with ops.use_backend('fused'):
        with torch.inference_mode():
            torch.testing.assert_close(function(**single).double(), want, rtol=1e-4, atol=1e-4)
        with torch.autocast('cpu', torch.bfloat16):
            output = function(**single)
        # The map in float32 and its branch in bfloat16 sum up in float32, as in the reference.
        with ops.use_backend('reference'), torch.autocast('cpu', torch.bfloat16):
            assert output.dtype == function(**single).dtype
        assert relative_error(output, want) < tolerances[torch.bfloat16]
        output.sum().backward()
    assert {leaf.grad.dtype for leaf in single.values()} == {torch.float32}


@pytest.mark.parametrize('case', CASES)
def test_checkpointed_callers(case):
    function, tensors = CASES[case]()
    again, direct = as_leaves(tensors), as_leaves(tensors)
    with ops.use_backend('fused'):
        torch.utils.checkpoint.checkpoint(lambda: function(**again), use_reentrant=False).square().sum().backward()
        function(**direct).square().sum().backward()
    assert all(torch.equal(again[name].grad, direct[name].grad) for name in tensors)


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
    x = tensors.pop('x')
    with torch.inference_mode(False), torch.no_grad(), ops.use_backend('fused'):
        parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}
        function(x=x, **parameters)
        for parameter in parameters.values():
            parameter.data.mul_(0.9)  # as BasicSR's moving average writes
        got = function(x=x, **parameters)
        with ops.use_backend('reference'):
            torch.testing.assert_close(got, function(x=x, **parameters), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('case', CASES)
def test_empty_batches(case):
    function, tensors = CASES[case]()
    empty = {**tensors, 'x': tensors['x'][:0]}
    with ops.use_backend('fused'), pytest.raises(BackendUnavailable, match=r'nothing to compute in \[0, 8, 8, 8\]'):
        function(**empty)
    assert function(**empty).shape == (0, 8, 8, 8)


@pytest.mark.parametrize('strip_bytes', [operators.STRIP_BYTES, 1])
def test_memory_is_a_few_strips(strip_bytes, monkeypatch):
    """Beside its output, a call holds a few strips: no map of hidden channels."""
    from ast_plugin.evaluation.cost import peak_bytes

    monkeypatch.setattr(operators, 'STRIP_BYTES', strip_bytes)
    hidden, side = 64, 64
    function, tensors = feed_forward_case('frfn', (side, side), batch=1, hidden=hidden, residual=False)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    x = single.pop('x')
    hidden_map = side * side * hidden * 4
    with torch.no_grad():
        with ops.use_backend('fused'):
            peak = peak_bytes(lambda x: function(x, **single), x)
        with ops.use_backend('reference'):
            assert peak_bytes(lambda x: function(x, **single), x) > 4 * hidden_map
    assert peak < x.nbytes + 5 * max(strip_bytes, 4 * side * hidden * 4)
    assert strip_bytes > 1 or peak < x.nbytes + hidden_map


def test_wrong_onednn_operators_are_refused(monkeypatch):
    operators.has_onednn.cache_clear()
    try:
        for fault in (lambda x, *rest: x.new_zeros(*x.shape[:-1], 8), lambda *rest: (_ for _ in ()).throw(TypeError())):
            with monkeypatch.context() as patch:
                patch.setattr(operators, '_onednn_linear', fault)
                assert not operators.has_onednn(torch.float32)
            operators.has_onednn.cache_clear()
    finally:
        operators.has_onednn.cache_clear()
    assert not operators.has_onednn(torch.float64)


@pytest.mark.parametrize('limit', [1, 100, 10**6])
def test_strips_cover_a_map_once(limit, monkeypatch):
    monkeypatch.setattr(operators, 'STRIP_BYTES', limit)
    for B, H, unit in ((1, 1, 1), (3, 7, 1), (2, 24, 8), (2, 40, 5)):
        covered = torch.zeros(B, H, 1, 1)
        for strip in operators.cut_strips(B, H, 10, unit):
            strip.view(covered).add_(1)
            assert strip.first % unit == strip.last % unit == 0
            assert strip.num_images == 1 or strip.last - strip.first == H
        assert (covered == 1).all()
