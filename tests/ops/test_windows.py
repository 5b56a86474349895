from functools import partial

import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from ast_plugin import ops
from ast_plugin.archs.blocks import ASSA
from ast_plugin.errors import ShapeError
from ast_plugin.ops.windows import MASKED


@pytest.mark.parametrize(('size', 'window'), [((8, 8), 8), ((8, 24), 8), ((12, 4), 4), ((15, 10), 5), ((3, 2), 1)])
def test_merge_inverts_partition(size, window):
    x = torch.arange(2 * size[0] * size[1] * 3.0).reshape(2, *size, 3)
    windows = ops.partition_windows(x, window)
    assert windows.shape == (2 * size[0] * size[1] // window**2, window**2, 3)
    assert torch.equal(ops.merge_windows(windows, window, size), x)
    with pytest.raises(ShapeError, match='is not divisible'):
        ops.partition_windows(x, 2 * size[0])


# Window sizes that no other test uses, so that they are not in the cache.
@pytest.mark.parametrize(('watcher', 'window'), [('export', 9), ('trace', 10), ('functionalize', 11), ('make_fx', 13)])
def test_cache_belongs_to_no_watcher(watcher, window):
    """Fake tensors and those of a transform must not be cached for later calls."""
    attention = ASSA(4, 1, window_size=window, shift_size=1).eval()
    x, other = torch.rand(1, 2 * window, 3 * window, 4), torch.rand(1, 4 * window, 2 * window, 4)

    def export():
        sides = {axis: window * torch.export.Dim(f'side{axis}', min=2, max=50) for axis in (1, 2)}
        exported = torch.export.export(attention, (x,), dynamic_shapes=(sides,), strict=False).module()
        torch.testing.assert_close(exported(other), attention(other))

    watchers = {
        'export': export,
        'trace': lambda: torch.jit.trace(attention, x),
        'functionalize': lambda: torch.func.functionalize(attention)(x),
        'make_fx': lambda: make_fx(partial(functional_call, attention), tracing_mode='fake')(
            dict(attention.named_parameters()), (x,)
        ),
    }
    with torch.no_grad():
        watchers[watcher]()
        for backend in ('reference', 'fused'):
            with ops.use_backend(backend):
                assert type(attention(x)) is torch.Tensor
                assert not torch._is_functional_tensor(attention(x))
    index = ops.relative_position_index(window)
    assert type(index) is torch.Tensor and index is ops.relative_position_index(window)


@pytest.mark.parametrize(('size', 'window', 'shift'), [((1, 1), 4, 2), ((5, 9), 4, 3), ((7, 8), 8, 4)])
def test_padding_mask_has_no_empty_rows(size, window, shift):
    mask = ops.padding_mask(size, window, shift, torch.device('cpu'))
    assert (mask.max(-1).values == 0).all()


def test_pair_mask_parts_marked_tokens():
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    pairs = ops.pair_mask(mask, (4, 4), 4)
    marked = ops.partition_windows(torch.nn.functional.interpolate(mask, size=(4, 4)).permute(0, 2, 3, 1), 4)[0, :, 0]
    assert marked.sum() == 8
    assert torch.equal(pairs[0], MASKED * torch.outer(marked, marked))


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (5, 1), (2, 3), (7, 8), (8, 8), (9, 31), (20, 4)])
@pytest.mark.parametrize('multiple', [1, 8, 24])
def test_padding_reflects_as_numpy_does(size, multiple):
    x = torch.rand(2, 3, *size)
    padded = ops.pad_to_multiple(x, multiple)
    missing = [(0, -side % multiple) for side in size]
    assert torch.equal(padded, torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), *missing], mode='reflect')))


def test_padding_passes_gradients():
    x = torch.rand(1, 1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.pad_to_multiple(x, 16), x)
