"""Crops, reflection padding, flips and conversion to tensors."""

import numpy as np
import pytest
import torch

from ast_plugin.data import transforms


def coordinates(height: int, width: int) -> np.ndarray:
    """Return an image that encodes positions: [H, W, 3] of row, column, 0."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint16)


@pytest.mark.parametrize(('height', 'width', 'size'), [(7, 9, 4), (5, 5, 5), (3, 9, 4)])
def test_every_offset_is_drawn_and_no_other(height, width, size):
    generator = np.random.default_rng(0)
    drawn = {transforms.random_offset((height, width), size, generator) for _ in range(2000)}
    tops, lefts = (range(max(length - size, 0) + 1) for length in (height, width))
    assert drawn == {(top, left) for top in tops for left in lefts}


@pytest.mark.parametrize('shape', [(1, 1), (1, 5), (5, 1), (2, 3), (3, 20)])
@pytest.mark.parametrize(('top', 'left'), [(0, 0), (-3, 2), (-9, -9)])
def test_window_reflects_as_numpy_does(shape, top, left):
    image = coordinates(*shape)
    size = 8
    pads = [(max(-start, 0), max(start + size - length, 0)) for start, length in zip((top, left), shape, strict=True)]
    padded = np.pad(image, [*pads, (0, 0)], mode='reflect')
    start = (top + pads[0][0], left + pads[1][0])
    expected = padded[start[0] : start[0] + size, start[1] : start[1] + size]
    assert np.array_equal(transforms.window(image, top, left, size, size), expected)


def test_crops_and_flips_keep_partners_aligned():
    for seed in range(50):
        images = [coordinates(11, 17), coordinates(11, 17) + 100]
        generator = np.random.default_rng(seed)
        lq, gt = transforms.random_flip(transforms.random_crop(images, 8, generator), True, True, generator)
        assert lq.shape == (8, 8, 3)
        assert np.array_equal(lq + 100, gt)


@pytest.mark.parametrize(('use_hflip', 'use_rot', 'count'), [(0, 0, 1), (1, 0, 2), (0, 1, 4), (1, 1, 8)])
def test_symmetries(use_hflip, use_rot, count):
    image, generator, plain = coordinates(3, 3), np.random.default_rng(0), np.random.default_rng(0)
    turned = {transforms.random_flip([image], use_hflip, use_rot, generator)[0].tobytes() for _ in range(300)}
    assert len(turned) == count
    for _ in range(300):
        transforms.random_flip([image], False, False, plain)
    assert generator.random() == plain.random()  # the number of draws does not depend on the switches
    if not use_rot:
        assert turned <= {image.tobytes(), image[:, ::-1].tobytes()}


@pytest.mark.parametrize(('size', 'shape', 'corner'), [(4, (4, 4), (2, 3)), (9, (8, 9), (0, 0)), (99, (8, 10), (0, 0))])
def test_center_crop(size, shape, corner):
    (image,) = transforms.center_crop([coordinates(8, 10)], size)
    assert image.shape[:2] == shape
    assert tuple(image[0, 0, :2]) == corner


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_tensor_keeps_every_level(dtype):
    top = np.iinfo(dtype).max
    levels = np.linspace(0, top, 768).astype(dtype).reshape(16, 16, 3)[::-1].swapaxes(0, 1)
    tensor, kept = transforms.to_tensor(levels), transforms.to_tensor(levels, keep_uint8=True)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 16, 16)
    assert tensor.min() == 0 and tensor.max() == 1
    assert np.array_equal((tensor.double() * top).round().numpy().transpose(1, 2, 0), levels)
    assert kept.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert tensor.is_contiguous() and kept.is_contiguous()
    assert transforms.to_unit_range(kept).equal(tensor) and transforms.to_unit_range(tensor) is tensor
    kept.zero_()
    assert levels.any(), 'the tensor must not share memory with the image, which may be a file'


@pytest.mark.parametrize('deep', [[], [1], [0, 1, 2]])
def test_a_batch_of_several_depths(deep):
    eight, sixteen = np.full((4, 4, 3), 51, np.uint8), np.full((4, 4, 3), 51 * 257, np.uint16)
    tensors = [transforms.to_tensor(sixteen if number in deep else eight, True) for number in range(3)]
    batch = transforms.collate([{'lq': tensor, 'gt': tensor, 'lq_path': 'x'} for tensor in tensors])
    assert batch['lq'].dtype == (torch.float32 if deep else torch.uint8) and batch['lq_path'] == ['x'] * 3
    assert torch.allclose(transforms.to_unit_range(batch['gt']), torch.full((3, 3, 4, 4), 0.2))


def test_camera_noise():
    def add(*images, noise, quality):
        return transforms.add_camera_noise(images, np.random.default_rng(0), (noise, noise), quality)

    images = [np.full((64, 64, 3), value, np.float32) for value in (0.3, 0.6)]
    noisy = add(*images, noise=10, quality=(100, 100))
    changes = [image - clean for image, clean in zip(noisy, images, strict=True)]
    assert np.corrcoef(changes[0].ravel(), changes[1].ravel())[0, 1] > 0.9
    assert all(image.dtype == np.float32 and np.allclose(255 * image, np.rint(255 * image)) for image in noisy)
    colours = np.tile(np.float32([0.1, 0.5, 0.9]), (16, 16, 1))  # compression must not exchange channels
    assert np.abs(add(colours, noise=0, quality=(90, 100))[0] - colours).max() < 0.02
    texture = np.random.default_rng(1).random((32, 32, 3), np.float32)
    fine, coarse = (np.abs(add(texture, noise=0, quality=(q, q))[0] - texture).mean() for q in (95, 30))
    assert fine < coarse
