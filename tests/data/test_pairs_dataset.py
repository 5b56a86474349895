"""Datasets of pairs: content and reproducibility of samples, and errors for invalid pairs and photos."""

import itertools
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ast_plugin.data import pairs_dataset
from ast_plugin.data.pairs_dataset import PairsDataset, SyntheticPairsDataset
from ast_plugin.degradations import DEGRADATIONS, Degradation
from ast_plugin.degradations.rain import RainParameters
from ast_plugin.errors import DataError, OptionError

SIZE = (10, 13)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def coordinates(number: int, clean: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """BGR image that encodes 2 * number + clean, column and row; read as RGB: row, column, 2 * number + clean."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([np.full(size, 2 * number + clean), columns, rows], axis=2).astype(np.uint8)


@pytest.fixture
def root(tmp_path) -> Path:
    """Five pairs."""
    for number in range(5):
        write(tmp_path / f'lq/{number}.png', coordinates(number, 0))
        write(tmp_path / f'gt/{number}.png', coordinates(number, 1))
    return tmp_path


@pytest.fixture
def folder(tmp_path) -> str:
    """Twelve photos with a vertical gradient, which makes flips visible."""
    for number in range(12):
        image = np.broadcast_to(np.linspace(40, 120, 60)[:, None, None] + number, (60, 80, 3)).astype(np.uint8)
        write(tmp_path / f'photo{number}.png', image)
    return str(tmp_path)


def pairs(root: Path, **options) -> PairsDataset:
    roots = {'dataroot_lq': str(root / 'lq'), 'dataroot_gt': str(root / 'gt')}
    return PairsDataset({'phase': 'train', 'gt_size': 4, 'batch_size_per_gpu': 2, 'seed': 7, **roots, **options})


def synthetic(**options) -> SyntheticPairsDataset:
    return SyntheticPairsDataset({'phase': 'train', 'gt_size': 48, 'seed': 3, **options})


def decoded(image: torch.Tensor) -> np.ndarray:
    return (image * 255).round().numpy().astype(int)


def test_training_samples(root):
    real, synthesized = pairs(root), synthetic()
    photo = synthesized.photos[3]
    assert len(real) == 5
    for data, lq_path, gt_path in (
        (real, root / 'lq/3.png', root / 'gt/3.png'),
        (synthesized, f'{photo.name}.png', photo.path),
    ):
        sample, size = data[3], data.options.gt_size
        assert set(sample) == {'lq', 'gt', 'lq_path', 'gt_path'}
        assert (sample['lq_path'], sample['gt_path']) == (str(lq_path), str(gt_path))
        for image in (sample['lq'], sample['gt']):
            assert image.shape == (3, size, size) and image.dtype == torch.float32 and image.is_contiguous()
            assert image.min() >= 0 and image.max() <= 1
        assert (sample['lq'] != sample['gt']).any()


@pytest.mark.parametrize('gt_size', [4, 16])
def test_partners_stay_aligned_to_the_pixel(root, gt_size):
    data = pairs(root, gt_size=gt_size)
    for epoch in range(8):
        for position in range(5):
            sample = data[epoch, position]
            lq, gt = decoded(sample['lq']), decoded(sample['gt'])
            assert np.array_equal(lq[:2], gt[:2])
            assert (lq[2] == 2 * position).all() and (gt[2] == 2 * position + 1).all()


@pytest.mark.parametrize('kind', ['pairs', 'synthetic'])
def test_samples_depend_on_seed_and_index(root, kind):
    def content(seed: int, epoch: int, positions: range) -> bytes:
        data = pairs(root, seed=seed) if kind == 'pairs' else synthetic(seed=seed)
        return b''.join(data[epoch, position]['lq'].numpy().tobytes() for position in positions)

    first = content(7, 0, range(3))
    assert first == content(7, 0, range(3))
    others = {content(8, 0, range(3)), content(7, 1, range(3)), content(7, 0, range(10, 13))}
    assert len(others | {first}) == 4
    data = pairs(root)
    assert torch.equal(data[2]['lq'], data[0, 2]['lq'])
    assert data[0, 7]['lq_path'] == data[2]['lq_path']


@pytest.mark.parametrize('phase', ['val', 'test'])
def test_validation_takes_whole_images_or_centres(root, phase):
    whole = pairs(root, phase=phase)[1]
    assert np.array_equal(decoded(whole['gt']), coordinates(1, 1).transpose(2, 0, 1)[::-1])
    centre = pairs(root, phase=phase, center_crop=4)[1]
    assert torch.equal(centre['lq'], whole['lq'][:, 3:7, 4:8])
    assert torch.equal(pairs(root, phase=phase, center_crop=99)[1]['lq'], whole['lq'])


def test_iteration_ends_and_the_dataset_travels(root):
    data = pairs(root)
    assert len(list(data)) == 5
    with pytest.raises(IndexError, match='5 images'):
        data[5]
    assert torch.equal(pickle.loads(pickle.dumps(data))[0]['lq'], data[0]['lq'])


@pytest.mark.parametrize('workers', [0, 1])
def test_different_sizes_name_both_files(root, workers):
    write(root / 'gt/4.png', coordinates(4, 1, (10, 12)))
    samples = iter(DataLoader(pairs(root), num_workers=workers))
    with pytest.raises(DataError) as caught:
        list(samples)
    list(samples)  # ends the worker, for which torch otherwise waits five seconds
    message = str(caught.value)
    assert message.startswith('datasets.train: ') and 'Traceback' not in message
    assert f'{root}/lq/4.png has 13x10' in message and f'{root}/gt/4.png has 12x10' in message


@pytest.mark.parametrize('content', [b'', b'not an image', None])
def test_an_unreadable_file_names_the_pair(root, content):
    broken = root / 'lq/2.png'
    broken.write_bytes((root / 'lq/2.png').read_bytes()[:40] if content is None else content)
    data = pairs(root, phase='val')
    with pytest.raises(DataError) as caught:
        data[2]
    assert all(part in str(caught.value) for part in ('datasets.val: ', str(broken), str(root / 'gt/2.png')))
    data[1]


BAD_OPTIONS = {  # by dataset
    PairsDataset: [
        ({'gt_sise': 4}, r'datasets\.train\.gt_sise: unknown key, did you mean gt_size'),
        ({'gt_size': 0}, r'datasets\.train\.gt_size: expected 1 or more, got 0'),
        ({'gt_size': None}, 'training requires gt_size'),
        ({'scale': 2}, r'datasets\.train\.scale'),
        ({'io_backend': {'type': 'memcached'}}, r'datasets\.train\.io_backend\.type: .*disk'),
        ({'dataroot': 'x'}, 'does not use dataroot'),
        ({'layout': 'Spad', 'dataroot_lq': None, 'dataroot_gt': None}, 'did you mean spad'),
        ({'use_rot': 'sometimes'}, r'datasets\.train\.use_rot'),
        ({'gt_size': -1, 'gt_sizes': 3}, r'(?s)gt_size: .*\n.*gt_sizes: '),  # all errors at once
    ],
    SyntheticPairsDataset: [
        ({'degradation': {'type': 'fog'}}, r'datasets\.train\.degradation.*rain'),
        ({'degradation': []}, r'datasets\.train\.degradation: .* or 1 items or more, got the list'),
        ({'degradation': 'rain'}, r"datasets\.train\.degradation: .*got the text 'rain'"),
        ({'degradation': [{}, {'type': 'haze', 'psnr': 3}]}, r'datasets\.train\.degradation\.1\.psnr: expected a list'),
        ({'degradation': {'type': 'raindrop', 'covrage': 3}}, r'covrage: unknown key, did you mean coverage'),
        ({'source': 'folder'}, 'dataroot_gt'),
        ({'dataroot_gt': 'x'}, 'source: folder'),
        ({'split': 'test'}, r'datasets\.train\.split'),
        ({'photos': []}, r'datasets\.train\.photos'),
        ({'shorter_side': [47, 90]}, r'shorter_side: \[47, 90\] is smaller than gt_size: 48'),
        ({'io_backend': {'type': 'lmdb'}}, r'datasets\.train\.io_backend\.type: '),
    ],
}


@pytest.mark.parametrize(
    ('dataset', 'options', 'expected'), [(dataset, *row) for dataset, rows in BAD_OPTIONS.items() for row in rows]
)
def test_bad_options_name_the_key(dataset, options, expected):
    roots = {'dataroot_lq': 'lq', 'dataroot_gt': 'gt'} if dataset is PairsDataset else {}
    with pytest.raises(OptionError, match=expected):
        dataset({'phase': 'train', 'gt_size': 48, **roots, **options})


def test_validation_on_photos_never_changes():
    one, other = synthetic(phase='val', seed=1), synthetic(phase='val', seed=2)
    assert not {photo.name for photo in one.photos} & {photo.name for photo in synthetic().photos}
    assert torch.equal(one[0]['lq'], other[5, 0]['lq'])
    photo = cv2.imread(one[1]['gt_path'])
    assert np.array_equal(decoded(one[1]['gt']), photo[..., ::-1].transpose(2, 0, 1))


def test_pairs_of_a_photo_have_own_names():
    data = synthetic(phase='val', num_per_photo=3, center_crop=32)
    samples = list(data)
    assert len(samples) == 3 * len(data.photos)
    assert len({sample['lq_path'] for sample in samples}) == len(data)
    assert len({sample['lq'].numpy().tobytes() for sample in samples}) == len(data)
    assert samples[0]['gt'].shape == (3, 32, 32) and torch.equal(samples[0]['gt'], samples[2]['gt'])


def test_rain_falls_down_in_flipped_photos(folder):
    rain = {'angle': [20, 20], 'angle_spread': 0, 'veil': [0, 0]}
    streaks = synthetic(photos=['rocket'], gt_size=96, degradation=rain)
    for epoch in range(6):
        sample = streaks[epoch, 0]
        layer = ((sample['lq'] - sample['gt']) / (1 - sample['gt']).clamp(min=0.05)).mean(dim=0).numpy()
        dx, dy = cv2.Sobel(layer, cv2.CV_32F, 1, 0), cv2.Sobel(layer, cv2.CV_32F, 0, 1)
        assert float((dx * dy).sum()) < 0  # inclined to the same side, whatever the flip
    data = synthetic(source='folder', dataroot_gt=folder, split='all')
    patches = [data[epoch, 0]['gt'] for epoch in range(20)]
    falls = {float(torch.sign(gt[0, -1, 0] - gt[0, 0, 0])) for gt in patches}
    assert len(falls) == 3  # down, up, and across


def test_each_pair_gets_one_degradation(monkeypatch):
    for number, name in enumerate(('rain', 'snow')):
        degradation = DEGRADATIONS[name]
        apply = partial(lambda level, image, *_: (0 * image + level, None), np.float32(number))
        monkeypatch.setitem(DEGRADATIONS, name, replace(degradation, apply=apply))
    several = {'degradation': [{}, {'type': 'snow'}], 'gt_size': 32}
    levels = [float(synthetic(**several, num_per_photo=10)[number]['lq'].mean()) for number in range(40)]
    assert set(levels) == {0, 1} and 10 <= sum(levels) <= 30
    data = synthetic(**several, phase='val', center_crop=32, num_per_photo=2)
    assert [float(data[number]['lq'].mean()) for number in range(4)] == [0, 1, 1, 0]  # two photos, in turn


def test_a_margin_is_cut_off_again(folder, monkeypatch):
    shapes = []

    def apply(image, generator, parameters):
        shapes.append(image.shape)
        return image, image[..., 0]

    monkeypatch.setitem(DEGRADATIONS, 'rain', Degradation(RainParameters, apply, margin=5))
    data = synthetic(source='folder', dataroot_gt=folder, gt_size=20)
    samples = [data[epoch, 0] for epoch in range(30)]
    assert set(shapes) == {(30, 30, 3)}
    assert all(torch.equal(sample['lq'], sample['gt']) and sample['lq'].shape == (3, 20, 20) for sample in samples)


def test_photos_are_decoded_once_while_they_fit(folder, monkeypatch):
    image = np.zeros((60, 80, 3), np.uint8)
    read = Mock(return_value=image)
    monkeypatch.setattr(pairs_dataset, 'read_rgb', read)
    data = synthetic(source='folder', dataroot_gt=folder, split='all')
    for number, limit, num_reads in ((0, pairs_dataset.CACHE_BYTES, 1), (1, image.nbytes + 1, 4)):
        monkeypatch.setattr(pairs_dataset, 'CACHE_BYTES', limit)
        for _ in range(3):
            data[number]
        assert read.call_count == num_reads


def test_an_unreadable_photo_names_phase_and_file(folder):
    Path(folder, 'photo0.png').write_bytes(b'nothing')
    with pytest.raises(DataError, match=r'datasets\.train: .*photo0\.png'):
        synthetic(source='folder', dataroot_gt=folder, photos=['photo0'])[0]


def patches(**options) -> list[dict]:
    data = synthetic(**{'seed': 0, 'gt_size': 32, 'num_per_photo': 20, 'clean_share': 1, **options})
    return [data[number] for number in range(40)]


def test_some_patches_stay_clean_or_get_darker():
    darker, plain = patches(clean_share=0.4, gamma=[1.5, 2.5]), patches(clean_share=0.4)
    assert 6 <= sum(torch.equal(sample['lq'], sample['gt']) for sample in darker) <= 28
    changes = [float(dark['gt'].mean() - other['gt'].mean()) for dark, other in zip(darker, plain, strict=True)]
    assert np.mean(changes) < -0.05


def test_channels_of_some_patches_are_permuted():
    changed = 0
    for sample, plain in zip(patches(rgb_permute=0.6), patches(), strict=True):
        assert torch.equal(sample['lq'], sample['gt'])
        orders = itertools.permutations(range(3))
        assert any(torch.equal(sample['gt'], plain['gt'][list(order)]) for order in orders)
        changed += not torch.equal(sample['gt'], plain['gt'])
    assert 10 <= changed <= 30  # one in six random orders is the original


def test_photos_are_downscaled_to_a_shorter_side(tmp_path):
    write(tmp_path / 'a.png', np.tile(np.arange(200, dtype=np.uint8)[None, :, None], (100, 1, 3)))
    options = {'source': 'folder', 'dataroot_gt': str(tmp_path), 'split': 'all', 'gt_size': 25}
    steps = []  # the brightness rises by 1 per pixel at full resolution
    for sides in (None, [25, 25], [50, 60]):
        data = synthetic(**options, seed=0, num_per_photo=20, use_rot=False, shorter_side=sides)
        steps.append([255 * data[number]['gt'].diff(dim=-1).abs().mean().item() for number in range(20)])
    assert max(steps[0]) < 1.01 and min(steps[1]) > 3.7
    assert 1.6 < min(steps[2]) < 1.75 and 1.85 < max(steps[2]) < 2.05


def test_camera_noise_is_added_to_both_patches():
    plain, errors = patches(), []
    for level in (0, 20):
        noisy = patches(camera_share=0.5, noise_range=[level, level], jpeg_range=[95, 95])
        assert all(torch.equal(sample['lq'], sample['gt']) for sample in noisy)
        changes = [(one['gt'] - other['gt']).std().item() for one, other in zip(noisy, plain, strict=True)]
        changed = [change for change in changes if change]
        assert 8 <= len(changed) <= 32
        errors.append(np.mean(changed))
    assert 0 < errors[0] < 0.03 and 0.04 < errors[1] < 20 / 255  # subsampling removes noise of the colours
