"""`basicsr measure`: agreement with other tools, definitions found from published values, and images that fail."""

import csv

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ast_plugin.metrics import ssim_y_matlab
from ast_plugin.metrics.psnr_ssim import KNOWN, Definition, all_definitions, gives, mean_over_images, measure

SIZES = [(48, 40), (37, 50), (40, 40)]


@pytest.fixture
def folders(tmp_path):
    """Three pairs; restored images have a suffix, one is in a subfolder, and extensions differ."""
    rng = np.random.default_rng(3)
    for number, (height, width) in enumerate(SIZES):
        clean = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), 'uint8'), (0, 0), 2)
        noisy = np.clip(clean + rng.normal(0, 4 + 4 * number, clean.shape), 0, 255).astype('uint8')
        for folder, image, name in (('gt', clean, f'{number}.png'), ('out', noisy, f'{number}_net.tif')):
            path = tmp_path / folder / ('deep' if number == 2 else '') / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return tmp_path


@pytest.fixture
def measured(basicsr, folders):
    """Measure `out` against `gt`, and return the output."""

    def run(*more, status=0):
        arguments = [folders / 'out', folders / 'gt', '--restored-template', '{}_net', *more]
        return basicsr('measure', *arguments, status=status)[0]

    return run


def _pairs(folder):
    for name in ('0', '1', 'deep/2'):
        yield tuple(np.asarray(Image.open(folder / where)) for where in (f'out/{name}_net.tif', f'gt/{name}.png'))


def test_measure_as_scikit_image(folders, measured):
    shown = measured('--csv', folders / 'new/each.csv', '--markdown', folders / 'table.md')
    with (folders / 'new/each.csv').open() as file:
        rows = {row['image']: row for row in csv.DictReader(file)}
    for name, (image, gt) in zip(('0', '1', 'deep/2'), _pairs(folders), strict=True):
        row = rows[name]
        assert float(row['restored psnr_rgb']) == pytest.approx(peak_signal_noise_ratio(gt, image), rel=1e-13)
        similarity = structural_similarity(gt, image, channel_axis=2)
        assert float(row['restored ssim_rgb_uniform']) == pytest.approx(similarity, rel=1e-11)
        assert float(row['restored ssim_luma_matlab_gaussian']) == pytest.approx(ssim_y_matlab(image, gt), rel=1e-11)
    assert (folders / 'table.md').read_text().strip() in shown and '3 images' in shown and 'worst: deep/2' in shown


def test_measure_as_basicsr(folders):
    from basicsr.metrics import calculate_psnr, calculate_ssim

    for image, gt in _pairs(folders):
        values = measure(image, gt, all_definitions('psnr', [3]) + all_definitions('ssim', [3]))
        pair = [np.ascontiguousarray(each[..., ::-1]) for each in (image, gt)]
        for calculate, metric, window, near in (
            (calculate_psnr, 'psnr', '', 1e-6),
            (calculate_ssim, 'ssim', 'gaussian', 1e-4),
        ):
            for channels, luma in (('rgb', False), ('luma', True)):
                want = calculate(*pair, crop_border=3, test_y_channel=luma)
                assert values[Definition(metric, channels, window, 3)] == pytest.approx(want, rel=near)


@pytest.mark.parametrize(
    'definition', [next(iter(KNOWN)), [*KNOWN][-1], Definition('psnr', 'rgb', '', 4, True)], ids=str
)
def test_like_finds_the_definition(definition, folders, measured):
    values = [measure(*pair, [definition])[definition] for pair in _pairs(folders)]
    figure = f'{mean_over_images(values, definition.is_pooled):.6f}'
    assert f'  {definition}' in measured('--like', figure).replace(f' ({KNOWN.get(definition)})', '')


def test_like_a_figure_that_nothing_gives(tmp_path, basicsr):
    """With a border of 6, only uniform windows fit into the images, and both images are equal there."""
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 3), 'uint8')
    images[1, 6:14, 6:14] = images[0, 6:14, 6:14]
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f'{number}.png')
    out, _ = basicsr('measure', tmp_path / '0.png', tmp_path / '1.png', '--like', '0.99995', status=1)
    first, *shown = out.splitlines()
    assert first == 'no definition yields 0.99995; nearest:'
    assert [line.split()[0] for line in shown] == ['1.0000000'] * 5


def test_gain_and_single_images(folders, basicsr):
    clean = folders / 'gt'
    shown, _ = basicsr('measure', clean, clean, '--input', folders / 'out', '--input-template', '{}_net')
    assert '| psnr_rgb' in shown and 'inf' in shown and 'input' in shown
    assert '1 image\n' in basicsr('measure', folders / 'out/0_net.tif', clean / '0.png')[0]


def test_images_that_cannot_be_measured(folders, measured):
    image = np.asarray(Image.open(folders / 'out/0_net.tif'))
    Image.fromarray(image[:-1]).save(folders / 'out/0_net.tif')
    Image.fromarray(np.dstack([image[..., 0]] * 4)).save(folders / 'out/3_net.png')
    Image.fromarray(image[..., 0]).save(folders / 'out/4_net.png')
    (folders / 'out/5_net.png').write_bytes(b'no image')
    for folder, name in (('out', '7_net'), ('gt', '7')):
        Image.fromarray(image[:9]).save(folders / folder / f'{name}.png')
    (folders / 'out/6_net.png').write_bytes(b'no partner')
    for number in (3, 4, 5):
        Image.fromarray(image).save(folders / f'gt/{number}.png')
    shown = measured(status=1)
    words = '47x40x3 and 48x40x3|3_net.png has an alpha channel|48x40 and 48x40x3|5_net.png|2 images|too small for ssim'
    assert [each for each in words.split('|') if each not in shown] == []
    assert 'not measured: 1 of restored without a partner: 6' in shown


def test_16_bits_keep_their_depth():
    rng = np.random.default_rng(1)
    gt = rng.integers(0, 65536, (20, 30, 3), 'uint16')
    image = np.clip(gt.astype(int) + 40, 0, 65535).astype('uint16')
    (value,) = measure(image, gt, [Definition('psnr', 'rgb')]).values()
    assert value == pytest.approx(peak_signal_noise_ratio(gt, image, data_range=65535), rel=1e-12)


@pytest.mark.parametrize(
    'figure, value, how',
    [('31.87', 31.8749, 'rounded'), ('31.87', 31.8751, 'cut off'), ('31.87', 31.8649, None), ('32', 32.4, 'rounded')],
)
def test_gives(figure, value, how):
    assert gives(figure, value) == how
