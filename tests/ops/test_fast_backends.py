"""Properties of every fast backend apart from its results: strides, gradients, determinism, autocast, checkpointing."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ast_plugin import ops
from ast_plugin.errors import BackendUnavailable

from .op_cases import CASES, as_leaves, check, relative_error, results


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def by_reference(function, *args, **tensors):
    with ops.use_backend('reference'):
        return function(*args, **tensors)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_reference_in_lower_precision(case, dtype, tolerances):
    function, tensors = case
    got = by_reference(function, **{name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert got.dtype == dtype
    assert relative_error(got, by_reference(function, **tensors)) < tolerances[dtype]


@pytest.mark.parametrize('layout', ['NCHW', 'transposed', 'every other', 'expanded'])
def test_any_strides_of_a_map(fast, case, layout):
    function, tensors = case
    leaves = as_leaves(tensors, fast.dtype, fast.device)
    x = leaves['x'].detach()
    view = {
        'NCHW': x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        'transposed': x.transpose(1, 2).contiguous().transpose(1, 2),
        'every other': torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2],
        'expanded': x[:1].expand(2, -1, -1, -1),
    }[layout]
    leaves['x'] = view.requires_grad_()
    outputs = function(**leaves), by_reference(function, **leaves)
    # the gradient of the sum is one number, expanded with stride 0
    got, want = ((y, *torch.autograd.grad(y.sum(), list(leaves.values()))) for y in outputs)
    assert all(relative_error(*pair) < fast.near for pair in zip(got, want, strict=True))


def test_inputs_unchanged_and_bits_repeat(fast, case):
    before = {name: tensor.clone() for name, tensor in case[1].items()}
    first, second = (results(fast.name, case, torch.float32, fast.device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(case[1][name], tensor) for name, tensor in before.items())


def test_gradients_of_one_tensor_alone(fast, case):
    function, tensors = case
    every = results(fast.name, case, fast.dtype, fast.device)
    direction = torch.randn(tensors['x'].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in tensors:
        leaves = as_leaves(tensors, fast.dtype, fast.device)
        for key, leaf in leaves.items():
            leaf.requires_grad_(key == name)
        (function(**leaves).double() * direction.to(fast.device)).sum().backward()
        assert relative_error(leaves[name].grad, every[name]) < fast.near
        assert all(leaf.grad is None for key, leaf in leaves.items() if key != name)


@pytest.mark.parametrize('is_shared', [False, True])
def test_gradients_of_gradients(fast, case, is_shared):
    function, tensors = case
    leaves = as_leaves(tensors, fast.dtype, fast.device)
    if is_shared:  # one tensor as two parameters
        leaves['norm_bias'] = leaves['norm']
    inputs = leaves['x'], leaves['norm']

    def twice():
        first = torch.autograd.grad(function(**leaves).square().sum(), inputs, create_graph=True)
        return *first, *torch.autograd.grad(sum(each.square().sum() for each in first), inputs)

    assert all(relative_error(*pair) < fast.near for pair in zip(twice(), by_reference(twice), strict=True))


def test_inference_mode_and_autocast(fast, case, tolerances):
    function, tensors = case
    want, single = by_reference(function, **tensors), as_leaves(tensors, torch.float32, fast.device)
    with torch.inference_mode():
        assert relative_error(function(**single), want) < 1e-4
    with torch.autocast(fast.device.type, torch.bfloat16):
        output = function(**single)
        # The sum of the float32 map and its bfloat16 branch is float32, as in the reference.
        assert output.dtype == by_reference(function, **single).dtype
    assert relative_error(output, want) < tolerances[torch.bfloat16]
    output.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 and leaf.grad.isfinite().all() for leaf in single.values())


def test_checkpointed_callers(fast, case):
    function, tensors = case
    again, direct = as_leaves(tensors, fast.dtype, fast.device), as_leaves(tensors, fast.dtype, fast.device)
    checkpoint(lambda: function(**again), use_reentrant=False).square().sum().backward()
    function(**direct).square().sum().backward()
    assert all(torch.equal(again[name].grad, direct[name].grad) for name in tensors)


@pytest.mark.parametrize('choice', ['auto', 'by name'])
def test_compiled_callers(fast, choice):
    function, tensors = CASES['assa']()
    leaves = as_leaves(tensors, fast.dtype, fast.device)
    torch.compiler.reset()
    with ops.use_backend('auto' if choice == 'auto' else None):
        compiled = torch.compile(lambda x: function(**{**leaves, 'x': x}) * 2, backend='aot_eager')
        assert relative_error(compiled(leaves['x']), 2 * by_reference(function, **leaves)) < fast.near
    torch.compiler.reset()


@pytest.mark.parametrize(
    ('name', 'missing'),
    [('assa', 'q_bias'), ('assa', 'kv_bias'), ('assa', 'norm'), ('frfn', 'norm'), ('frfn', 'norm_bias')],
)
def test_parameters_may_be_missing(fast, name, missing):
    function, tensors = CASES[name]()
    some = {key: tensor for key, tensor in tensors.items() if not key.startswith(missing)}
    check(fast.name, (function, some), fast.dtype, fast.near, fast.device)


def test_empty_batches(fast, case):
    function, tensors = case
    empty = as_leaves({**tensors, 'x': tensors['x'][:0]}, fast.dtype, fast.device)
    with pytest.raises(BackendUnavailable, match=r'the feature map \[0, 8, 8, 8\] is empty'):
        function(**empty)
    with ops.use_backend('auto'):
        assert function(**empty).shape == (0, 8, 8, 8)
