"""`basicsr data prepare` as a user meets it: what it prints, what it refuses, and what it says then."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from ast_plugin.cli import data
from ast_plugin.cli.main import main
from ast_plugin.data.pairs_dataset import PairsDataset


def picture(path: Path, seed, size=(16, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with raindrops as they are distributed."""
    for split, count in (('train', 4), ('test_a', 2), ('test_b', 2)):
        for number in range(count):
            picture(tmp_path / f'raindrop/{split}/{split}/data/{number}_rain.png', [len(split), number, ord(split[-1])])
            picture(tmp_path / f'raindrop/{split}/{split}/gt/{number}_clean.png', [9, number, ord(split[-1])])
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
    sections = yaml.safe_load(out.partition('in place of dataroot and split:\n')[2])['datasets']
    assert list(sections) == ['train', 'val', 'val_2']
    for name, section in sections.items():
        assert section.pop('name').startswith("it's out_")
        assert section.pop('type') == 'PairsDataset'
        phase = name.partition('_')[0]
        options = {'phase': phase, **section, **({'gt_size': 8} if phase == 'train' else {})}
        assert len(PairsDataset(options)) == {'train': 4, 'val': 2}[phase]


def test_faults_are_refused_and_then_left_out(folder, capfd):
    (folder / 'raindrop/train/train/data/1_rain.png').write_bytes(b'')
    (folder / 'raindrop/train/train/gt/2_clean.png').unlink()
    out, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out', status=2)
    assert '1 x unreadable' in out and 'train/train/data/1_rain.png: the file is empty' in out
    assert '1 x no partner' in out and '2_rain.png: no 2_clean.* in train/train/gt' in out
    assert err.startswith('basicsr: error: nothing was prepared')
    assert 'faults: 2; mend or remove the files, or leave them out with --skip-faulty' in err
    faults = (folder / 'out/faults.txt').read_text()
    assert f'{folder}/out/faults.txt' in err and faults.count('\n') == 2
    assert not list((folder / 'out').glob('*.jsonl'))
    out, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--skip-faulty')
    assert 'prepared 6 pairs' in out and 'left out for faults: 2' in out
    assert (folder / 'out/faults.txt').read_text() == faults


def test_leaks_are_refused_and_then_accepted(folder, capfd):
    shutil.copy('raindrop/train/train/data/3_rain.png', 'raindrop/test_a/test_a/data/0_rain.png')
    out, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out', status=2)
    assert 'test_a: 1 degraded image is in train, too' in out
    assert 'test_a/test_a/data/0_rain.png = train/train/data/3_rain.png' in out
    assert '1 images in training and test alike' in err and '--allow-duplicates' in err
    assert 'in train, too' in (folder / 'out/faults.txt').read_text()
    run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--skip-faulty', status=2)
    out, _ = run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--allow-duplicates')
    assert 'prepared 8 pairs' in out


def test_nothing_that_can_be_used(folder, capfd):
    for path in (folder / 'raindrop').rglob('*.png'):
        path.write_bytes(b'')
    _, err = run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--skip-faulty', status=2)
    assert 'no pair of raindrop can be used' in err


def test_only_some_splits(folder, capfd):
    run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--split', 'test_b', '--split', 'train')
    assert sorted(os.listdir('out')) == ['test_b.jsonl', 'train.jsonl']
    out, _ = run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--split', 'test_a')
    assert 'from an earlier run, and left as it is: test_b.jsonl, train.jsonl' in out


def test_the_folder_of_one_split(folder, capfd):
    assert 'prepared 4 pairs' in run(capfd, 'prepare', 'agan', 'raindrop/train', 'out')[0]


def test_plain_folders(folder, capfd):
    arguments = ('--lq', '{split}/{split}/data', '--gt', '{split}/{split}/gt')
    templates = ('--lq-template', '{}_rain', '--gt-template', '{}_clean')
    out, _ = run(capfd, 'prepare', 'folders', 'raindrop', 'out', *arguments, *templates)
    assert 'prepared 4 pairs' in out


def test_copies_can_be_read_by_basicsr(folder, capfd):
    from basicsr.data.paired_image_dataset import PairedImageDataset

    run(capfd, 'prepare', 'agan', 'raindrop', 'out', '--copy')
    roots = {'dataroot_lq': 'out/train/lq', 'dataroot_gt': 'out/train/gt'}
    dataset = PairedImageDataset(
        {**roots, 'phase': 'val', 'scale': 1, 'io_backend': {'type': 'disk'}, 'filename_tmpl': '{}', 'name': 'x'}
    )
    assert len(dataset) == 4 and dataset[0]['lq'].shape == (3, 16, 24)


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['agn', 'raindrop', 'out'], 'no layout agn, did you mean agan?'),
        (['agan', 'nowhere', 'out'], 'nowhere: there is no such folder'),
        (['istd', 'raindrop', 'out'], 'ISTD is not in'),
        (
            ['folders', 'raindrop/train/train', 'out', '--lq', 'data', '--gt', 'gt'],
            'there is data, gt, but no image of data has a partner in gt. Name',
        ),
        (['agan', 'raindrop', 'raindrop/out'], 'lies in the dataset'),
        (['agan', 'raindrop', 'out', '--workers', '0'], '--workers is 0'),
        (['agan', 'raindrop', 'out', '--split', 'val'], 'no split val'),
        (['agan', 'raindrop', 'out', '--lq', 'x', '--gt', 'y'], 'for the layout folders, not for agan'),
        (['folders', 'raindrop', 'out', '--lq', 'x'], '--lq and --gt go together'),
        (['folders', 'raindrop', 'out', '--lq-template', 'rain'], 'a name template has one {}'),
    ],
)
def test_wrong_usage(folder, capfd, arguments, expected):
    _, err = run(capfd, 'prepare', *arguments, status=2)
    assert err.startswith('basicsr: error: ') and expected in err
    assert not (folder / 'out').exists()


# ---- the commands of `basicsr data`


@pytest.mark.parametrize('name', data.COMMANDS)
def test_help_of_every_command_has_an_example(capsys, name):
    with pytest.raises(SystemExit) as caught:
        main(['data', name, '--help'])
    assert caught.value.code == 0
    assert f'basicsr data {name} ' in capsys.readouterr().out.split('\n\n', 1)[1]


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [(['prepar'], 'no command prepar, did you mean prepare?'), (['xyz'], 'no command xyz (there are prepare')],
)
def test_commands_that_are_none(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as caught:
        main(['data', *arguments])
    assert caught.value.code == 2 and complaint in capsys.readouterr().err


def test_no_command(capsys):
    assert main(['data']) == 2
    shown = capsys.readouterr().err
    assert all(f'  {name} ' in shown for name in data.COMMANDS)
