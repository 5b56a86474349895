"""`basicsr data prepare`, `check` and `lmdb`: what they print, and their exit status."""

import os
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from ast_plugin.data.pairs_dataset import PairsDataset
from tests.data.images import write_noise


@pytest.fixture
def data(basicsr):
    """Run `basicsr data` on the words of a line, check its status, and return its output and errors."""
    return lambda line, status=0: ''.join(basicsr('data', *shlex.split(line), status=status))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the raindrop dataset as distributed."""
    for split, count in (('train', 4), ('test_a', 2), ('test_b', 2)):
        root = tmp_path / 'raindrop' / split / split
        for number in range(count):
            write_noise(root / f'data/{number}_rain.png', [len(split), number, ord(split[-1])])
            write_noise(root / f'gt/{number}_clean.png', [9, number, ord(split[-1])])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prepare_prints_a_table_and_options(folder, data):
    out = data('prepare agan raindrop "it\'s out"')
    lines = out.splitlines()
    assert lines[0] == f'AGAN-Data in {folder}/raindrop'
    assert lines[2].split() == ['split', 'pairs', 'faulty', 'width', 'x', 'height', 'files', 'from']
    assert [line.split()[:4] + line.split()[-1:] for line in lines[3:6]] == [
        ['train', '4', '0', '24x16', 'train/train/data'],
        ['test_a', '2', '0', '24x16', 'test_a/test_a/data'],
        ['test_b', '2', '0', '24x16', 'test_b/test_b/data'],
    ]
    assert 'prepared 8 pairs' in out and max(map(len, lines)) < 120
    sections = yaml.safe_load(out.partition('use instead of dataroot and split:\n')[2])['datasets']
    assert list(sections) == ['train', 'val', 'val_2']
    for name, section in sections.items():
        assert section.pop('name').startswith("it's out_")
        assert section.pop('type') == 'PairsDataset'
        phase = name.partition('_')[0]
        options = {'phase': phase, **section, **({'gt_size': 8} if phase == 'train' else {})}
        assert len(PairsDataset(options)) == {'train': 4, 'val': 2}[phase]


def test_faults_are_rejected_and_then_left_out(folder, data):
    (folder / 'raindrop/train/train/data/1_rain.png').write_bytes(b'')
    (folder / 'raindrop/train/train/gt/2_clean.png').unlink()
    out = data('prepare agan raindrop out', status=2)
    assert '1 x unreadable' in out and 'train/train/data/1_rain.png: the file is empty' in out
    assert '1 x no partner' in out and '2_rain.png: no 2_clean.* in train/train/gt' in out
    assert f'basicsr: error: nothing was prepared; all problems are listed in {folder}/out/faults.txt' in out
    assert 'faults: 2; fix or remove the files, or exclude them with --skip-faulty' in out
    assert not list((folder / 'out').glob('*.jsonl'))
    faults = (folder / 'out/faults.txt').read_text()
    assert faults.count('\n') == 2
    out = data('prepare agan raindrop out --skip-faulty')
    assert 'prepared 6 pairs' in out and 'excluded faults: 2' in out
    assert (folder / 'out/faults.txt').read_text() == faults


def test_leaks_are_rejected_and_then_accepted(folder, data):
    shutil.copy('raindrop/train/train/data/3_rain.png', 'raindrop/test_a/test_a/data/0_rain.png')
    out = data('prepare agan raindrop out --skip-faulty', status=2)
    assert 'test_a: 1 degraded image is also in train' in out
    assert 'test_a/test_a/data/0_rain.png = train/train/data/3_rain.png' in out
    assert '1 images in both training and test' in out and '--allow-duplicates' in out
    assert 'also in train' in (folder / 'out/faults.txt').read_text()
    assert 'prepared 8 pairs' in data('prepare agan raindrop out --allow-duplicates')


def test_only_some_splits(folder, data):
    data('prepare agan raindrop out --split test_b --split train')
    assert sorted(os.listdir('out')) == ['test_b.jsonl', 'train.jsonl']
    out = data('prepare agan raindrop out --split test_a')
    assert 'kept from an earlier run: test_b.jsonl, train.jsonl' in out
    for number in range(2):
        (folder / f'raindrop/test_a/test_a/data/{number}_rain.png').write_bytes(b'')
    out = data('prepare agan raindrop out --split test_a --skip-faulty', status=2)
    assert 'no pair of raindrop is usable' in out


def test_plain_folders(folder, data):
    arguments = '--lq {split}/{split}/data --gt {split}/{split}/gt --lq-template {}_rain --gt-template {}_clean'
    assert 'prepared 4 pairs' in data(f'prepare folders raindrop out {arguments}')


@pytest.fixture
def prepared(tmp_path, monkeypatch, data):
    """A working directory with a prepared dataset; Dense-Haze keeps both splits in the same folders."""
    for number in (1, 2, 3, 50, 51, 52):
        write_noise(tmp_path / f'haze/hazy/{number:02d}_hazy.png', number)
        write_noise(tmp_path / f'haze/GT/{number:02d}_GT.png', number + 100)
    write_noise(tmp_path / 'haze/GT/mask.png', 0)
    monkeypatch.chdir(tmp_path)
    data('prepare densehaze haze out')
    return tmp_path


def test_all_as_it_was(prepared, data):
    unchanged = 'out/test.jsonl: 2 pairs: unchanged\nout/train.jsonl: 4 pairs: unchanged\n'
    assert data('check out --workers 2') == data('check out --quick') == unchanged
    path = prepared / 'haze/hazy/02_hazy.png'
    path.write_bytes(path.read_bytes() + b'more')  # the same pixels
    assert data('check out') == unchanged
    assert '1 changed' in data('check out --quick', status=1)


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


SIZES = '16x24 pixels, but 24x16 in the manifest'


@pytest.mark.parametrize(
    ('name', 'change', 'kind', 'text', 'is_quick'),
    [
        ('hazy/02_hazy.png', Path.unlink, 'missing', 'no such file', True),
        ('hazy/02_hazy.png', lambda path: write_noise(path, 999), 'changed', 'its pixels differ from the man', False),
        ('hazy/02_hazy.png', lambda path: write_noise(path, 2, (24, 16)), 'changed', SIZES, False),
        ('hazy/02_hazy.png', lambda path: path.write_bytes(b'x'), 'unreadable', 'not a PNG', True),
        ('hazy/02_hazy.png', link_to_itself, 'unreadable', 'Too many levels of symbolic links', True),
        ('GT/03_GT_new.png', lambda path: write_noise(path, 5), 'extra', 'added after the manifest was written', True),
    ],
)
def test_what_has_changed(prepared, data, name, change, kind, text, is_quick):
    path = prepared / 'haze' / name
    change(path)
    out = data('check out', status=1)
    assert f'1 {kind}' in out and f'{kind}  {path}: {text}' in out
    assert 'out/test.jsonl: 2 pairs: unchanged' in out
    if is_quick:
        assert name in data('check out/train.jsonl --quick', status=1)
    data('check out/test.jsonl', status=int(kind == 'extra'))


def test_a_key_of_two_pairs_is_reported(prepared, data):
    path = prepared / 'out/train.jsonl'
    path.write_text(path.read_text().replace('"key": "02"', '"key": "01"'))
    assert 'key twice  01: line 3' in data('check out', status=1)
    assert '1 key twice' in data('check out --quick', status=1)
    assert 'belong to several pairs' in data('lmdb out/train.jsonl lmdb', status=2)


def test_lmdbs_and_their_manifest(prepared, data):
    data('lmdb out/train.jsonl lmdb')
    out = data('check lmdb --manifest out/train.jsonl')
    assert 'lmdb/lq.lmdb: intact' in out and 'lmdb/gt.lmdb: intact' in out and '4 pairs in lmdb: unchanged' in out
    assert 'lq.lmdb: intact' in data('check lmdb/lq.lmdb')
    assert '--quick is only valid for image folders' in data('check lmdb --quick', status=2)
    write_noise(Path('haze/hazy/02_hazy.png'), 999)
    data('prepare densehaze haze out')
    out = data('check lmdb --manifest out/train.jsonl', status=1)
    assert '1 changed' in out and 'lq.lmdb/02' in out
    assert '4 missing or damaged, 8 extra' in data('check lmdb --manifest out/test.jsonl', status=1)
    path = prepared / 'lmdb' / 'lq.lmdb' / 'data.mdb'
    content = bytearray(path.read_bytes())
    content[content.index(b'IDAT', len(content) // 2) + 40] ^= 1
    path.write_bytes(content)
    out = data('check lmdb', status=1)
    assert 'lq.lmdb: 1 fault\n' in out and 'gt.lmdb: intact' in out


def test_names_that_are_no_text(prepared, basicsr):
    strange = os.fsdecode(b'fog \xff\n')
    os.rename('haze', strange)
    out, _ = basicsr('data', 'prepare', 'densehaze', strange, f'{strange}_out')
    assert 'fog \\udcff' in out and 'prepared 6 pairs' in out
    (prepared / strange / 'GT/02_GT.png').write_bytes(b'')
    out, _ = basicsr('data', 'check', f'{strange}_out', status=1)
    assert '1 unreadable' in out and '/GT/02_GT.png: the file is empty' in out
    basicsr('data', 'prepare', 'densehaze', strange, f'{strange}_out', status=2)
