"""The CPU backend against the reference in float64: outputs, and gradients of every input and parameter."""

import pytest
import torch

from ast_plugin import ops
from ast_plugin.ops.cpu import ffn, operators

from .op_cases import as_leaves, attention_case, check, feed_forward_case

# Images, height, width: odd sides, elongated maps, maps shorter than a strip, several images in a strip.
MAPS = [(2, 9, 7), (1, 1, 5), (1, 21, 3), (5, 2, 3)]
# Images, size, window, shift: one window, one row of them, windows of one token.
WINDOWS = [(2, (8, 12), 4, 2), (1, (4, 4), 4, 1), (3, (6, 3), 3, 0), (1, (20, 10), 5, 3), (1, (3, 2), 1, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
CASES = {'frfn': lambda: feed_forward_case('frfn', (8, 8)), 'assa': lambda: attention_case((8, 8), 4, 2)}


@pytest.fixture(params=['kept', 'one strip', 'many strips'])
def _strips(request, monkeypatch):
    if request.param != 'kept':
        monkeypatch.setattr(ffn, 'KEPT_BYTES', 0)
    if request.param == 'many strips':
        monkeypatch.setattr(operators, 'STRIP_BYTES', 1)


# With oneDNN's operators (GELUs fused or separate, depending on the processor), and without them.
OPERATORS = [(torch.float64, 'plain'), *((dtype, kind) for dtype in DTYPES[1:] for kind in ('AVX512', 'plain'))]


@pytest.fixture(params=[*OPERATORS, (torch.float32, 'AVX2')], ids=str)
def dtype(request, monkeypatch):
    """Dtype of the computation, with the operators of some processor."""
    dtype, kind = request.param
    if kind == 'plain':
        monkeypatch.setattr(operators, 'has_onednn', lambda dtype: False)
    else:
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: kind)
    return dtype


@pytest.mark.parametrize('shape', MAPS, ids=str)
@pytest.mark.parametrize('is_scaled', [False, True])
@pytest.mark.usefixtures('_strips')
def test_frfn_by_shape(dtype, shape, is_scaled, tolerances):
    batch, *size = shape
    check('fused', feed_forward_case('frfn', size, batch=batch, is_scaled=is_scaled), dtype, tolerances[dtype])


@pytest.mark.parametrize('kind', ['frfn', 'leff', 'mlp'])
@pytest.mark.parametrize('is_bare', [False, True])
@pytest.mark.usefixtures('_strips')
def test_feed_forward_by_kind(dtype, kind, is_bare, tolerances):
    case = feed_forward_case(kind, (6, 5), bias=not is_bare, residual=not is_bare)
    check('fused', case, dtype, tolerances[dtype])


@pytest.mark.parametrize('strip_bytes', [operators.STRIP_BYTES, 1])
@pytest.mark.parametrize('shape', WINDOWS, ids=str)
@pytest.mark.parametrize('masks', [0, 1, 2], ids=['no mask', 'one mask', 'mask of each image'])
def test_assa_by_shape(dtype, shape, masks, strip_bytes, tolerances, monkeypatch):
    monkeypatch.setattr(operators, 'STRIP_BYTES', strip_bytes)
    batch, size, window, shift = shape
    image = (torch.rand(batch if masks > 1 else 1, 1, *size) < 0.5).float()
    mask = ops.pair_mask(image, size, window) if masks else None
    check('fused', attention_case(size, window, shift, batch=batch, mask=mask), dtype, tolerances[dtype])


@pytest.mark.parametrize('kind', ops.ATTENTION_KINDS)
@pytest.mark.parametrize('is_bare', [False, True])
def test_attention_by_kind(dtype, kind, is_bare, tolerances):
    case = attention_case((8, 12), 4, 2, kind, bias=not is_bare, residual=not is_bare)
    check('fused', case, dtype, tolerances[dtype])


@pytest.mark.parametrize(
    'missing',
    [{'q_bias'}, {'kv_bias'}, {'norm', 'norm_bias'}, {'norm_bias'}],
    ids=lambda names: '-'.join(sorted(names)),
)
@pytest.mark.parametrize('case', CASES)
def test_parameters_may_be_missing(case, missing, tolerances):
    function, tensors = CASES[case]()
    some = {name: tensor for name, tensor in tensors.items() if name not in missing}
    check('fused', (function, some), torch.float64, tolerances[torch.float64])


@pytest.mark.parametrize('case', CASES)
@pytest.mark.usefixtures('_strips')
def test_output_may_be_changed_in_place(case, dtype):
    """Third-party networks apply ReLU(inplace=True) to NCHW views of a block's output."""
    function, tensors = CASES[case]()
    leaves = as_leaves(tensors, dtype)
    with ops.use_backend('fused'):
        function(**leaves).permute(0, 3, 1, 2).relu_().sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize('case', CASES)
def test_default_device_is_not_used(case):
    function, tensors = CASES[case]()
    leaves = as_leaves(tensors)
    operators.has_onednn.cache_clear()
    with torch.device('meta'), ops.use_backend('fused'):
        function(**leaves).sum().backward()
        assert operators.has_onednn(torch.float32) == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize('strip_bytes', [operators.STRIP_BYTES, 1])
def test_memory_is_a_few_strips(strip_bytes, monkeypatch):
    """In addition to its output, a call holds a few strips, but no map of hidden channels."""
    from ast_plugin.evaluation.cost import peak_bytes

    monkeypatch.setattr(operators, 'STRIP_BYTES', strip_bytes)
    hidden, side = 64, 64
    function, tensors = feed_forward_case('frfn', (side, side), batch=1, hidden=hidden, residual=False)
    single = {name: tensor.float() for name, tensor in tensors.items()}
    x = single.pop('x')
    hidden_map = side * side * hidden * 4
    with torch.no_grad():
        with ops.use_backend('fused'):
            peak = peak_bytes(lambda: function(x, **single), x.device)
        with ops.use_backend('reference'):
            assert peak_bytes(lambda: function(x, **single), x.device) > 4 * hidden_map
    assert peak < x.nbytes + 5 * max(strip_bytes, 4 * side * hidden * 4)
    assert strip_bytes > 1 or peak < x.nbytes + hidden_map


def test_wrong_onednn_operators_are_rejected(monkeypatch):
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
