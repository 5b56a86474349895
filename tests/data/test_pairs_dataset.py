"""PairsDataset: what a sample is, what it depends on, and how bad pairs are reported."""

import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ast_plugin.data.pairs_dataset import PairsDataset
from ast_plugin.data.randomness import EpochSampler
from ast_plugin.errors import DataError, OptionError

SIZE = (10, 13)


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def coordinates(number: int, clean: int, size: tuple[int, int] = SIZE, dtype=np.uint8) -> np.ndarray:
    """BGR: number of the image and kind, column, row; read back as RGB: row, column, 2 * number + clean."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    return np.stack([np.full(size, 2 * number + clean), columns, rows], axis=2).astype(dtype)


@pytest.fixture
def root(tmp_path) -> Path:
    for number in range(5):
        write(tmp_path / f'lq/{number}.png', coordinates(number, 0))
        write(tmp_path / f'gt/{number}.png', coordinates(number, 1))
    return tmp_path


def dataset(root: Path, **options) -> PairsDataset:
    return PairsDataset(
        {
            'name': 'Test',
            'type': 'PairsDataset',
            'phase': 'train',
            'gt_size': 4,
            'scale': 1,
            'io_backend': {'type': 'disk'},
            'batch_size_per_gpu': 2,
            'seed': 7,
            'dataroot_lq': str(root / 'lq'),
            'dataroot_gt': str(root / 'gt'),
            **options,
        }
    )


def decoded(image: torch.Tensor) -> np.ndarray:
    return (image * 255).round().numpy().astype(int)


def test_a_training_sample(root):
    data = dataset(root)
    assert len(data) == 5
    sample = data[3]
    assert set(sample) == {'lq', 'gt', 'lq_path', 'gt_path'}
    assert sample['lq_path'] == str(root / 'lq/3.png') and sample['gt_path'] == str(root / 'gt/3.png')
    for key in ('lq', 'gt'):
        assert sample[key].shape == (3, 4, 4) and sample[key].dtype == torch.float32 and sample[key].is_contiguous()


@pytest.mark.parametrize('gt_size', [4, 16])
def test_partners_stay_aligned_to_the_pixel(root, gt_size):
    data = dataset(root, gt_size=gt_size)
    for epoch in range(8):
        for position in range(5):
            sample = data[epoch, position]
            lq, gt = decoded(sample['lq']), decoded(sample['gt'])
            assert np.array_equal(lq[:2], gt[:2])
            assert (lq[2] == 2 * position).all() and (gt[2] == 2 * position + 1).all()


def test_samples_depend_on_seed_and_index(root):
    def patches(seed: int, epoch: int, positions: range) -> bytes:
        data = dataset(root, seed=seed)
        return b''.join(data[epoch, position]['lq'].numpy().tobytes() for position in positions)

    first = patches(7, 0, range(5))
    assert first == patches(7, 0, range(5))
    others = {patches(8, 0, range(5)), patches(7, 1, range(5)), patches(7, 0, range(5, 10))}
    assert len(others | {first}) == 4
    data = dataset(root)
    assert torch.equal(data[2]['lq'], data[0, 2]['lq'])
    assert data[0, 7]['lq_path'] == data[2]['lq_path']


def epoch_of(data: PairsDataset, workers: int, epoch: int = 1) -> list[dict]:
    sampler = EpochSampler(data, 1, 0, ratio=2)
    sampler.set_epoch(epoch)
    return list(DataLoader(data, batch_size=2, sampler=sampler, num_workers=workers, drop_last=True))


def test_workers_change_nothing_and_epochs_differ(root):
    data = dataset(root)
    alone, helped = epoch_of(data, 0), epoch_of(data, 2)
    assert len(alone) == len(helped) == 5
    for one, other in zip(alone, helped, strict=True):
        assert one['lq_path'] == other['lq_path']
        assert torch.equal(one['lq'], other['lq']) and torch.equal(one['gt'], other['gt'])
    assert any(not torch.equal(one['lq'], other['lq']) for one, other in zip(alone, epoch_of(data, 0, 2), strict=True))


@pytest.mark.parametrize('phase', ['val', 'test'])
def test_validation_takes_whole_images_or_centres(root, phase):
    data = dataset(root, phase=phase)
    whole = data[1]
    assert np.array_equal(decoded(whole['gt']), coordinates(1, 1).transpose(2, 0, 1)[::-1])
    centre = dataset(root, phase=phase, center_crop=4)[1]
    assert torch.equal(centre['lq'], whole['lq'][:, 3:7, 4:8])
    assert torch.equal(dataset(root, phase=phase, center_crop=99)[1]['lq'], whole['lq'])


def test_sixteen_bits_are_kept(tmp_path):
    levels = (np.arange(64 * 3).reshape(8, 8, 3) * 331).astype(np.uint16)
    for folder in ('lq', 'gt'):
        write(tmp_path / folder / 'a.png', levels)
    back = dataset(tmp_path, phase='val')[0]['gt'].double() * 65535
    assert np.array_equal(back.round().numpy(), levels[..., ::-1].transpose(2, 0, 1))


def test_iteration_ends_and_the_dataset_travels(root):
    data = dataset(root)
    assert len(list(data)) == 5
    with pytest.raises(IndexError, match='5 images'):
        data[5]
    assert torch.equal(pickle.loads(pickle.dumps(data))[0]['lq'], data[0]['lq'])


@pytest.mark.parametrize('workers', [0, 1])
def test_different_sizes_name_both_files(root, workers):
    write(root / 'gt/4.png', coordinates(4, 1, (10, 12)))
    with pytest.raises(DataError) as caught:
        list(DataLoader(dataset(root), num_workers=workers))
    message = str(caught.value)
    assert message.startswith('datasets.train: ') and 'Traceback' not in message
    assert f'{root}/lq/4.png has 13x10' in message and f'{root}/gt/4.png has 12x10' in message


@pytest.mark.parametrize('content', [b'', b'not an image', None])
def test_an_unreadable_file_names_the_pair(root, content):
    broken = root / 'lq/2.png'
    broken.write_bytes((root / 'lq/2.png').read_bytes()[:40] if content is None else content)
    data = dataset(root, phase='val')
    with pytest.raises(DataError) as caught:
        data[2]
    assert all(part in str(caught.value) for part in ('datasets.val', str(broken), str(root / 'gt/2.png')))
    data[1]


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({'gt_sise': 4}, r'datasets\.train\.gt_sise: unknown key, did you mean gt_size'),
        ({'gt_size': 0}, r'datasets\.train\.gt_size: expected 1 or more, got 0'),
        ({'gt_size': None}, 'training needs gt_size'),
        ({'scale': 2}, r'datasets\.train\.scale'),
        ({'io_backend': {'type': 'memcached'}}, r'datasets\.train\.io_backend\.type: .*disk'),
        ({'dataroot': 'x'}, 'does not use dataroot'),
        ({'layout': 'Spad', 'dataroot_lq': None, 'dataroot_gt': None}, 'did you mean spad'),
        ({'use_rot': 'sometimes'}, r'datasets\.train\.use_rot'),
    ],
)
def test_bad_options_name_the_key(root, options, expected):
    with pytest.raises(OptionError, match=expected):
        dataset(root, **options)


def test_every_fault_of_options_is_told_at_once(root):
    options = {'phase': 'train', 'gt_size': -1, 'gt_sizes': 3}
    with pytest.raises(OptionError) as caught:
        PairsDataset(options)
    assert len(str(caught.value).splitlines()) >= 2
    assert options == {'phase': 'train', 'gt_size': -1, 'gt_sizes': 3}
