import pytest
import torch
from torch.nn import functional as F

from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops.tiles import run_tiled, tile_starts


def convolution(radius: int, seed: int = 0):
    """A random convolution with zero padding, which gives wrong results near the edges of a tile."""
    generator = torch.Generator().manual_seed(seed)
    side = 2 * radius + 1
    kernel = torch.randn(3, 3, side, side, generator=generator, dtype=torch.float64) / side
    return lambda image: F.conv2d(image, kernel.to(image.dtype), padding=radius)


@pytest.mark.parametrize(
    ('size', 'tile', 'overlap', 'starts'),
    [
        (384, 384, 80, [0]),
        (480, 384, 80, [0, 96]),
        (720, 384, 80, [0, 304, 336]),
        (1600, 1152, 384, [0, 448]),
        (1200, 1152, 384, [0, 48]),
        (100, 40, 10, [0, 30, 60]),
        (5, 8, 2, [0]),
    ],
)
def test_starts_of_the_official_protocol(size, tile, overlap, starts):
    assert tile_starts(size, tile, overlap) == starts


@pytest.mark.parametrize('scale', [1, 3])
@pytest.mark.parametrize('blend', ['ramp', 'mean'])
@pytest.mark.parametrize(('height', 'width'), [(40, 40), (37, 61), (16, 50), (9, 7), (1, 70), (33, 17)])
@pytest.mark.parametrize('overlap', [0, 1, 5, 15])
def test_pointwise_functions_see_no_tiles(height, width, overlap, blend, scale):
    image, shapes = torch.rand(2, 3, height, width), set()

    def function(patch):
        shapes.add(tuple(patch.shape[-2:]))
        return (patch[:, :2] * 2 - 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)

    result = run_tiled(function, image, 16, overlap, blend)
    assert shapes == {(min(height, 16), min(width, 16))}
    torch.testing.assert_close(result, function(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(('radius', 'overlap'), [(1, 3), (1, 4), (2, 11), (3, 9), (1, 15)])
@pytest.mark.parametrize(('height', 'width'), [(37, 61), (16, 50)])
def test_equals_whole_image_within_the_overlap(height, width, radius, overlap):
    image = torch.rand(1, 3, height, width, dtype=torch.float64)
    function = convolution(radius)
    torch.testing.assert_close(run_tiled(function, image, 16, overlap), function(image), rtol=0, atol=1e-12)
    single = run_tiled(function, image.float(), 16, overlap)
    torch.testing.assert_close(single, function(image).float(), rtol=0, atol=1e-5)


def test_mean_is_the_plain_average_of_the_tiles():
    image = torch.rand(1, 1, 25, 21, dtype=torch.float64)
    total, count = torch.zeros_like(image), torch.zeros_like(image)
    for top in (0, 6, 12, 15):
        for left in (0, 6, 11):
            patch = image[..., top : top + 10, left : left + 10]
            total[..., top : top + 10, left : left + 10] += patch - patch.mean()
            count[..., top : top + 10, left : left + 10] += 1
    result = run_tiled(lambda patch: patch - patch.mean(), image, 10, 4, 'mean')
    torch.testing.assert_close(result, total / count, rtol=0, atol=1e-12)


def test_no_seam_shows_in_a_smooth_image():
    """Second differences, in which a seam is a spike, stay close to those of the untiled image; plain means spike."""
    rows, columns = torch.arange(150, dtype=torch.float64), torch.arange(170, dtype=torch.float64)
    image = 0.5 + 0.2 * (torch.sin(rows / 23)[:, None] + torch.cos(columns / 31)).expand(1, 3, -1, -1)
    kernel = torch.full((3, 1, 9, 9), 1 / 81, dtype=image.dtype)

    def function(image):
        """A network with zero padding and a reach of 24 pixels, twice the margin discarded for an overlap of 36."""
        for _ in range(6):
            image = F.conv2d(image, kernel, padding=4, groups=3)
        return image

    def roughness(result):
        result = result[..., 30:-30, 30:-30]  # the image border is dark in the untiled result, too
        return max(result.diff(n=2, dim=dim).abs().max().item() for dim in (-1, -2))

    base = roughness(function(image))
    assert roughness(run_tiled(function, image, 72, 36)) < 2 * base
    assert roughness(run_tiled(function, image, 72, 36, 'mean')) > 10 * base
    assert roughness(run_tiled(function, image, 72, 0)) > 100 * base


@pytest.mark.parametrize('batch', [2, 3, 100])
@pytest.mark.parametrize(('images', 'blend'), [(1, 'ramp'), (2, 'mean')])
def test_batches_of_tiles_give_the_same(batch, images, blend):
    image = torch.rand(images, 3, 40, 61, dtype=torch.float64)
    function, sizes, calls = convolution(2), [], []

    def counted(patches):
        sizes.append(len(patches))
        return function(patches)

    result = run_tiled(counted, image, 16, 6, blend, lambda *call: calls.append(call), batch)
    torch.testing.assert_close(result, run_tiled(function, image, 16, 6, blend), rtol=0, atol=1e-12)
    full, rest = divmod(4 * 6, batch)
    assert sizes == [images * batch] * full + [images * rest] * bool(rest)
    assert calls[-1] == (24, 24) and len(calls) == len(sizes)


def test_memory_is_bounded_by_the_tile():
    """An image of more than three times the size needs no more memory, except for the result."""
    from ast_plugin.evaluation.cost import peak_bytes

    def widened(patches):
        return torch.cat([patches] * 20, 1).sum(1, keepdim=True)

    def needed(side, batch=1):
        image = torch.rand(1, 3, side, side)
        return peak_bytes(lambda: run_tiled(widened, image, 48, 16, batch=batch), image.device) - 4 * side * side

    small, large = needed(112), needed(208)
    assert large < 1.2 * small
    assert small < 1.5 * 60 * 4 * 48 * 48
    assert 3 * small < needed(112, batch=4) < 5 * small


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'tile': 0}, 'tile is 0: expected the tile size'),
        ({'tile': -4}, 'tile is -4'),
        ({'overlap': 8}, 'overlap is 8 and tile is 8'),
        ({'overlap': -1}, 'overlap is -1: expected a number of pixels'),
        ({'blend': 'gauss'}, "blend is 'gauss': expected one of ramp, mean"),
        ({'batch': 0}, 'batch is 0'),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        run_tiled(lambda patch: patch, torch.rand(1, 3, 4, 4), **{'tile': 8, 'overlap': 2, **options})


@pytest.mark.parametrize(
    'function',
    [
        lambda patch: patch[..., 1:, :],
        lambda patch: patch[0],
        lambda patch: patch[..., ::2, ::2],
        lambda patch: patch.repeat(2, 1, 1, 1),
    ],
)
def test_other_shapes_are_named(function):
    for size in (8, 20):
        with pytest.raises(ShapeError, match='expected output'):
            run_tiled(function, torch.rand(1, 3, size, size), 8, 2)
    for shape in ((3, 8, 8), (1, 3, 0, 8)):
        with pytest.raises(ShapeError, match='expects a non-empty image'):
            run_tiled(function, torch.rand(shape), 8, 2)
