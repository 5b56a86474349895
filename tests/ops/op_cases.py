"""Operator calls on random tensors, and their comparison with the reference in float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from ast_plugin import ops
from ast_plugin.ops import Attention, FeedForward, Residual

Case = tuple[Callable[..., Tensor], dict[str, Tensor]]  # a function of named tensors, and the tensors


def draw(*shape: int) -> Tensor:
    """Return normally distributed numbers; weights are divided by the square root of the fan-in."""
    terms = torch.Size(shape[1:]).numel() if len(shape) > 1 else 1
    return torch.randn(shape, dtype=torch.float64) / terms**0.5


def attention_case(
    size, window, shift=0, kind='assa', *, batch=2, dim=8, heads=2, bias=True, residual=True, mask=None
) -> Case:
    tensors = {'x': torch.randn(batch, *size, dim, dtype=torch.float64)}
    tensors |= {'q': draw(dim, dim), 'kv': draw(2 * dim, dim), 'proj': draw(dim, dim)}
    tensors['position_bias'] = torch.randn((2 * window - 1) ** 2, heads, dtype=torch.float64)
    tensors |= {'q_bias': draw(dim), 'kv_bias': draw(2 * dim), 'proj_bias': draw(dim)} if bias else {}
    tensors |= {'gate': draw(2)} if kind == 'assa' else {}
    tensors |= {'norm': 1 + 0.1 * draw(dim), 'norm_bias': draw(dim)} if residual else {}

    def function(x, norm=None, norm_bias=None, **parameters):
        parameters = {name: parameters.get(name) for name in Attention._fields[:8]}
        op = Attention(**parameters, num_heads=heads, window=window, shift=shift, kind=kind)
        around = Residual(norm, norm_bias) if residual else None
        return ops.window_attention(x, op, None if mask is None else mask.to(x.device), around)

    return function, tensors


def feed_forward_case(kind, size, *, batch=2, dim=8, hidden=12, bias=True, residual=True, is_scaled=False) -> Case:
    rows = 2 * hidden if kind == 'frfn' else hidden
    tensors = {'x': torch.randn(batch, *size, dim, dtype=torch.float64)}
    tensors |= {'expand': draw(rows, dim), 'project': draw(dim, hidden)}
    tensors |= {'depthwise': draw(hidden, 1, 3, 3)} if kind != 'mlp' else {}
    tensors |= {f'{name}_bias': draw(len(tensors[name])) for name in list(tensors) if name != 'x' and bias}
    tensors |= {'partial_conv': draw(dim // 4, dim // 4, 3, 3)} if kind == 'frfn' else {}
    tensors |= {'norm': 1 + 0.1 * draw(dim), 'norm_bias': draw(dim)} if residual else {}
    scale = torch.tensor([2.0, 0.0, 1.0, 0.5, 1.5])[:batch].reshape(-1, 1, 1, 1) if is_scaled else None

    def function(x, norm=None, norm_bias=None, **parameters):
        op = FeedForward(**{'expand_bias': None, 'project_bias': None, **parameters})
        around = Residual(norm, norm_bias, 1e-5, None if scale is None else scale.to(x)) if residual else None
        return ops.feed_forward(x, op, around)

    return function, tensors


# One case of each operator, for properties that do not depend on shapes and settings.
CASES = {'frfn': lambda: feed_forward_case('frfn', (8, 8)), 'assa': lambda: attention_case((8, 8), 4, 2)}


def as_leaves(tensors: dict[str, Tensor], dtype=None, device=None) -> dict[str, Tensor]:
    """Return copies that require gradients."""
    return {name: tensor.detach().to(device, dtype, copy=True).requires_grad_() for name, tensor in tensors.items()}


def results(backend: str, case: Case, dtype=torch.float64, device=None) -> dict[str, Tensor]:
    """Return the output and the gradients of all tensors by name; check the output without gradients."""
    function, tensors = case
    leaves = as_leaves(tensors, dtype, device)
    with ops.use_backend(backend):
        output = function(**leaves)
        with torch.no_grad():
            error = relative_error(function(**leaves), output)
        assert error <= {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 2e-2)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((output.double() * direction.to(device)).sum(), list(leaves.values()))
    return {'output': output.detach(), **dict(zip(leaves, gradients, strict=True))}


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / (want.norm() + 1e-12))


def check(backend: str, case: Case, dtype: torch.dtype, tolerance: float, device=None) -> None:
    """Compare the selected backend in a dtype with the reference in float64."""
    want, got = results('reference', case), results(backend, case, dtype, device)
    # Steep functions amplify rounding errors: a backend may have twice the error of the reference in that dtype.
    plain = results('reference', case, dtype, device)
    for name, value in got.items():
        assert value.dtype == dtype, name
        error, usual = relative_error(value, want[name]), relative_error(plain[name], want[name])
        assert error <= max(tolerance, 2 * usual), (name, error, usual)


def check_definition(case: Case, definition: Callable[[dict[str, Tensor]], Tensor]) -> None:
    """Compare output and gradients in float64 with those of an independent implementation."""
    function, tensors = case
    leaves = as_leaves(tensors)
    outputs = function(**leaves), definition(leaves)
    target = torch.randn_like(outputs[1])
    got, want = ((y, *torch.autograd.grad((y * target).sum(), list(leaves.values()))) for y in outputs)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
