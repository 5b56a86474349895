"""SyntheticPairsDataset: training pairs that vary, validation pairs that never do."""

import cv2
import numpy as np
import pytest
import torch
from pydantic import BaseModel

from ast_plugin.data import pairs_dataset
from ast_plugin.data.pairs_dataset import SyntheticPairsDataset
from ast_plugin.degradations import DEGRADATIONS, Degradation
from ast_plugin.errors import DataError, OptionError


def dataset(**options) -> SyntheticPairsDataset:
    return SyntheticPairsDataset({'phase': 'train', 'gt_size': 48, 'seed': 3, 'batch_size_per_gpu': 2, **options})


@pytest.fixture
def folder(tmp_path):
    """Photographs that brighten downwards, so that a flip shows."""
    for number in range(12):
        image = np.broadcast_to(np.linspace(40, 120, 60)[:, None, None] + number, (60, 80, 3)).astype(np.uint8)
        cv2.imwrite(str(tmp_path / f'photo{number}.png'), image)
    return tmp_path


def test_a_training_sample():
    data = dataset()
    sample = data[4]
    for key in ('lq', 'gt'):
        image = sample[key]
        assert image.shape == (3, 48, 48) and image.dtype == torch.float32 and image.is_contiguous()
        assert image.min() >= 0 and image.max() <= 1
    assert (sample['lq'] != sample['gt']).any()
    assert sample['lq_path'] == f'{data.photos[4].name}.png' and sample['gt_path'] == str(data.photos[4].path)


def test_samples_depend_on_seed_and_index():
    patches = [
        dataset(seed=seed)[index]['lq'].numpy().tobytes()
        for seed, index in [(3, (0, 1)), (3, (1, 1)), (3, (0, 7)), (4, (0, 1))]
    ]
    assert len(set(patches)) == 4
    assert dataset()[0, 1]['lq'].numpy().tobytes() == patches[0]


def test_validation_never_changes():
    one, other = dataset(phase='val', seed=1), dataset(phase='val', seed=2)
    assert not {photo.name for photo in one.photos} & {photo.name for photo in dataset().photos}
    assert torch.equal(one[0]['lq'], other[5, 0]['lq'])
    photo = cv2.imread(one[1]['gt_path'])
    assert one[1]['gt'].shape[1:] == photo.shape[:2]
    levels = (one[1]['gt'] * 255).round().byte().numpy()
    assert np.array_equal(levels, photo[..., ::-1].transpose(2, 0, 1))


def test_pairs_of_a_photo_have_own_names():
    data = dataset(phase='val', num_per_photo=3, center_crop=32)
    assert len(data) == 3 * len(data.photos)
    samples = list(data)
    assert len({sample['lq_path'] for sample in samples}) == len(data)
    assert len({sample['lq'].numpy().tobytes() for sample in samples}) == len(data)
    assert samples[0]['gt'].shape == (3, 32, 32) and torch.equal(samples[0]['gt'], samples[2]['gt'])


def test_rain_falls_down_in_flipped_photos():
    streaks = dataset(photos=['rocket'], gt_size=96, degradation={'angle': [20, 20], 'angle_spread': 0, 'veil': [0, 0]})
    for epoch in range(6):
        sample = streaks[epoch, 0]
        layer = ((sample['lq'] - sample['gt']) / (1 - sample['gt']).clamp(min=0.05)).mean(dim=0).numpy()
        dx, dy = cv2.Sobel(layer, cv2.CV_32F, 1, 0), cv2.Sobel(layer, cv2.CV_32F, 0, 1)
        assert float((dx * dy).sum()) < 0  # leaning to one side, whatever the flip


def test_photos_are_flipped(folder):
    data = dataset(source='folder', dataroot_gt=str(folder), split='all')
    falls = {
        tuple(torch.sign(gt[0, -1, 0] - gt[0, 0, 0]).view(1).tolist())
        for gt in (data[epoch, 0]['gt'] for epoch in range(20))
    }
    assert len(falls) == 3  # down, up, and across


def test_a_margin_is_cut_off_again(folder, monkeypatch):
    class Parameters(BaseModel):
        type: str = 'rain'

    shapes = []

    def apply(image, generator, parameters):
        shapes.append(image.shape)
        return image, image[..., 0]

    monkeypatch.setitem(DEGRADATIONS, 'rain', Degradation(Parameters, apply, margin=5))
    data = dataset(source='folder', dataroot_gt=str(folder), gt_size=20)
    samples = [data[epoch, 0] for epoch in range(30)]
    assert set(shapes) == {(30, 30, 3)}
    assert all(torch.equal(sample['lq'], sample['gt']) and sample['lq'].shape == (3, 20, 20) for sample in samples)


def test_photos_are_decoded_once_while_they_fit(folder, monkeypatch):
    reads = []
    image = np.zeros((60, 80, 3), np.uint8)
    monkeypatch.setattr(pairs_dataset, 'read_rgb', lambda path: reads.append(path) or image)
    data = dataset(source='folder', dataroot_gt=str(folder), split='all')
    for _ in range(3):
        data[0]
    assert len(reads) == 1
    monkeypatch.setattr(pairs_dataset, 'CACHE_BYTES', image.nbytes + 1)
    for _ in range(3):
        data[1]
    assert len(reads) == 4


def test_an_unreadable_photo_names_phase_and_file(folder):
    (folder / 'photo0.png').write_bytes(b'nothing')
    with pytest.raises(DataError, match=r'datasets\.train: .*photo0\.png'):
        dataset(source='folder', dataroot_gt=str(folder), photos=['photo0'])[0]


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'degradation': {'type': 'fog'}}, r'datasets\.train\.degradation.*rain'),
        ({'degradation': {'psnr': [30, 20]}}, r'degradation\.psnr.*lowest, highest'),
        ({'degradation': {'lenght': 2}}, r'degradation\.lenght: unknown key'),
        ({'source': 'folder'}, 'dataroot_gt'),
        ({'dataroot_gt': 'x'}, 'source: folder'),
        ({'split': 'test'}, r'datasets\.train\.split'),
        ({'photos': []}, r'datasets\.train\.photos'),
    ],
)
def test_bad_options_name_the_key(options, expected):
    with pytest.raises(OptionError, match=expected):
        dataset(**options)


def test_some_patches_stay_clean_or_get_darker():
    options = {'phase': 'train', 'gt_size': 32, 'num_per_photo': 20, 'clean_share': 0.4, 'gamma': [1.5, 2.5]}
    samples = [SyntheticPairsDataset(options)[number] for number in range(40)]
    clean = [torch.equal(sample['lq'], sample['gt']) for sample in samples]
    assert 6 <= sum(clean) <= 28
    plain = [SyntheticPairsDataset({**options, 'gamma': [1, 1]})[number] for number in range(40)]
    assert np.mean([float(a['gt'].mean() - b['gt'].mean()) for a, b in zip(samples, plain, strict=True)]) < -0.05
