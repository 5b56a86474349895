"""`basicsr data check` names whatever is not as it was prepared."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from ast_plugin.cli.main import main


def picture(path: Path, seed, size=(16, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)
    cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, capfd):
    """A working directory with a prepared dataset."""
    for number in (1, 2, 3, 50, 51, 52):  # Dense-Haze keeps both splits in the same folders
        picture(tmp_path / f'haze/hazy/{number:02d}_hazy.png', number)
        picture(tmp_path / f'haze/GT/{number:02d}_GT.png', number + 100)
    picture(tmp_path / 'haze/GT/mask.png', 0)
    monkeypatch.chdir(tmp_path)
    assert main(['data', 'prepare', 'densehaze', 'haze', 'out']) == 0
    capfd.readouterr()
    return tmp_path


def check(capfd, *arguments, status=0) -> str:
    assert main(['data', 'check', *map(str, arguments)]) == status
    out, err = capfd.readouterr()
    assert 'Traceback' not in out + err
    return out + err


def break_missing(root):
    (root / 'hazy/02_hazy.png').unlink()


def break_pixels(root):
    picture(root / 'hazy/02_hazy.png', 999)


def break_size(root):
    picture(root / 'hazy/02_hazy.png', 2, (24, 16))


def break_file(root):
    path = root / 'hazy/02_hazy.png'
    path.write_bytes(path.read_bytes()[:-90])


def break_link(root):
    (root / 'hazy/02_hazy.png').unlink()
    os.symlink('02_hazy.png', root / 'hazy/02_hazy.png')


def add_picture(root):
    picture(root / 'GT/03_GT_new.png', 5)


BREAKS = [
    (break_missing, '1 missing', 'missing  {root}/hazy/02_hazy.png: there is no such file', True),
    (break_pixels, '1 changed', 'changed  {root}/hazy/02_hazy.png: other pixels than the manifest says', False),
    (break_size, '1 changed', 'changed  {root}/hazy/02_hazy.png: 16x24 pixels, the manifest says 24x16', False),
    (break_file, '1 unreadable', 'unreadable  {root}/hazy/02_hazy.png: the PNG file is damaged', True),
    (break_link, '1 unreadable', 'unreadable  {root}/hazy/02_hazy.png: Too many levels of symbolic links', True),
    (add_picture, '1 extra', 'extra  {root}/GT/03_GT_new.png: came after the manifest was made', True),
]


def test_all_as_it_was(folder, capfd):
    out = check(capfd, 'out')
    assert out.splitlines() == [
        'out/test.jsonl: 2 pairs: all as they were',
        'out/train.jsonl: 4 pairs: all as they were',
    ]
    check(capfd, 'out/test.jsonl', '--quick')
    check(capfd, 'out', '--workers', 2)


@pytest.mark.parametrize(('change', 'count', 'line', 'is_quick'), BREAKS)
def test_what_has_changed(folder, capfd, change, count, line, is_quick):
    change(folder / 'haze')
    out = check(capfd, 'out', status=1)
    assert count in out and line.format(root=folder / 'haze') in out
    assert 'out/test.jsonl: 2 pairs: all as they were' in out
    if is_quick:
        assert '02_hazy' in (out := check(capfd, 'out/train.jsonl', '--quick', status=1)) or '03_GT_new' in out
    check(capfd, 'out/test.jsonl', status=int(change is add_picture))


def test_the_same_pixels_in_another_file_are_no_change(folder, capfd):
    path = folder / 'haze/hazy/02_hazy.png'
    path.write_bytes(path.read_bytes() + b'more')
    check(capfd, 'out')
    assert '1 changed' in check(capfd, 'out', '--quick', status=1)


def test_a_key_of_two_pairs_is_told_as_it_is_when_they_are_packed(folder, capfd):
    path = folder / 'out/train.jsonl'
    path.write_text(path.read_text().replace('"key": "02"', '"key": "01"'))
    assert 'key twice  01: line 3' in check(capfd, 'out', status=1)
    assert '1 key twice' in check(capfd, 'out', '--quick', status=1)
    assert main(['data', 'lmdb', 'out/train.jsonl', 'lmdb']) == 2
    assert 'belong to several pairs' in capfd.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['nowhere'], 'nowhere: there is no such manifest or folder'),
        (['haze'], 'no manifest (*.jsonl) and no LMDB in it'),
        (['haze/GT/mask.png'], 'no manifest, which is text'),
        (['out', '--manifest', 'out/train.jsonl'], '--manifest is for LMDBs'),
        (['out', '--workers', '0'], '--workers is 0'),
        (['cut.jsonl'], 'says 4 pairs, 3 follow'),
        (['moved/train.jsonl'], 'which is no folder now'),
    ],
)
def test_wrong_usage(folder, capfd, arguments, expected):
    lines = (folder / 'out/train.jsonl').read_text().splitlines(keepends=True)
    (folder / 'cut.jsonl').write_text(''.join(lines[:-1]).replace('"../haze"', '"haze"'))
    (folder / 'moved').mkdir()
    (folder / 'moved/train.jsonl').write_text(''.join(lines).replace('"../haze"', '"../../haze"'))
    assert expected in check(capfd, *arguments, status=2)


# ---- LMDBs


@pytest.fixture
def lmdbs(folder, capfd):
    """LMDBs of the prepared training split."""
    assert main(['data', 'lmdb', 'out/train.jsonl', 'lmdb']) == 0
    capfd.readouterr()
    return folder / 'lmdb'


def test_lmdbs_as_they_were(lmdbs, capfd):
    out = check(capfd, 'lmdb', '--manifest', 'out/train.jsonl')
    assert 'lmdb/lq.lmdb: whole' in out and 'lmdb/gt.lmdb: whole' in out and '4 pairs in lmdb: all as they were' in out
    assert 'lq.lmdb: whole' in check(capfd, 'lmdb/lq.lmdb')


def test_lmdbs_of_other_pictures(lmdbs, capfd):
    picture(Path('haze/hazy/02_hazy.png'), 999)
    check(capfd, 'lmdb')
    assert main(['data', 'prepare', 'densehaze', 'haze', 'out']) == 0
    out = check(capfd, 'lmdb', '--manifest', 'out/train.jsonl', status=1)
    assert '1 changed' in out and 'lq.lmdb/02' in out
    out = check(capfd, 'lmdb', '--manifest', 'out/test.jsonl', status=1)
    assert '4 missing or damaged, 8 extra' in out


def test_a_damaged_lmdb(lmdbs, capfd):
    path = lmdbs / 'lq.lmdb' / 'data.mdb'
    data = bytearray(path.read_bytes())
    start = data.index(b'IDAT', len(data) // 2)
    data[start + 40] ^= 1
    path.write_bytes(data)
    out = check(capfd, 'lmdb', '--manifest', 'out/train.jsonl', status=1)
    assert 'lq.lmdb: 1 fault\n' in out and 'gt.lmdb: whole' in out


def test_lmdbs_are_not_checked_quickly(lmdbs, capfd):
    assert '--quick is for folders' in check(capfd, 'lmdb', '--quick', status=2)


def test_names_that_are_no_text(folder, capfd):
    strange = os.fsdecode(b'fog \xff\n')
    os.rename('haze', strange)
    assert main(['data', 'prepare', 'densehaze', strange, f'{strange}_out']) == 0
    out = capfd.readouterr().out
    assert 'fog \\udcff' in out and 'prepared 6 pairs' in out
    (folder / strange / 'GT/02_GT.png').write_bytes(b'')
    out = check(capfd, f'{strange}_out', status=1)
    assert '1 unreadable' in out and 'fog \\udcff\\n/GT/02_GT.png: the file is empty' in out
    assert main(['data', 'prepare', 'densehaze', strange, f'{strange}_out']) == 2
