"""Reading LMDBs concurrently, and errors for unreadable ones."""

import os
import pickle
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import pytest
import torch
from torch.utils.data import DataLoader

from ast_plugin import options as option_files
from ast_plugin.cli.main import main
from ast_plugin.data.lmdb.reader import KINDS, LmdbImages, check_lmdb, check_together, holds_pixels
from ast_plugin.data.pairs_dataset import PairsDataset
from ast_plugin.errors import DataError, OptionError
from ast_plugin.models import preflight
from tests import tiny_run
from tests.data.lmdb_sources import options, pack, write_folders


@pytest.fixture(scope='module')
def packed(tmp_path_factory) -> Path:
    root = write_folders(tmp_path_factory.mktemp('packed'), 12)
    pack(root, root / 'png')
    pack(root, root / 'raw', 'raw')
    return root


@pytest.fixture
def raw(packed, tmp_path) -> Path:
    return Path(shutil.copytree(packed / 'raw', tmp_path / 'raw'))


def dataset(folder: Path, **more) -> PairsDataset:
    return PairsDataset(options(folder / 'lq.lmdb', folder / 'gt.lmdb', **more))


def rewrite(folder: Path, change, map_size=2**24) -> None:
    """Modify an LMDB by `change(transaction)`."""
    with lmdb.open(str(folder), lock=False, map_size=map_size) as environment, environment.begin(write=True) as writing:
        change(writing)


def cut(share: float):
    return lambda raw: os.truncate(raw / 'lq.lmdb/data.mdb', int((raw / 'lq.lmdb/data.mdb').stat().st_size * share))


def change(damage):
    """Return a function that changes the value of 005 in lq.lmdb; None removes it."""

    def change_value(raw: Path) -> None:
        with LmdbImages(raw / 'lq.lmdb').value('005') as value:
            damaged = damage(bytes(value))
        rewrite(raw / 'lq.lmdb', lambda writing: writing.put(b'005', damaged) if damaged else writing.delete(b'005'))

    return change_value


def overwrite(name: str, content: bytes | None, mode: str = 'wb'):
    """Return a function that overwrites a file of the folder, or removes it."""
    return lambda raw: (raw / name).unlink() if content is None else (raw / name).open(mode).write(content)


DAMAGES = [
    (lambda raw: shutil.rmtree(raw / 'gt.lmdb'), r'gt\.lmdb: no such LMDB'),
    (overwrite('gt.lmdb/data.mdb', None), r'gt\.lmdb/data\.mdb: no such file'),
    (overwrite('gt.lmdb/meta_info.txt', None), r'gt\.lmdb/meta_info\.txt: no such file'),
    (overwrite('gt.lmdb/meta_info.txt', b'000.raw (9,11,3) 8\n'), r'same keys.*001, 002, 003 and 8 more'),
    (lambda raw: [overwrite(f'{kind}.lmdb/meta_info.txt', b'')(raw) for kind in KINDS], 'same keys, but have none'),
    (overwrite('lq.lmdb/meta_info.txt', b'004.jpg (9,11,3) 1', 'ab'), 'line 13 is .*expected'),
    (overwrite('lq.lmdb/meta_info.txt', b'\xff\xfe', 'ab'), r'meta_info\.txt: cannot be read'),
    (overwrite('lq.lmdb/data.mdb', b'rubbish' * 9999), r'data\.mdb: cannot be opened: .*not an LMDB'),
    *((cut(share), r'data\.mdb: (truncated|cannot be opened).*basicsr data lmdb') for share in (0, 0.3, 0.999)),
    (change(lambda value: None), "no image has the key '005'.*basicsr data"),
    (change(lambda value: value[:-1]), r'lq\.lmdb/005: damaged: '),
    (change(lambda value: value[:15]), r'lq\.lmdb/005: damaged: '),
    (change(lambda value: value[:8] + b'\xff' * 20), r'lq\.lmdb/005: damaged: '),
]


@pytest.mark.parametrize(('damage', 'message'), DAMAGES)
def test_damage_is_named(raw, damage, message):
    damage(raw)
    with pytest.raises(DataError, match=rf'datasets\.train: .*{message}'):
        dataset(raw)[5]
    assert check_lmdb(raw / 'lq.lmdb') + check_lmdb(raw / 'gt.lmdb')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'dataroot_gt': '{}/lq.lmdb'}, r'must be two LMDBs; both are .*lq\.lmdb'),
        ({'lq_template': '{{}}_rain'}, 'io_backend lmdb takes two LMDBs'),
        ({'layout': 'agan', 'dataroot_lq': None, 'dataroot_gt': None, 'dataroot': 'x'}, 'takes two LMDBs'),
    ],
)
def test_options_that_name_no_two_lmdbs(packed, options, message):
    options = {key: value and value.format(packed / 'raw') for key, value in options.items()}
    with pytest.raises((DataError, OptionError), match=message):
        dataset(packed / 'raw', **options)


def test_a_check_finds_all_faults(packed, raw):
    assert check_lmdb(packed / 'png/lq.lmdb') == check_lmdb(packed / 'raw/gt.lmdb') == []
    rewrite(raw / 'gt.lmdb', lambda writing: writing.put(b'more', b'x'))
    (raw / 'gt.lmdb/digests.txt').unlink()
    (raw / 'gt.lmdb/meta_info.txt').write_text(
        (raw / 'gt.lmdb/meta_info.txt').read_text().replace('007.raw (9,11,3)', '007.raw (8,11,3)')
    )
    first, second = check_lmdb(raw / 'gt.lmdb', num_workers=3)
    assert 'holds 13 images, but meta_info.txt lists 12' in first
    assert '007: has 11x9 pixels, but 11x8 in meta_info.txt' in second


def test_an_lmdb_that_grows_while_it_is_open(tmp_path):
    rewrite(tmp_path, lambda writing: writing.put(b'a', b'1' * 1000), 2**16)
    (tmp_path / 'meta_info.txt').write_text('a.png (1,1,3) 1\nb.png (1,1,3) 1\n')
    images = LmdbImages(tmp_path)
    with images.value('a') as value:
        assert len(value) == 1000
    code = (
        f'import lmdb; e = lmdb.open({str(tmp_path)!r}, map_size=2**26, lock=False); '
        'w = e.begin(write=True); w.put(b"b", b"2" * 12000000); w.commit()'
    )
    subprocess.run([sys.executable, '-c', code], check=True)
    with images.value('b') as value:
        assert len(value) == 12_000_000


@pytest.mark.parametrize('map_size', [2**20, 2**40])
def test_any_map_size_will_do(raw, packed, map_size):
    """Third-party LMDBs may have a map size much smaller than the default, or larger than memory and disk."""
    for kind in KINDS:
        rewrite(raw / f'{kind}.lmdb', lambda writing: writing.put(b'000', writing.get(b'000')), map_size)
    assert dataset(raw)[0]['lq'].equal(dataset(packed / 'raw')[0]['lq'])


@pytest.mark.filterwarnings('ignore:This DataLoader will create 8 worker processes')
def test_processes_read_what_others_have_open(packed):
    data = dataset(packed / 'raw')
    expected = sum(float(data[0, number]['gt'].sum()) for number in range(60))
    loader = DataLoader(data, sampler=[(0, number) for number in range(60)], num_workers=8)
    code = f'import lmdb; e = lmdb.open({str(packed / "raw/gt.lmdb")!r}); print("open"); input()'
    holder = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        holder.stdout.readline()
        assert sum(float(sample['gt'].sum()) for sample in loader) == pytest.approx(expected)
    finally:
        holder.communicate('\n')
    assert data[0, 1]['gt'].equal(dataset(packed / 'raw')[0, 1]['gt'])


def test_datasets_share_an_lmdb_and_close_it(packed):
    def open_again():
        return lmdb.open(str(packed / 'raw/lq.lmdb'), readonly=True, lock=False)

    one, other = dataset(packed / 'raw'), dataset(packed / 'raw', seed=5)
    assert one[0]['lq'].shape == other[0]['lq'].shape == (3, 6, 6)
    del one
    other[1]
    with pytest.raises(lmdb.Error, match='already open'):
        open_again()
    del other
    one = dataset(packed / 'raw')
    with open_again(), pytest.raises(DataError, match='already open; in this process, a dataset of another type has'):
        one[0]
    one[0]


def test_threads_share_an_lmdb_from_the_start(packed, monkeypatch):
    open_at_once = lmdb.open
    monkeypatch.setattr(lmdb, 'open', lambda *args, **options: time.sleep(0.05) or open_at_once(*args, **options))
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(dataset(packed / 'raw').__getitem__, range(4)))
    assert [sample['lq'].shape for sample in samples] == [(3, 6, 6)] * 4


def test_samples_outlive_the_map_and_it_travels(packed):
    data = dataset(packed / 'raw', phase='val', keep_uint8=True)
    sample = data[4]
    before, travelled = sample['lq'].clone(), pickle.loads(pickle.dumps(data))
    del data
    assert sample['lq'].dtype == torch.uint8 and sample['lq'].equal(before)
    sample['lq'].zero_()  # writable, and independent of the file
    assert travelled[4]['lq'].equal(before)


@pytest.mark.parametrize(
    ('encoding', 'message'),
    [
        ('raw', r'PairedImageDataset reads LMDBs of PNG files.*holds pixels.*PairsDataset'),
        ('png', r'datasets: train\.dataroot_lq and val\.dataroot_lq are the same LMDB.*PairsDataset'),
    ],
)
def test_preflight_refuses_lmdbs_for_basicsr(packed, tmp_path, encoding, message):
    file = tiny_run.write(tmp_path)
    text = file.read_text()
    for kind in KINDS:
        text = text.replace(f'data/{kind}', f'{packed}/{encoding}/{kind}.lmdb', 1)  # in train
        text = text.replace(f'data/{kind}', f'{packed}/png/{kind}.lmdb')
    file.write_text(text.replace('{type: disk}', '{type: lmdb}').replace('gt_size: 32', 'gt_size: 8'))
    types = preflight.load_registered().by_kind['dataset']
    opt = option_files.prepare(option_files.load(file), root=tmp_path, dataset_types=types)
    with pytest.raises(DataError, match=message):
        preflight.check(opt, 'tiny.yml')
    assert not holds_pixels(packed / 'png/lq.lmdb') and not holds_pixels(packed)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['{}/nowhere', '{}/out'], 'no such dataset, folder or manifest'),
        (['{}/lq', '{}/out'], 'expected subfolders lq and gt'),
        (['{}', '{}/out', '--split', 'train'], 'a folder without --layout does not support --split'),
        (['{}', '{}/out', '--layout', 'folders', '--phase', 'test'], 'layout folders does not support --phase'),
        (['{}', '{}/out', '--layout', 'agan', '--lq-dir', 'x'], 'layout agan does not support --lq-dir'),
        (['{}', '{}/out', '--layout', 'agam'], 'did you mean agan'),
        (['{}', '{}/out', '--layout', 'agan'], 'AGAN-Data was not found at'),
        (['{}', '{}/out', '--encoding', 'raw', '--compress-level', '1'], 'raw pixels are not compressed'),
        (['{}', '{}/out', '--workers', '0'], '--workers is 0: expected 1 or more'),
        (['{}/lq/000.png', '{}/out'], '000.png: not a manifest'),
        (['{}/lq/000.png', '{}/out', '--layout', 'agan'], 'a manifest does not support --layout'),
        (['{}/empty', '{}/out'], 'no image in folder'),
    ],
)
def test_wrong_commands(packed, tmp_path, capsys, arguments, message):
    for kind in ('lq', 'gt'):
        (packed / 'empty' / kind).mkdir(parents=True, exist_ok=True)
    assert main(['data', 'lmdb', *(argument.format(packed) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith('basicsr: error: ') and message in error
    assert not (packed / 'out').exists()


def swap(folder: Path) -> None:
    for old, new in (('lq.lmdb', 'other'), ('gt.lmdb', 'lq.lmdb'), ('other', 'gt.lmdb')):
        (folder / old).rename(folder / new)


def exchange(folder: Path) -> None:
    pack(write_folders(folder.parent / 'others', 3, seed=1), folder.parent / 'more')
    shutil.rmtree(folder / 'gt.lmdb')
    (folder.parent / 'more/gt.lmdb').rename(folder / 'gt.lmdb')


BREAKS = [
    (swap, 'lq.lmdb and gt.lmdb are swapped'),
    (exchange, 'gt.lmdb: is not the one written here'),
    (lambda folder: shutil.rmtree(folder / 'gt.lmdb'), 'gt.lmdb is missing'),
    (overwrite('gt.lmdb/digests.txt', None), 'digests.txt of an LMDB is missing'),
    *((overwrite('source.json', text), 'source.json: damaged') for text in (b'', b'[]', b'{"digests": {"lq": "a"}}')),
]


@pytest.mark.parametrize(('damage', 'expected'), BREAKS)
def test_what_is_not_together(tmp_path, capfd, damage, expected):
    root, out = write_folders(tmp_path / 'source', 3), tmp_path / 'out'
    pack(root, out)
    assert check_together(out) == []
    damage(out)
    (fault,) = check_together(out)
    assert expected in fault and str(out) in fault
    assert main(['data', 'check', str(out)]) == 1
    assert expected in capfd.readouterr().out
    if damage is swap:
        with pytest.raises(DataError, match=r'out: exists, but is damaged: .* swapped.* Replace it with --overwrite'):
            pack(root, out)
        (out / 'source.json').unlink()
        assert check_together(out) == []  # third-party LMDBs may be anywhere
