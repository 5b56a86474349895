"""Training states on disk: which is resumed, which is passed over, which are kept."""

import pytest
import torch

from ast_plugin.checkpoints import save_torch
from ast_plugin.errors import CheckpointError
from ast_plugin.training_states import STATE, WEIGHTS, keep_newest, newest_whole, read_state


def write(folder, *iterations):
    for iteration in iterations:
        save_torch(folder / f'{iteration}.state', {'iter': iteration, 'tensor': torch.rand(2000)})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('damage', [flip_a_bit, cut, empty])
def test_the_newest_whole_state_is_found_and_broken_ones_are_named(tmp_path, damage):
    write(tmp_path, 5, 10, 9)
    (tmp_path / 'other.state').touch()
    (tmp_path / '.11.state.abc.tmp').touch()
    assert newest_whole(tmp_path) == tmp_path / '10.state'
    damage(tmp_path / '10.state')
    lines = []
    assert newest_whole(tmp_path, lines.append) == tmp_path / '9.state'
    assert len(lines) == 1
    assert '10.state is no training state' in lines[0]
    damage(tmp_path / '9.state')
    damage(tmp_path / '5.state')
    assert newest_whole(tmp_path, lines.append) is None
    assert newest_whole(tmp_path / 'missing') is None


def test_torch_alone_does_not_see_a_flipped_bit(tmp_path):
    write(tmp_path, 5)
    flip_a_bit(tmp_path / '5.state')
    torch.load(tmp_path / '5.state', weights_only=True)
    with pytest.raises(CheckpointError, match='is damaged'):
        read_state(tmp_path / '5.state')


@pytest.mark.parametrize('content', [{'iter': '5'}, {'iter': -1}, {}, [5]])
def test_what_is_no_state(tmp_path, content):
    save_torch(tmp_path / '5.state', content)
    with pytest.raises(CheckpointError, match=r'5\.state is no training state'):
        read_state(tmp_path / '5.state')


def test_a_state_in_torchs_older_format_is_read(tmp_path):
    torch.save({'iter': 3}, tmp_path / '3.state', _use_new_zipfile_serialization=False)
    assert read_state(tmp_path / '3.state') == {'iter': 3}


def test_the_last_ones_are_kept_and_leftovers_go(tmp_path):
    write(tmp_path, 5, 10, 15, 20)
    for name in ('.25.state.abc.tmp', 'notes.txt', 'net_g_5.pth', '100.state.abandoned'):
        (tmp_path / name).touch()
    keep_newest(tmp_path, STATE, 20, 2)
    assert names(tmp_path) == ['100.state.abandoned', '15.state', '20.state', 'net_g_5.pth', 'notes.txt']


def test_weights_that_are_not_of_an_iteration_stay(tmp_path):
    for name in ('5', '10', 'best', 'latest'):
        (tmp_path / f'net_g_{name}.pth').touch()
    keep_newest(tmp_path, WEIGHTS, 10, 1)
    assert names(tmp_path) == ['net_g_10.pth', 'net_g_best.pth', 'net_g_latest.pth']


def test_a_run_that_went_back_is_not_overtaken_by_what_it_left(tmp_path):
    write(tmp_path, 5, 10, 15, 20)
    write(tmp_path, 6)
    keep_newest(tmp_path, STATE, 6, 3)
    assert newest_whole(tmp_path) == tmp_path / '6.state'
    assert names(tmp_path) == [f'{n}.state{end}' for n, end in ((10, '.abandoned'), (15, '.abandoned'))] + [
        '20.state.abandoned',
        '5.state',
        '6.state',
    ]
