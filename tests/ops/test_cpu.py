"""The CPU backend against the reference in float64: outputs, and gradients of every input and parameter."""

from functools import partial

import pytest
import torch

from ast_plugin import ops
from ast_plugin.ops.cpu import ffn, operators

from .op_cases import CASES, as_leaves, attention_case, check, feed_forward_case

# Images, height, width: odd sides, elongated maps, maps shorter than a strip, several images in a strip.
MAPS = [(2, 9, 7), (1, 1, 5), (1, 21, 3), (5, 2, 3)]
# Images, size, window, shift: one window, one row of them, windows of one token.
WINDOWS = [(2, (8, 12), 4, 2), (1, (4, 4), 4, 1), (3, (6, 3), 3, 0), (1, (20, 10), 5, 3), (1, (3, 2), 1, 0)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def masked_case(batch, size, window, shift, num_masks):
    image = (torch.rand(num_masks, 1, *size) < 0.5).float()
    return attention_case(size, window, shift, batch=batch, mask=ops.pair_mask(image, size, window))


def list_cases():
    """Return functions that make a case, by name."""
    cases = {
        f'frfn {shape} {is_scaled}': partial(feed_forward_case, 'frfn', shape[1:], batch=shape[0], is_scaled=is_scaled)
        for shape in MAPS
        for is_scaled in (False, True)
    }
    for is_bare in (False, True):
        parts = {'bias': not is_bare, 'residual': not is_bare}
        for kind in ('frfn', 'leff', 'mlp'):
            cases[f'{kind} {is_bare}'] = partial(feed_forward_case, kind, (6, 5), **parts)
        for kind in ops.ATTENTION_KINDS:
            cases[f'{kind} {is_bare}'] = partial(attention_case, (8, 12), 4, 2, kind, **parts)
    for batch, *shape in WINDOWS:
        cases[f'assa {batch} {shape}'] = partial(attention_case, *shape, batch=batch)
        for num_masks in {1, batch}:
            cases[f'assa {batch} {shape} {num_masks} masks'] = partial(masked_case, batch, *shape, num_masks)
    return cases


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


@pytest.mark.parametrize('make', [pytest.param(make, id=name) for name, make in list_cases().items()])
@pytest.mark.usefixtures('_strips')
def test_branch_in_every_dtype(dtype, make, tolerances):
    check('fused', make(), dtype, tolerances[dtype])


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
