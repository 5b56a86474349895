"""Command line of `basicsr data prepare`, `check` and `lmdb`: output and error messages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ast_plugin.cli import data
from ast_plugin.cli.main import main
from ast_plugin.data.pairs_dataset import PairsDataset
from tests.data.images import write_noise


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


def run(capfd, *arguments, status=0) -> tuple[str, str]:
    capfd.readouterr()
    assert main(['data', *map(str, arguments)]) == status
    out, err = capfd.readouterr()
    assert 'Traceback' not in out + err
    return out, err


def test_what_is_printed(folder, capfd):
    out, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out')
    assert err == ''
    lines = out.splitlines()
    assert lines[0] == f'AGAN-Data in {folder}/raindrop'
    assert lines[2].split() == ['split', 'pairs', 'faulty', 'width', 'x', 'height', 'files', 'from']
    assert [line.split()[:4] + line.split()[-1:] for line in lines[3:6]] == [
        ['train', '4', '0', '24x16', 'train/train/data'],
        ['test_a', '2', '0', '24x16', 'test_a/test_a/data'],
        ['test_b', '2', '0', '24x16', 'test_b/test_b/data'],
    ]
    assert 'prepared 8 pairs' in out and max(map(len, lines)) < 120


def test_the_lines_for_an_option_file_work(folder, capfd):
    out, _ = run(capfd, 'prepare', 'agan', 'raindrop', "it's out")
    sections = yaml.safe_load(out.partition('use instead of dataroot and split:\n')[2])['datasets']
    assert list(sections) == ['train', 'val', 'val_2']
    for name, section in sections.items():
        assert section.pop('name').startswith("it's out_")
        assert section.pop('type') == 'PairsDataset'
        phase = name.partition('_')[0]
        options = {'phase': phase, **section, **({'gt_size': 8} if phase == 'train' else {})}
        assert len(PairsDataset(options)) == {'train': 4, 'val': 2}[phase]


def test_faults_are_rejected_and_then_left_out(folder, capfd):
    (folder / 'raindrop/train/train/data/1_rain.png').write_bytes(b'')
    (folder / 'raindrop/train/train/gt/2_clean.png').unlink()
    out, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out', status=2)
    assert '1 x unreadable' in out and 'train/train/data/1_rain.png: the file is empty' in out
    assert '1 x no partner' in out and '2_rain.png: no 2_clean.* in train/train/gt' in out
    assert err.startswith('basicsr: error: nothing was prepared')
    assert 'faults: 2; fix or remove the files, or exclude them with --skip-faulty' in err
    faults = (folder / 'out/faults.txt').read_text()
    assert f'{folder}/out/faults.txt' in err and faults.count('\n') == 2
    assert not list((folder / 'out').glob('*.jsonl'))
    out, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--skip-faulty')
    assert 'prepared 6 pairs' in out and 'excluded faults: 2' in out
    assert (folder / 'out/faults.txt').read_text() == faults


def test_leaks_are_rejected_and_then_accepted(folder, capfd):
    shutil.copy('raindrop/train/train/data/3_rain.png', 'raindrop/test_a/test_a/data/0_rain.png')
    out, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out', status=2)
    assert 'test_a: 1 degraded image is also in train' in out
    assert 'test_a/test_a/data/0_rain.png = train/train/data/3_rain.png' in out
    assert '1 images in both training and test' in err and '--allow-duplicates' in err
    assert 'also in train' in (folder / 'out/faults.txt').read_text()
    run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--skip-faulty', status=2)
    out, _ = run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--allow-duplicates')
    assert 'prepared 8 pairs' in out


def test_only_some_splits(folder, capfd):
    run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--split', 'test_b', '--split', 'train')
    assert sorted(os.listdir('out')) == ['test_b.jsonl', 'train.jsonl']
    out, _ = run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--split', 'test_a')
    assert 'kept from an earlier run: test_b.jsonl, train.jsonl' in out
    (folder / 'raindrop/test_a/test_a/data/0_rain.png').write_bytes(b'')
    (folder / 'raindrop/test_a/test_a/data/1_rain.png').write_bytes(b'')
    _, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--split', 'test_a', '--skip-faulty', status=2)
    assert 'no pair of raindrop is usable' in err


def test_plain_folders(folder, capfd):
    arguments = ('--lq', '{split}/{split}/data', '--gt', '{split}/{split}/gt')
    templates = ('--lq-template', '{}_rain', '--gt-template', '{}_clean')
    out, _ = run(capfd, 'prepare', 'folders', 'raindrop', 'out', *arguments, *templates)
    assert 'prepared 4 pairs' in out


@pytest.fixture
def prepared(tmp_path, monkeypatch, capfd):
    """A working directory with a prepared dataset; Dense-Haze keeps both splits in the same folders."""
    for number in (1, 2, 3, 50, 51, 52):
        write_noise(tmp_path / f'haze/hazy/{number:02d}_hazy.png', number)
        write_noise(tmp_path / f'haze/GT/{number:02d}_GT.png', number + 100)
    write_noise(tmp_path / 'haze/GT/mask.png', 0)
    monkeypatch.chdir(tmp_path)
    run(capfd, 'prepare', 'densehaze', 'haze', 'out')
    return tmp_path


def check(capfd, *arguments, status=0) -> str:
    return ''.join(run(capfd, 'check', *arguments, status=status))


def link_to_itself(path):
    path.unlink()
    path.symlink_to(path.name)


BREAKS = [  # change of a file, kind and text of the report, and whether --quick detects it
    ('hazy/02_hazy.png', Path.unlink, 'missing', 'no such file', True),
    ('hazy/02_hazy.png', lambda path: write_noise(path, 999), 'changed', 'its pixels differ from the manifest', False),
    (
        'hazy/02_hazy.png',
        lambda path: write_noise(path, 2, (24, 16)),
        'changed',
        '16x24 pixels, but 24x16 in the manifest',
        False,
    ),
    ('hazy/02_hazy.png', lambda path: path.write_bytes(b'x'), 'unreadable', 'not a PNG', True),
    ('hazy/02_hazy.png', link_to_itself, 'unreadable', 'Too many levels of symbolic links', True),
    ('GT/03_GT_new.png', lambda path: write_noise(path, 5), 'extra', 'added after the manifest was written', True),
]


def test_all_as_it_was(prepared, capfd):
    out = check(capfd, 'out', '--workers', 2)
    assert out.splitlines() == [
        'out/test.jsonl: 2 pairs: unchanged',
        'out/train.jsonl: 4 pairs: unchanged',
    ]
    check(capfd, 'out/test.jsonl', '--quick')
    path = prepared / 'haze/hazy/02_hazy.png'
    path.write_bytes(path.read_bytes() + b'more')  # the same pixels
    check(capfd, 'out')
    assert '1 changed' in check(capfd, 'out', '--quick', status=1)


@pytest.mark.parametrize(('name', 'change', 'kind', 'text', 'is_quick'), BREAKS)
def test_what_has_changed(prepared, capfd, name, change, kind, text, is_quick):
    path = prepared / 'haze' / name
    change(path)
    out = check(capfd, 'out', status=1)
    assert f'1 {kind}' in out and f'{kind}  {path}: {text}' in out
    assert 'out/test.jsonl: 2 pairs: unchanged' in out
    if is_quick:
        assert name in check(capfd, 'out/train.jsonl', '--quick', status=1)
    check(capfd, 'out/test.jsonl', status=int(kind == 'extra'))


def test_a_key_of_two_pairs_is_reported(prepared, capfd):
    path = prepared / 'out/train.jsonl'
    path.write_text(path.read_text().replace('"key": "02"', '"key": "01"'))
    assert 'key twice  01: line 3' in check(capfd, 'out', status=1)
    assert '1 key twice' in check(capfd, 'out', '--quick', status=1)
    assert main(['data', 'lmdb', 'out/train.jsonl', 'lmdb']) == 2
    assert 'belong to several pairs' in capfd.readouterr().err


def test_lmdbs_and_their_manifest(prepared, capfd):
    run(capfd, 'lmdb', 'out/train.jsonl', 'lmdb')
    out = check(capfd, 'lmdb', '--manifest', 'out/train.jsonl')
    assert 'lmdb/lq.lmdb: intact' in out and 'lmdb/gt.lmdb: intact' in out and '4 pairs in lmdb: unchanged' in out
    assert 'lq.lmdb: intact' in check(capfd, 'lmdb/lq.lmdb')
    assert '--quick is only valid for image folders' in check(capfd, 'lmdb', '--quick', status=2)
    write_noise(Path('haze/hazy/02_hazy.png'), 999)
    run(capfd, 'prepare', 'densehaze', 'haze', 'out')
    out = check(capfd, 'lmdb', '--manifest', 'out/train.jsonl', status=1)
    assert '1 changed' in out and 'lq.lmdb/02' in out
    out = check(capfd, 'lmdb', '--manifest', 'out/test.jsonl', status=1)
    assert '4 missing or damaged, 8 extra' in out
    path = prepared / 'lmdb' / 'lq.lmdb' / 'data.mdb'
    data = bytearray(path.read_bytes())
    data[data.index(b'IDAT', len(data) // 2) + 40] ^= 1
    path.write_bytes(data)
    out = check(capfd, 'lmdb', status=1)
    assert 'lq.lmdb: 1 fault\n' in out and 'gt.lmdb: intact' in out


def test_names_that_are_no_text(prepared, capfd):
    strange = os.fsdecode(b'fog \xff\n')
    os.rename('haze', strange)
    assert main(['data', 'prepare', 'densehaze', strange, f'{strange}_out']) == 0
    out = capfd.readouterr().out
    assert 'fog \\udcff' in out and 'prepared 6 pairs' in out
    (prepared / strange / 'GT/02_GT.png').write_bytes(b'')
    out = check(capfd, f'{strange}_out', status=1)
    assert '1 unreadable' in out and '/GT/02_GT.png: the file is empty' in out
    assert main(['data', 'prepare', 'densehaze', strange, f'{strange}_out']) == 2


@pytest.mark.parametrize('name', data.COMMANDS)
def test_help_of_every_command_has_an_example(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main(['data', name, '--help'])
    assert caught.value.code == 0
    assert f'basicsr data {name} ' in capsys.readouterr().out.split('\n\n', 1)[1]


@pytest.mark.parametrize('arguments', [[], ['check']])
def test_help_without_docstrings(arguments):
    command = [sys.executable, '-OO', '-m', 'ast_plugin', 'data', *arguments, '--help']
    assert 'check' in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_no_command(capsys):
    assert main(['data']) == 2
    shown = capsys.readouterr().err
    assert all(f'  {name} ' in shown for name in data.COMMANDS)
