"""Training, validation, writing and measuring with gray pairs for single-channel networks, and with 16-bit images."""

import csv
import re

import cv2
import numpy as np
import pytest
import yaml

from ast_plugin import options
from ast_plugin.archs.networks import input_channels
from ast_plugin.cli.main import main
from ast_plugin.data.image_files import read_image
from ast_plugin.data.pairs_dataset import PairsDataset, SyntheticPairsDataset
from ast_plugin.errors import OptionError
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.evaluation.restorer import Restorer
from ast_plugin.metrics.psnr_ssim import (
    LUMA,
    from_toolbox,
    psnr_rgb,
    psnr_y_matlab,
    ssim_y_matlab,
    to_integers,
    to_toolbox,
)
from ast_plugin.metrics.registered_metrics import calculate_psnr_matlab, calculate_ssim_matlab, complete
from tests import tiny_run

METRICS = {
    'psnr': {'type': 'calculate_psnr', 'crop_border': 0},
    'ssim': {'type': 'calculate_ssim', 'crop_border': 0},
    'rgb': {'type': 'calculate_psnr_skimage'},
    'matlab': {'type': 'calculate_psnr_matlab'},
}
SIZE = (20, 24)


def network(channels):
    sizes = {'num_feat': 4, 'num_conv': 1, 'upscale': 1, 'num_in_ch': channels, 'num_out_ch': channels}
    return {'type': 'SRVGGNetCompact', **sizes}


def write_pairs(folder, channels, bits, suffix='png'):
    """Write two pairs of noise whose degraded images differ by a few levels; gray files for one channel."""
    generator, largest = np.random.default_rng(0), 2**bits - 1
    for number in range(2):
        clean = generator.integers(0, largest + 1, SIZE if channels == 1 else (*SIZE, 3))
        lq = np.clip(clean + generator.integers(-9, 10, clean.shape), 0, largest)
        for kind, image in (('lq', lq), ('gt', clean)):
            (folder / kind).mkdir(exist_ok=True)
            cv2.imwrite(str(folder / kind / f'{number}.{suffix}'), image.astype(f'uint{bits}'))


def option_file(folder, source, channels, **top):
    """Run two iterations with one validation that writes images."""
    if source == 'synthetic':
        places = {'type': 'SyntheticPairsDataset', 'source': 'folder', 'split': 'all'}
        places['dataroot_gt'] = str(folder / 'gt')
    else:
        ending = '' if source == 'folders' else '.lmdb'
        if ending:
            assert main(['data', 'lmdb', str(folder), str(folder / 'packed'), '--encoding', source]) == 0
        root = folder / 'packed' if ending else folder
        places = {f'dataroot_{kind}': str(root / f'{kind}{ending}') for kind in ('lq', 'gt')}
        places |= {'type': 'PairsDataset', 'io_backend': {'type': 'lmdb' if ending else 'disk'}}
    opt = yaml.safe_load(tiny_run.OPTIONS) | {'model_type': 'RestorationModel', 'network_g': network(channels)}
    train = {'name': 'train', 'gt_size': 16, 'batch_size_per_gpu': 2, 'num_worker_per_gpu': 0}
    opt['datasets'] = {'train': {**train, **places}, 'val': {'name': 'val', **places}}
    opt['train']['total_iter'] = 2
    opt['val'] = {'val_freq': 2, 'save_img': True, 'metrics': METRICS}
    (folder / 'o.yml').write_text(yaml.safe_dump({**opt, **top}))
    return folder / 'o.yml'


def psnr(image, other, peak):
    difference = image.astype(float) - other.astype(float)
    return 10 * np.log10(peak**2 / np.mean(difference**2))


@pytest.mark.parametrize(
    ('source', 'channels', 'bits'), [('folders', 1, 8), ('png', 3, 16), ('raw', 1, 16), ('synthetic', 3, 16)]
)
def test_run_keeps_channels_and_depth(tmp_path, source, channels, bits):
    write_pairs(tmp_path, channels, bits)
    top = {'bit_depth': bits} if bits == 16 else {}
    file = option_file(tmp_path, source, channels, **top)
    for command in ('check', 'train'):
        assert main([command, '-opt', str(file), '--root', str(tmp_path)]) == 0
    experiment = tmp_path / 'experiments' / 'tiny'
    rows = list(csv.DictReader((experiment / 'metrics.csv').open()))
    figures = {key.rpartition('/')[2]: float(value) for key, value in rows[-1].items() if value and 'val' in key}
    peak, found = 2**bits - 1, {name: [] for name in ('psnr', 'matlab')}
    for number in range(2):
        (written,) = experiment.glob(f'visualization/{number}*/*.png')
        image, clean = read_image(written).color, read_image(tmp_path / 'gt' / f'{number}.png').color
        assert image.dtype == clean.dtype == np.dtype(f'uint{bits}') and image.shape == clean.shape
        assert bits == 8 or (image % 257).any()  # not of 8 bits made wider
        found['psnr'].append(psnr(image, clean, peak))
        planes = [image, clean]
        if channels == 3:
            planes = [np.floor(each @ (LUMA / 255) + 16 * peak / 255 + 0.5) for each in planes]
        found['matlab'].append(psnr(*planes, peak))
    assert figures['psnr'] == pytest.approx(np.mean(found['psnr']), abs=2e-4)
    assert figures['matlab'] == pytest.approx(np.mean(found['matlab']), abs=2e-4)
    assert figures['rgb'] == pytest.approx(figures['psnr'], abs=2e-3)
    best = experiment / 'models' / 'net_g_best.safetensors'
    restorer = Restorer.from_weights(best, network=network(channels), device='cpu')
    restored = restorer.restore(read_image(tmp_path / 'lq' / '0.png').color)
    assert restored.dtype == np.dtype(f'uint{bits}') and restored.ndim == (2 if channels == 1 else 3)


def dataset(folder, **more):
    places = {'dataroot_lq': str(folder / 'lq'), 'dataroot_gt': str(folder / 'gt')}
    return PairsDataset({'name': 'a', 'type': 'PairsDataset', 'phase': 'val', 'scale': 1, **places, **more})


@pytest.mark.parametrize('bits', [8, 16])
def test_colours_become_luma(tmp_path, bits):
    write_pairs(tmp_path, 3, bits)
    sample = dataset(tmp_path, in_chans=1)[0]
    for kind in ('lq', 'gt'):
        color = read_image(tmp_path / kind / '0.png').color.astype(float)
        expected = color @ [0.299, 0.587, 0.114]
        assert sample[kind].shape == (1, *SIZE)
        assert np.abs(sample[kind][0].numpy() * (2**bits - 1) - expected).max() <= 0.51


@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('suffix', ['png', 'tiff'])
def test_gray_files_are_equal_channels(tmp_path, suffix, bits):
    write_pairs(tmp_path, 1, bits, suffix)
    three, one = dataset(tmp_path, bit_depth=bits)[0], dataset(tmp_path, bit_depth=bits, in_chans=1)[0]
    assert three['gt'].shape == (3, *SIZE) and (three['gt'] == one['gt']).all()
    gray = cv2.imread(str(tmp_path / 'gt' / f'0.{suffix}'), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal((one['gt'][0].numpy() * (2**bits - 1)).round(), gray)


def test_synthetic_gray_is_of_its_colours(tmp_path):
    write_pairs(tmp_path, 3, 8)
    opt = {'name': 'a', 'type': 'SyntheticPairsDataset', 'phase': 'val', 'scale': 1, 'source': 'folder'}
    opt |= {'dataroot_gt': str(tmp_path / 'gt'), 'split': 'all'}
    color, gray = SyntheticPairsDataset(opt)[0], SyntheticPairsDataset({**opt, 'in_chans': 1})[0]
    for kind in ('lq', 'gt'):
        expected = (color[kind] * np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]).sum(0)
        np.testing.assert_allclose(gray[kind][0], expected, atol=0.51 / 255)


def prepared(opt, **changes):
    types = {'PairsDataset': PairsDataset, 'Other': object}
    given = {'dataset_types': types, 'length_of': lambda _: 2, 'channels_of': input_channels}
    return options.prepare({**opt, **changes}, **given)['datasets']['train']


@pytest.mark.parametrize(
    ('network_g', 'channels'),
    [
        ({'type': 'AST', 'in_chans': 1}, 1),
        ({'type': 'SwinIR', 'in_chans': 3}, None),
        ({'type': 'AST'}, None),
        ({'type': 'Mixed', 'base': network(1), 'mix': []}, 1),
        ({'type': 'AST', 'in_chans': 4}, None),
    ],
)
def test_channels_follow_the_network(tmp_path, network_g, channels):
    opt = yaml.safe_load(option_file(tmp_path, 'folders', 3).read_text())
    assert prepared(opt, network_g=network_g).get('in_chans') == channels
    opt['datasets']['train']['in_chans'] = 3
    assert prepared(opt, network_g=network_g)['in_chans'] == 3
    assert 'bit_depth' not in prepared(opt) and prepared(opt, bit_depth=16)['bit_depth'] == 16


@pytest.mark.parametrize(
    ('model', 'kind', 'message'),
    [
        ('SRModel', 'PairsDataset', 'SRModel measures and writes 8 bits, bit_depth is 16: use RestorationModel'),
        ('RestorationModel', 'Other', r'train\.type: Other reads 8 bits, bit_depth is 16: use PairsDataset'),
    ],
)
def test_what_reads_8_bits_is_rejected(tmp_path, model, kind, message):
    opt = yaml.safe_load(option_file(tmp_path, 'folders', 3).read_text())
    opt['datasets']['train']['type'] = kind
    with pytest.raises(OptionError, match=message):
        prepared(opt, bit_depth=16, model_type=model)


@pytest.mark.parametrize(
    ('source', 'top', 'message'),
    [
        ('folders', {'bit_depth': 12}, 'bit_depth: expected 8 or 16, got 12'),
        ('folders', {'bit_depth': 16}, r'lq/0\.png: has 8 bits, bit_depth is 16: use 16-bit images, or set'),
        ('raw', {'bit_depth': 16}, r'lq\.lmdb/0\.png: has 8 bits, bit_depth is 16'),
        ('png', {'bit_depth': 16}, r'lq\.lmdb/0\.png: has 8 bits, bit_depth is 16'),
        ('synthetic', {'bit_depth': 16}, r'gt/\d\.png: has 8 bits, bit_depth is 16'),
    ],
)
def test_bad_depth_is_rejected(tmp_path, capfd, source, top, message):
    write_pairs(tmp_path, 3, 8)
    file = option_file(tmp_path, source, 3, **top)
    assert main(['check', '-opt', str(file), '--root', str(tmp_path)]) == 2
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / 'experiments').exists()


def test_output_of_other_channels_is_rejected(tmp_path, capfd):
    write_pairs(tmp_path, 3, 8)
    file = option_file(tmp_path, 'folders', 3, network_g={'type': 'AST_XS', 'img_size': 16, 'out_chans': 1})
    opt = yaml.safe_load(file.read_text())
    del opt['datasets']['val'], opt['val']
    file.write_text(yaml.safe_dump(opt))
    assert main(['check', '-opt', str(file)]) == 2
    assert 'returns [2, 1, 16, 16] for a clean image of [2, 3, 16, 16]' in capfd.readouterr().err


# Metrics of 16 bits


def pair(channels=3):
    generator = np.random.default_rng(3)
    clean = generator.integers(0, 65536, (16, 18, channels), dtype=np.uint16)
    return np.clip(clean.astype(int) + generator.integers(-40, 41, clean.shape), 0, 65535).astype(np.uint16), clean


def test_toolbox_gets_every_level():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    there = to_toolbox(levels)
    assert there.max() == 255.0 and there.dtype == np.float64
    np.testing.assert_array_equal(to_integers(from_toolbox(there), 16), levels)
    np.testing.assert_array_equal(to_integers(levels / np.float32(65535), 16), levels)
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    np.testing.assert_array_equal(to_integers(eight, 16), eight.astype(np.uint16) * 257)


@pytest.mark.parametrize('channels', [1, 3])
def test_metrics_have_the_peak_of_16_bits(channels):
    image, clean = pair(channels)
    metrics = complete({name: options for name, options in METRICS.items() if name != 'ssim'}, bit_depth=16)
    values = read_protocol('basicsr', 16).measure(image, clean, metrics)
    planes = [image, clean]
    if channels == 3:
        planes = [np.floor(each @ (LUMA / 255) + 4112.5) for each in planes]
    assert values['psnr'] == pytest.approx(psnr(image, clean, 65535), abs=1e-9)
    assert values['rgb'] == pytest.approx(psnr(image, clean, 65535), abs=1e-4)
    assert values['matlab'] == pytest.approx(psnr(*planes, 65535), abs=1e-9)
    assert values['matlab'] == pytest.approx(psnr_y_matlab(image, clean, 16), abs=1e-9)
    assert psnr_rgb(image, clean) == pytest.approx(values['rgb'], abs=1e-4)
    # With 8 bits, the default, as before:
    rounded = [np.rint(each / 257).astype(np.uint8) for each in (image, clean)]
    eight = read_protocol('basicsr')
    assert eight.measure(image, clean, METRICS) == eight.measure(*rounded, METRICS)
    assert complete(METRICS) == METRICS


def test_matlab_metrics_take_their_depth():
    image, clean = (to_toolbox(each) for each in pair())
    direct = ssim_y_matlab(*pair(), 16)
    assert calculate_ssim_matlab(image, clean, bit_depth=16) == pytest.approx(direct, abs=1e-12)
    assert calculate_ssim_matlab(image, clean) != direct
    # MATLAB's limits: black is 16 and white 235 of 255, which are 4112 and 60395 of 65535.
    black, white = np.zeros((1, 1, 3)), np.full((1, 1, 3), 255.0)
    assert calculate_psnr_matlab(black, white, bit_depth=16) == pytest.approx(20 * np.log10(65535 / (60395 - 4112)))
