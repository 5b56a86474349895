"""Packing pairs into LMDBs: content, reproducibility and errors."""

import os
import re
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ast_plugin.data.image_files import read_rgb
from ast_plugin.data.layouts import Source, list_pairs
from ast_plugin.data.lmdb import writer as lmdb_writer
from ast_plugin.data.lmdb.reader import LmdbImages, decode_key, encode_key, read_digests, read_meta_info
from ast_plugin.data.lmdb.writer import make_plan
from ast_plugin.data.matching import Pair
from ast_plugin.data.pairs_dataset import PairsDataset
from ast_plugin.data.randomness import EpochSampler
from ast_plugin.errors import DataError
from tests.data.images import contents, touch
from tests.data.lmdb_sources import options, pack, write_folders


def lmdbs(folder: Path) -> tuple[Path, Path]:
    return folder / 'lq.lmdb', folder / 'gt.lmdb'


def value(folder: Path, key: str) -> bytes:
    with LmdbImages(folder).value(key) as data:
        return bytes(data)


def test_files_in_rgb_stay_as_they_are(root, tmp_path):
    pack(root, tmp_path / 'out')
    for kind, folder in zip(('lq', 'gt'), lmdbs(tmp_path / 'out'), strict=True):
        assert value(folder, '004') == (root / kind / '004.png').read_bytes()
        assert sorted(path.name for path in folder.iterdir()) == ['data.mdb', 'digests.txt', 'meta_info.txt']
        lines = (folder / 'meta_info.txt').read_text().splitlines()
        assert [line.split('.')[0] for line in lines] == [f'{number:03d}' for number in range(7)]
        assert all(re.fullmatch(r'\d{3}\.png \(9,11,3\) \d', line) for line in lines)
    assert list(tmp_path.glob('.*')) == []


def test_basicsr_reads_them(root, tmp_path):
    from basicsr.data.paired_image_dataset import PairedImageDataset
    from basicsr.utils import FileClient

    pack(root, tmp_path / 'out')
    lq, gt = lmdbs(tmp_path / 'out')
    theirs = PairedImageDataset(options(lq, gt, phase='val'))
    files = PairedImageDataset(options(root / 'lq', root / 'gt', phase='val', io_backend={'type': 'disk'}))
    by_path = {Path(sample['gt_path']).stem: sample for sample in (files[number] for number in range(7))}
    assert len(theirs) == 7
    for number in range(7):
        sample = theirs[number]
        assert all(sample[kind].equal(by_path[sample['gt_path']][kind]) for kind in ('lq', 'gt'))
    del theirs, sample
    client = FileClient('lmdb', db_paths=[str(lq)], client_keys=['lq'])
    assert client.get('002', 'lq') == (root / 'lq/002.png').read_bytes()


@pytest.mark.parametrize(
    ('encoding', 'phase', 'keep_uint8'), [('png', 'train', True), ('raw', 'train', False), ('raw', 'val', True)]
)
def test_batches_are_those_of_the_files(root, tmp_path, encoding, phase, keep_uint8):
    pack(root, tmp_path / 'out', encoding)
    batches = []
    for lq, gt, backend, workers in ((root / 'lq', root / 'gt', 'disk', 0), (*lmdbs(tmp_path / 'out'), 'lmdb', 2)):
        more = {'phase': phase, 'keep_uint8': keep_uint8, 'io_backend': {'type': backend}}
        data = PairsDataset(options(lq, gt, **more))
        sampler = EpochSampler(data, 1, 0, ratio=2)
        sampler.set_epoch(3)
        batches.append(list(DataLoader(data, 2, sampler=sampler, num_workers=workers, collate_fn=data.collate)))
    assert len(batches[0]) == len(batches[1]) == 7
    for one, other in zip(*batches, strict=True):
        assert one['lq'].dtype == (torch.uint8 if keep_uint8 else torch.float32)
        assert one['lq'].equal(other['lq']) and one['gt'].equal(other['gt'])
        assert [Path(path).name for path in one['lq_path']] == [Path(path).name for path in other['lq_path']]


@pytest.mark.parametrize(('encoding', 'level'), [('png', None), ('png', 0), ('raw', None)])
def test_every_kind_of_file_keeps_its_pixels(tmp_path, encoding, level):
    ramp = np.arange(9 * 11 * 3, dtype=np.uint8).reshape(9, 11, 3)
    odd = {
        'gray.png': Image.fromarray(ramp[..., 0]),
        'alpha.png': Image.fromarray(np.dstack([ramp, ramp[..., :1]])),
        'palette.png': Image.fromarray(ramp).quantize(16),
        'photo.jpg': Image.fromarray(ramp),
        'deep.png': ramp.astype(np.uint16) * 257 + 1,
        'plain.png': Image.fromarray(ramp),
    }
    for kind in ('lq', 'gt'):
        (tmp_path / kind).mkdir()
        for name, image in odd.items():
            path = tmp_path / kind / name
            cv2.imwrite(str(path), image) if isinstance(image, np.ndarray) else image.save(path)
    pack(tmp_path, tmp_path / 'out', encoding, level)
    folder = tmp_path / 'out/lq.lmdb'
    for entry in read_meta_info(folder):
        (path,) = (tmp_path / 'lq').glob(f'{entry.key}.*')
        with LmdbImages(folder).image(entry.key) as image:
            assert np.array_equal(image, read_rgb(path)) and image.dtype == read_rgb(path).dtype
        assert entry.shape == (9, 11, 3)
        assert encoding == 'raw' or value(folder, entry.key)[25] == 2, 'expected RGB'


@pytest.mark.parametrize('encoding', ['png', 'raw'])
def test_workers_change_no_byte(root, tmp_path, small_batches, encoding):
    pack(root, tmp_path / 'one', encoding, num_workers=1)
    pack(root, tmp_path / 'many', encoding, num_workers=5)
    assert contents(tmp_path / 'one') == contents(tmp_path / 'many')


@pytest.fixture
def pack_and(monkeypatch):
    """Pack, and call a function between writing and verification."""

    def pack_with(action, *arguments, **options) -> None:
        write_texts = lmdb_writer._write_texts
        with monkeypatch.context() as patch:
            patch.setattr(lmdb_writer, '_write_texts', lambda *args: (write_texts(*args), action()))
            pack(*arguments, **options)

    return pack_with


def test_failed_verification_is_not_kept(root, tmp_path, pack_and):
    def damage():
        file = tmp_path / '.out.part/pair/gt.lmdb/data.mdb'
        data = bytearray(file.read_bytes())
        data[data.index(b'IDAT') + 9] ^= 1
        file.write_bytes(data)

    with pytest.raises(DataError, match='1 images differ from what was written'):
        pack_and(damage, root, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    assert pack(root, tmp_path / 'out').num_resumed == 0


def test_what_is_there_is_left_or_replaced(root, tmp_path):
    out, real = tmp_path / 'out', tmp_path / 'disk/out'
    real.mkdir(parents=True)  # an empty folder may be the destination, and a link to it
    out.symlink_to(real)
    pack(root, out)
    before, stamp = contents(out), (out / 'lq.lmdb/data.mdb').stat().st_mtime_ns
    assert pack(root, out).num_resumed == 7
    assert (out / 'lq.lmdb/data.mdb').stat().st_mtime_ns == stamp and contents(out) == before
    os.truncate(out / 'gt.lmdb/data.mdb', 9000)
    with pytest.raises(DataError, match=r'exists, but is damaged: .*gt\.lmdb/data\.mdb: truncated.*--overwrite'):
        pack(root, out)
    assert pack(root, out, overwrite=True).num_resumed == 0
    with pytest.raises(DataError, match=r'exists with LMDBs of other images.*--overwrite'):
        pack(root, out, 'raw')
    pack(root, out, 'raw', overwrite=True)
    assert next(read_meta_info(out / 'gt.lmdb')).encoding == 'raw'
    assert out.readlink() == real and os.listdir(real.parent) == ['out']


@pytest.mark.parametrize('kind', ['folder', 'file', 'link', 'root'])
def test_foreign_files_are_never_replaced(root, tmp_path, kind):
    out = Path('/') if kind == 'root' else tmp_path / 'out'
    if kind == 'folder':
        touch(out, 'thesis.tex')
    elif kind == 'file':
        out.touch()
    elif kind == 'link':
        out.symlink_to(tmp_path / 'nowhere')
    for overwrite in (False, True):
        with pytest.raises(DataError, match='exists and is not a pair of LMDBs; choose another destination'):
            pack(root, out, overwrite=overwrite)
        assert os.path.lexists(out)


@pytest.mark.parametrize('overwrite', [True, False])
def test_folder_created_meanwhile_is_kept(root, tmp_path, pack_and, overwrite):
    thesis = tmp_path / 'out/thesis.tex'
    with pytest.raises(DataError, match='out: exists and is not a pair of LMDBs'):
        pack_and(lambda: touch(tmp_path, 'out/thesis.tex'), root, tmp_path / 'out', overwrite=overwrite)
    thesis.unlink()
    assert pack(root, tmp_path / 'out').num_resumed == 7


def test_the_map_grows_with_what_comes(tmp_path, monkeypatch):
    root = write_folders(tmp_path / 'source', 40, (40, 40))
    # Too small for a single batch, so that the map becomes full.
    monkeypatch.setattr(lmdb_writer, '_SMALLEST_MAP', 2**15)
    monkeypatch.setattr(lmdb_writer, '_PAGE', 0)
    sizes, opened = [], lmdb.open
    monkeypatch.setattr(lmdb, 'open', lambda *a, **k: sizes.append(k.get('map_size')) or opened(*a, **k))
    pack(root, tmp_path / 'out', 'raw')
    assert {2**18, 2**19} <= set(sizes)
    assert LmdbImages(tmp_path / 'out/lq.lmdb').count() == 40


NAMES = ['ä ö', 'a.b.c', '雨', 'x' * 200, '雨' * 80, "it's", '100%', 'a%20b', 'a b', '(1,2,3) 4', '-', '~']


def test_odd_names(tmp_path):
    touch(tmp_path, 'lq/-.png', 'gt/-.png')
    for number, name in enumerate(NAMES):
        content = cv2.imencode('.png', np.full((4, 5, 3), number, np.uint8))[1]
        for kind in ('lq', 'gt'):
            (tmp_path / kind / f'{name}.png').write_bytes(content)
    pack(tmp_path, tmp_path / 'out')
    dataset = PairsDataset(options(*lmdbs(tmp_path / 'out'), phase='val'))
    keys = [entry.key for entry in read_meta_info(tmp_path / 'out/lq.lmdb')]
    assert len(dataset) == len(set(keys)) == len(NAMES)
    assert all(key.isascii() and len(key) <= 511 and not set(key) & set('. ') for key in keys)
    seen = {Path(sample['lq_path']).stem: int((sample['lq'][0, 0, 0] * 255).round()) for sample in dataset}
    whole = {name: number for number, name in enumerate(NAMES) if name != '雨' * 80}
    assert whole.items() <= seen.items() and len(seen) == len(NAMES)

    from basicsr.data.data_util import paired_paths_from_lmdb

    paths = paired_paths_from_lmdb(list(map(str, lmdbs(tmp_path / 'out'))), ['lq', 'gt'])
    assert sorted(path['lq_path'] for path in paths) == sorted(keys)


def test_keys_are_distinct_and_decodable():
    short = [*NAMES, 'dir/a', 'dira', 'a%2Eb', 'a.b', os.fsdecode(b'\xff.raw')]
    short.remove('雨' * 80)
    keys = [encode_key(name) for name in (*short, '雨' * 80, '雨' * 80 + 'x', '雨' * 81)]
    assert len(set(keys)) == len(keys)
    assert [decode_key(key) for key in keys[: len(short)]] == short


def test_equal_stems_and_a_pair_that_comes_twice(tmp_path):
    for folder in ('a', 'b', 'a_gt', 'b_gt'):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(('0.png', '0.jpg')):
            image = np.full((8, 8, 3), 40 * number + 3 * len(folder) + ord(folder[0]), np.uint8)
            cv2.imwrite(str(tmp_path / folder / name), image)
    rows = ['/b/0.png /b_gt/0.png', '/a/0.png /a_gt/0.png', '/a/0.jpg /a_gt/0.jpg', '/b/0.png /b_gt/0.png']
    (tmp_path / 'real_world.txt').write_text('\n'.join(rows))
    pairs = list_pairs('spad', Source(dataroot=str(tmp_path)))
    lmdb_writer.write_lmdbs(make_plan(pairs, 'raw'), tmp_path / 'out')
    lq, gt = lmdbs(tmp_path / 'out')
    keys = [entry.key for entry in read_meta_info(lq)]
    assert len(keys) == 4 and keys[0] == keys[3] == 'b/0' and LmdbImages(lq).count() == 3
    assert [decode_key(key) for key in keys[1:3]] == ['a/0.png', 'a/0.jpg']
    assert set(read_digests(lq)) == set(keys)
    files = PairsDataset({'phase': 'train', 'gt_size': 6, 'layout': 'spad', 'dataroot': str(tmp_path)})
    packed = PairsDataset(options(lq, gt))
    assert all(files[0, number]['lq'].equal(packed[0, number]['lq']) for number in range(8))


def test_different_pairs_with_one_key_are_refused(root):
    with pytest.raises(DataError, match=r'1 keys belong to several pairs: same; the first to .*000.png, .*001.png'):
        make_plan([Pair('same', str(root / f'lq/00{n}.png'), str(root / f'gt/00{n}.png')) for n in (0, 1)])
    with pytest.raises(DataError, match='no pairs to pack'):
        make_plan([])


def test_places(root, tmp_path, monkeypatch):
    (tmp_path / 'file').touch()
    for place in ('file/out', 'x' * 300):
        with pytest.raises(DataError, match=r'cannot be written: .*(directory|exists|too long)'):
            pack(root, tmp_path / place)
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    monkeypatch.chdir(tmp_path)
    pack(root, '~/out')
    assert (tmp_path / 'home/out/lq.lmdb').is_dir() and not (tmp_path / '~').exists()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (cv2.imencode('.png', np.zeros((9, 12, 3), np.uint8))[1].tobytes(), 'must have the same size.*005.png'),
        (b'\x89PNG\r\n\x1a\n', '005.png'),
    ],
)
def test_a_bad_pair_is_named_and_nothing_appears(root, tmp_path, small_batches, content, message):
    (root / 'gt/005.png').write_bytes(content)
    with pytest.raises(DataError, match=message):
        pack(root, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
