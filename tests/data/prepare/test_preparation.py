"""Preparing: what is found, what is left out, and that no run leaves anything that looks finished and is not."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from ast_plugin.data.manifest import read_manifest
from ast_plugin.data.prepare import checks as pair_checks
from ast_plugin.data.prepare.preparation import Preparation, format_options
from ast_plugin.data.prepare.splits import find_splits
from ast_plugin.errors import DataError
from ast_plugin.options.sections import FolderName
from tests.data.images import contents, write_noise


def make_agan(root: Path, train=6, test=3) -> Path:
    for split, count in (('train', train), ('test_a', test)):
        for number in range(count):
            write_noise(root / split / 'data' / f'{number}_rain.png', [len(split), number, 0])
            write_noise(root / split / 'gt' / f'{number}_clean.png', [len(split), number, 1])
    return root


def prepare(root: Path, target: Path, place=None, workers=1, layout='agan'):
    preparation = Preparation(find_splits(layout, root), root, target)
    checks = preparation.check(workers)
    return checks, preparation.write(checks, layout, place)


@pytest.mark.parametrize('workers', [1, 2])
def test_a_manifest_of_each_split(tmp_path, workers):
    root = make_agan(tmp_path / 'data')
    before = contents(root)
    checks, paths = prepare(root, tmp_path / 'out', workers=workers)
    assert [path.name for path in paths] == ['train.jsonl', 'test_a.jsonl'] == [path.name for path in paths]
    assert sorted(os.listdir(tmp_path / 'out')) == ['test_a.jsonl', 'train.jsonl']
    assert checks.num_faults == 0 and checks.leaks == []
    entry = next(read_manifest(paths[0]).entries())
    lq = root / 'train/data/0_rain.png'
    assert (entry.key, entry.lq, entry.gt, entry.size) == ('0', 'data/0_rain.png', 'gt/0_clean.png', (16, 24))
    assert entry.bytes[0] == lq.stat().st_size
    assert entry.digests[0] == pair_checks.digest_pixels(cv2.imread(str(lq))[..., ::-1])
    assert contents(root) == before


def test_what_is_not_plain_is_counted(tmp_path):
    root = make_agan(tmp_path / 'data')
    gray = cv2.imread(str(root / 'train/data/0_rain.png'), cv2.IMREAD_GRAYSCALE)
    cv2.imwrite(str(root / 'train/data/0_rain.png'), gray)
    write_noise(root / 'train/data/1_rain.png', 9, (8, 8))
    write_noise(root / 'train/gt/1_clean.png', 8, (8, 8))
    found = prepare(root, tmp_path / 'out')[0].splits[0]
    assert found.traits == {'gray': 1}
    assert found.sizes == {(16, 24): 5, (8, 8): 1}
    assert found.num_bytes == sum(path.stat().st_size for path in (root / 'train').rglob('*.png'))


def test_faulty_pairs_are_left_out(tmp_path):
    root = make_agan(tmp_path / 'data')
    (root / 'train/data/2_rain.png').write_bytes(b'')
    (root / 'train/gt/3_clean.png').unlink()
    checks, (train, _) = prepare(root, tmp_path / 'out')
    assert [(fault.kind, Path(fault.name).name) for fault in checks.splits[0].faults] == [
        ('no partner', '3_rain.png'),
        ('unreadable', '2_rain.png'),
    ]
    manifest = read_manifest(train)
    assert [entry.key for entry in manifest.entries()] == ['0', '1', '4', '5']
    assert sorted(manifest.others) == ['data/2_rain.png', 'data/3_rain.png', 'gt/2_clean.png']


def test_no_manifest_without_a_good_pair(tmp_path):
    root = make_agan(tmp_path / 'data', test=1)
    (root / 'test_a/data/0_rain.png').write_bytes(b'')
    assert [path.name for path in prepare(root, tmp_path / 'out')[1]] == ['train.jsonl']


# ---- duplicates


def test_leaks_of_test_pictures_into_training(tmp_path):
    root = make_agan(tmp_path / 'data')
    shutil.copy(root / 'train/data/4_rain.png', root / 'test_a/data/1_rain.png')
    shutil.copy(root / 'train/gt/5_clean.png', root / 'test_a/gt/2_clean.png')
    pixels = cv2.imread(str(root / 'train/gt/0_clean.png'))  # the same pixels in another file
    cv2.imwrite(str(root / 'test_a/gt/0_clean.png'), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 0])
    leaks = prepare(root, tmp_path / 'out')[0].leaks
    assert [(leak.first, leak.second, leak.kind, leak.num) for leak in leaks] == [
        ('train', 'test_a', 'degraded', 1),
        ('train', 'test_a', 'clean', 2),
    ]
    names = [[tuple(Path(name).name for name in pair) for pair in leak.examples] for leak in leaks]
    assert names == [[('4_rain.png', '1_rain.png')], [('0_clean.png', '0_clean.png'), ('5_clean.png', '2_clean.png')]]


def test_pictures_that_one_split_has_twice(tmp_path):
    root = make_agan(tmp_path / 'data')
    shutil.copy(root / 'train/data/1_rain.png', root / 'train/data/4_rain.png')
    shutil.copy(root / 'train/gt/0_clean.png', root / 'train/gt/2_clean.png')
    shutil.copy(root / 'train/gt/3_clean.png', root / 'train/data/3_rain.png')
    checks, _ = prepare(root, tmp_path / 'out')
    twins, others = (pair_checks.find_duplicates(split, split, 'degraded') for split in checks.splits)
    assert (twins.num, [Path(name).name for name in twins.examples[0]]) == (1, ['1_rain.png', '4_rain.png'])
    assert checks.splits[0].num_clean == 5
    assert checks.splits[0].num_unchanged == 1
    assert others.num == 0


# ---- killed, and run again


def count_checks(monkeypatch) -> list[str]:
    """Note which pairs are read from now on."""
    read, check = [], pair_checks.check_pair

    def noted(pair):
        read.append(Path(pair.lq).name)
        return check(pair)

    monkeypatch.setattr(pair_checks, 'check_pair', noted)
    return read


def stop_after(pairs: int):
    """A callback that ends a run as Ctrl-C does."""
    done = 0

    def on_pair():
        nonlocal done
        done += 1
        if done == pairs:
            raise KeyboardInterrupt

    return on_pair


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    root = make_agan(tmp_path / 'data')
    prepare(root, tmp_path / 'whole')
    preparation = Preparation(find_splits('agan', root), root, tmp_path / 'out')
    with pytest.raises(KeyboardInterrupt):
        preparation.check(1, stop_after(4))
    assert not list((tmp_path / 'out').glob('*.jsonl'))
    journal = next((tmp_path / 'out').iterdir())
    journal.write_bytes(journal.read_bytes()[:-20])  # as when killed in the middle of a line
    read = count_checks(monkeypatch)
    prepare(root, tmp_path / 'out')
    assert read == ['3_rain.png', '4_rain.png', '5_rain.png', '0_rain.png', '1_rain.png', '2_rain.png']
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_a_refused_run_reads_only_what_was_mended(tmp_path, monkeypatch):
    root = make_agan(tmp_path / 'data')
    (root / 'train/data/2_rain.png').write_bytes(b'')
    preparation = Preparation(find_splits('agan', root), root, tmp_path / 'out')
    assert preparation.check(1).num_faults == 1
    read = count_checks(monkeypatch)
    assert preparation.check(1).num_faults == 1 and read == []
    write_noise(root / 'train/data/2_rain.png', 77)
    assert preparation.check(1).num_faults == 0 and read == ['2_rain.png']


def test_rubbish_in_a_journal_is_not_believed(tmp_path, monkeypatch):
    root = make_agan(tmp_path / 'data')
    prepare(root, tmp_path / 'whole')
    (tmp_path / 'out').mkdir()
    lines = ['', 'null', '[]', '{"a": 1}', '[["x"]]', '\x00', '[' * 2000]
    (tmp_path / 'out/.train.checked').write_text('\n'.join(lines))
    read = count_checks(monkeypatch)
    prepare(root, tmp_path / 'out')
    assert len(read) == 9 and contents(tmp_path / 'out') == contents(tmp_path / 'whole')


COMMAND = [sys.executable, '-m', 'ast_plugin', 'data', 'prepare', 'agan']


def test_rest_of_a_killed_run_is_removed(tmp_path):
    root = make_agan(tmp_path / 'data', train=1, test=1)
    left, own = tmp_path / 'out/.train.jsonl.17-0a1b2c3d.part', tmp_path / 'out/.train.jsonl.mine'
    left.parent.mkdir()
    left.touch()
    own.touch()
    prepare(root, tmp_path / 'out')
    assert not left.exists() and own.exists()


def test_killed_at_any_moment(tmp_path):
    root = make_agan(tmp_path / 'data', train=150, test=60)
    command = [*COMMAND, root, tmp_path / 'out', '--workers', '2', '--copy']
    prepare(root, tmp_path / 'whole', 'copy')
    rng, kills = np.random.default_rng(5), 0
    for _ in range(5):
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.5))
        run.send_signal(signal.SIGKILL)
        kills += run.wait() == -signal.SIGKILL
        for path in (tmp_path / 'out').glob('*.jsonl'):
            assert read_manifest(path).num_pairs == len(read_manifest(path).pairs())
    assert kills
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


# ---- full disks and other hindrances


def limited():
    """A file system that takes no file of more than 2 kB; Python sees an error where the disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))


@pytest.mark.parametrize('place', [[], ['--copy']])
def test_a_full_disk(tmp_path, place):
    root = make_agan(tmp_path / 'data', train=20)
    if place:  # the journal is there already, and the pictures are larger than the limit
        write_noise(root / 'train/data/7_rain.png', 1, (64, 64))
        write_noise(root / 'train/gt/7_clean.png', 2, (64, 64))
        Preparation(find_splits('agan', root), root, tmp_path / 'out').check(1)
    command = [*COMMAND, root, tmp_path / 'out', *place]
    run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
    assert run.returncode == 2
    assert run.stderr.startswith('basicsr: error: cannot ') and 'File too large' in run.stderr
    assert 'Traceback' not in run.stderr
    assert not list((tmp_path / 'out').glob('*.jsonl'))
    prepare(root, tmp_path / 'out', 'copy' if place else None)
    prepare(root, tmp_path / 'whole', 'copy' if place else None)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')


def test_the_dataset_is_never_written_to(tmp_path):
    root = make_agan(tmp_path / 'data')
    os.symlink(root, tmp_path / 'link')
    for target in (root, root / 'out', tmp_path / 'link' / 'deep' / 'out'):
        with pytest.raises(DataError, match='lies in the dataset'):
            Preparation(find_splits('agan', root), root, target)


def test_targets_that_are_no_folders(tmp_path):
    root = make_agan(tmp_path / 'data')
    (tmp_path / 'file').touch()
    for target in (tmp_path / 'file', tmp_path / 'file' / 'out'):
        with pytest.raises(DataError, match='cannot be made'):
            Preparation(find_splits('agan', root), root, target)


@pytest.mark.parametrize('name', ['train.jsonl', 'train/mine.png'])
def test_files_of_others_are_left_alone(tmp_path, name):
    root = make_agan(tmp_path / 'data')
    (tmp_path / 'out' / name).parent.mkdir(parents=True)
    (tmp_path / 'out' / name).write_text('mine')
    with pytest.raises(DataError, match='is there already'):
        prepare(root, tmp_path / 'out', 'copy')
    assert (tmp_path / 'out' / name).read_text() == 'mine'


def test_two_runs_do_not_meet(tmp_path):
    root = make_agan(tmp_path / 'data')
    with Preparation(find_splits('agan', root), root, tmp_path / 'out').lock():
        run = subprocess.run([*COMMAND, root, tmp_path / 'out'], capture_output=True, text=True)
        assert run.returncode == 2 and 'out: another run is preparing there; wait for it' in run.stderr
        assert os.listdir(tmp_path / 'out') == []
    with Preparation(find_splits('agan', root), root, tmp_path / 'out').lock():
        pass  # the lock was let go


# ---- copies and links


@pytest.mark.parametrize('place', ['copy', 'link'])
def test_copies_and_links(tmp_path, place):
    root = make_agan(tmp_path / 'data')
    _, (train, _) = prepare(root, tmp_path / 'out', place)
    manifest = read_manifest(train)
    assert json.loads(train.read_text().splitlines()[0])['root'] == 'train'
    for entry, pair in zip(manifest.entries(), manifest.pairs(), strict=True):
        assert (entry.lq, entry.gt) == (f'lq/{entry.key}.png', f'gt/{entry.key}.png')
        assert Path(pair.lq).read_bytes() == (root / f'train/data/{entry.key}_rain.png').read_bytes()
        assert Path(pair.gt).is_symlink() == (place == 'link')


def test_a_second_run_drops_what_is_gone(tmp_path):
    root = make_agan(tmp_path / 'data')
    prepare(root, tmp_path / 'out', 'copy')
    for name in ('data/0_rain.png', 'gt/0_clean.png'):
        (root / 'train' / name).unlink()
    write_noise(root / 'train/data/1_rain.png', 55)
    prepare(root, tmp_path / 'out', 'copy')
    prepare(root, tmp_path / 'anew', 'copy')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'anew')
    prepare(root, tmp_path / 'out', 'link')
    assert (tmp_path / 'out/train/lq/1.png').is_symlink()


def test_copies_differ_beyond_capitals(tmp_path):
    root = tmp_path / 'data'
    for number, name in enumerate(('a', 'A', 'sub_x')):
        write_noise(root / 'lq' / f'{name}.png', number)
        write_noise(root / 'gt' / f'{name}.png', number + 10)
    _, (train,) = prepare(root, tmp_path / 'out', 'copy', layout='folders')
    assert sorted(os.listdir(tmp_path / 'out/train/lq')) == ['A.png', 'a_2.png', 'sub_x.png']
    for pair in read_manifest(train).pairs():
        assert Path(pair.lq).name == Path(pair.gt).name


def test_a_clean_picture_of_many_is_copied_once(tmp_path):
    root = tmp_path / 'data'
    write_noise(root / 'ITS/clear/1.png', 0)
    for number in range(4):
        write_noise(root / f'ITS/hazy/1_{number}_0.9.png', number + 1)
    _, (manifest,) = prepare(root, tmp_path / 'out', 'copy', layout='reside')
    clean = [Path(pair.gt) for pair in read_manifest(manifest).pairs()]
    assert len(clean) == 4 and len({path.stat().st_ino for path in clean}) == 1


@pytest.mark.parametrize(
    ('folder', 'name'),
    [
        ('agan', 'agan_train'),
        ('.cache', 'cache_train'),
        ('', 'train'),
        ("it's: #1", "it's: #1_train"),
        ('a\\b', 'a_b_train'),
        (os.fsdecode(b'fog\xff\n'), '_'.join(('fog', 'udcff', 'n', 'train'))),
        ('x' * 250, f'{"x" * 80}_train'),
    ],
)
def test_names_of_datasets(folder, name):
    lines = format_options([('train', Path('/data') / folder / 'train.jsonl' if folder else Path('/train.jsonl'))])
    # A path whose bytes are no text cannot be in YAML.
    readable = '\n'.join(lines).encode('utf-8', 'replace').decode()
    assert TypeAdapter(FolderName).validate_python(yaml.safe_load(readable)['datasets']['train']['name']) == name
