"""Tests of PSNR and SSIM: the values of the original tools, comparison with scikit-image, invalid images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin.errors import DataError, OptionError, ShapeError
from ast_plugin.metrics import psnr_rgb, psnr_y_float, psnr_y_matlab, ssim_rgb, ssim_y_matlab
from ast_plugin.metrics.psnr_ssim import check_pair, from_toolbox, to_toolbox

# Values of the official tools for the pair to all known digits: MATLAB code in Octave, scikit-image, AST release.
GOLDEN = [
    (psnr_y_matlab, 'calculate_psnr_matlab', 29.8839759207, 10),
    (ssim_y_matlab, 'calculate_ssim_matlab', 0.862211837714, 12),
    (psnr_y_float, 'calculate_psnr_y_float', 29.8938599, 7),
    (psnr_rgb, 'calculate_psnr_skimage', 25.6193239, 7),
    (ssim_rgb, 'calculate_ssim_skimage', 0.90052825, 8),
]
ALL = [row[0] for row in GOLDEN]


@pytest.fixture(scope='module')
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Return the image pair that the original tools measured, RGB, uint8."""
    with np.load(Path(__file__).parents[1] / 'data' / 'metrics_pair0.npz') as arrays:
        return arrays['lq'], arrays['gt']


def calculate(images, **options):
    from basicsr.metrics import calculate_metric

    return calculate_metric(dict(zip(('img', 'img2'), images, strict=True)), options)


def tensors(images, dtype=torch.float32):
    return [torch.from_numpy(image.transpose(2, 0, 1)[None] / np.float32(255)).to(dtype) for image in images]


def noisy(*shape, seed=0):
    generator = np.random.default_rng(seed)
    clean = generator.random(shape)
    return (clean + 0.1 * generator.standard_normal(shape)).clip(0, 1), clean


@pytest.mark.parametrize(('measure', 'name', 'figure', 'digits'), GOLDEN)
def test_figures_of_the_pair(pair, measure, name, figure, digits):
    bgr = [image[..., ::-1] for image in pair]
    # As 8-bit arrays, as tensors in [0, 1], and as called by BasicSR's validation, rounded and unrounded.
    for value in (
        measure(*pair),
        measure(*tensors(pair)),
        calculate(bgr, type=name),
        calculate((bgr[0] * np.float32(1), bgr[1]), type=name, better='higher'),
    ):
        assert round(value, digits) == figure
    sixteen, double = [image.astype(np.uint16) * 257 for image in pair], [image / 255 for image in pair]
    for images in (sixteen, double, (sixteen[0], pair[1]), tensors(pair, torch.float64)):
        assert measure(*images) == pytest.approx(figure, abs=2e-6)
    assert measure(tensors(pair, torch.float16)[0], pair[1]) == pytest.approx(figure, abs=0.05)


@pytest.mark.parametrize('shape', [(7, 7, 3), (7, 40, 3), (33, 20, 3), (64, 50)])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_scikit_images_definitions(shape, dtype):
    image, clean = (values.astype(dtype) for values in noisy(*shape))
    axis = 2 if len(shape) == 3 else None
    assert psnr_rgb(image, clean) == pytest.approx(peak_signal_noise_ratio(clean, image, data_range=1), rel=1e-9)
    expected = structural_similarity(image, clean, channel_axis=axis, data_range=1)
    assert ssim_rgb(image, clean) == pytest.approx(expected, abs=1e-12 if dtype == np.float64 else 1e-7)


def test_equal_images(pair):
    assert [measure(pair[1], pair[1]) for measure in ALL] == [math.inf, 1, math.inf, math.inf, 1]


def test_gray_images(pair):
    gray = [image[..., 1] for image in pair]
    for measure in (psnr_y_matlab, ssim_y_matlab, psnr_rgb, ssim_rgb):
        assert measure(*gray) == measure(*(image[..., None] for image in gray))
    with pytest.raises(ShapeError, match='expects RGB'):
        psnr_y_float(*gray)


ZERO = np.zeros((16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ('image', 'reference', 'error', 'message'),
    [
        (ZERO, np.zeros((16, 17, 3), np.uint8), ShapeError, '16x16.*17x16'),
        (ZERO, ZERO[..., 0], ShapeError, '3 channels.*1 channel'),
        (np.zeros((16, 16, 4), np.uint8), np.zeros((16, 16, 4), np.uint8), ShapeError, r'the image is \[16, 16, 4\]'),
        (ZERO[:0], ZERO[:0], ShapeError, 'not empty'),
        (ZERO.astype(np.int32), ZERO, ShapeError, 'the image has dtype int32'),
        (np.zeros((16, 16, 3)), np.full((16, 16, 3), 255.0), DataError, r'the reference has values from 255 to 255'),
        (np.full((16, 16, 3), np.nan), ZERO, DataError, 'from nan to nan'),
        (np.full((16, 16, 3), -0.1), ZERO, DataError, r'expected \[0, 1\]'),
        (torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16), ShapeError, r'a tensor \[2, 3, 16, 16\]'),
        ([[1]], [[1]], ShapeError, 'is a list'),
    ],
)
def test_what_is_no_pair_of_images(image, reference, error, message):
    with pytest.raises(error, match=message):
        check_pair(image, reference)


def test_metrics_check_their_images():
    for measure in ALL:
        with pytest.raises(ShapeError, match='expected the same size'):
            measure(ZERO, ZERO[1:])
    for measure, least in ((ssim_rgb, 7), (ssim_y_matlab, 11)):
        with pytest.raises(ShapeError, match=f'16x{least - 1} pixels: SSIM needs at least {least}'):
            measure(ZERO[: least - 1], ZERO[: least - 1])
        assert measure(ZERO[:least], ZERO[:least]) == 1


def test_levels_survive_the_way_to_basicsr():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1) * np.ones(3, np.uint8)
    levels[..., 2] = 7
    for image in (levels, levels / np.float32(255), levels / 255):
        there = to_toolbox(image)
        assert there.dtype == image.dtype and there[..., 0].max() == pytest.approx(7)
        np.testing.assert_array_equal(from_toolbox(there), image)


def test_options_that_basicsrs_metrics_have(pair):
    bgr, name = [np.ascontiguousarray(image[..., ::-1]) for image in pair], 'calculate_psnr_skimage'
    expected = psnr_rgb(*(image[8:-8, 8:-8] for image in pair))
    assert calculate(bgr, type=name, crop_border=8) == expected
    planes = [image.transpose(2, 0, 1) for image in bgr]
    assert calculate(planes, type=name, crop_border=8, input_order='CHW') == expected
    gray = [image[..., 0] for image in pair]
    assert calculate(gray, type='calculate_ssim_matlab') == ssim_y_matlab(*gray)


@pytest.mark.parametrize(
    ('image', 'options', 'error', 'message'),
    [
        (ZERO, {'crop_border': -1}, OptionError, 'crop_border is -1'),
        (ZERO, {'crop_border': 8}, ShapeError, 'leaves nothing of an image of 16x16'),
        (ZERO, {'input_order': 'WHC'}, OptionError, "input_order is 'WHC'"),
        (np.array([[[0.0, 256, 0]]]), {}, DataError, 'values from 0 to 256'),
    ],
)
def test_what_basicsr_may_not_ask_for(image, options, error, message):
    with pytest.raises(error, match=message):
        from_toolbox(image, **options)
