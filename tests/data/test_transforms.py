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
    levels = np.linspace(0, top, 48).astype(dtype).reshape(4, 4, 3)
    tensor = transforms.to_tensor(levels[::-1].swapaxes(0, 1))
    assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.shape == (3, 4, 4)
    assert tensor.min() == 0 and tensor.max() == 1
    back = (tensor.double() * top).round().numpy().astype(dtype).transpose(1, 2, 0)
    assert np.array_equal(back, levels[::-1].swapaxes(0, 1))


def test_bytes_become_the_floats_of_the_file():
    levels = np.arange(256, dtype=np.uint8).reshape(8, 32, 1).repeat(3, axis=2)
    kept = transforms.to_tensor(levels, keep_uint8=True)
    assert kept.dtype == torch.uint8 and kept.is_contiguous()
    assert transforms.to_unit_range(kept).equal(transforms.to_tensor(levels))
    floats = torch.rand(2, 3)
    assert transforms.to_unit_range(floats) is floats
    kept.zero_()
    assert levels.any(), 'the tensor must not share memory with the image, which may be a file'
    deep = np.full((2, 2, 3), 65535, np.uint16)
    assert transforms.to_tensor(deep, keep_uint8=True).equal(torch.ones(3, 2, 2))


@pytest.mark.parametrize('deep', [[], [1], [0, 1, 2]])
def test_a_batch_of_several_depths(deep):
    images = [
        np.full((4, 4, 3), 51 * (257 if n in deep else 1), np.uint16 if n in deep else np.uint8) for n in range(3)
    ]
    samples = [
        {'lq': transforms.to_tensor(i, True), 'gt': transforms.to_tensor(i, True), 'lq_path': 'x'} for i in images
    ]
    batch = transforms.collate(samples)
    assert batch['lq'].dtype == (torch.float32 if deep else torch.uint8) and batch['lq_path'] == ['x'] * 3
    assert torch.allclose(transforms.to_unit_range(batch['gt']), torch.full((3, 3, 4, 4), 0.2))


def test_camera_noise():
    images = [np.full((64, 64, 3), value, np.float32) for value in (0.3, 0.6)]
    noisy = transforms.add_camera_noise(images, np.random.default_rng(0), (10, 10), (100, 100))
    changes = [image - clean for image, clean in zip(noisy, images, strict=True)]
    assert np.corrcoef(changes[0].ravel(), changes[1].ravel())[0, 1] > 0.9
    assert all(image.dtype == np.float32 and np.allclose(255 * image, np.rint(255 * image)) for image in noisy)
    colours = np.zeros((16, 16, 3), np.float32)
    colours[...] = 0.1, 0.5, 0.9  # compression must not exchange channels
    (same,) = transforms.add_camera_noise([colours], np.random.default_rng(0), (0, 0), (90, 100))
    assert np.abs(same - colours).max() < 0.02
    texture = np.random.default_rng(1).random((32, 32, 3), np.float32)
    fine, coarse = (
        transforms.add_camera_noise([texture], np.random.default_rng(0), (0, 0), (q, q))[0] for q in (95, 30)
    )
    assert np.abs(fine - texture).mean() < np.abs(coarse - texture).mean()
