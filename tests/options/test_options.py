"""Option files: safe reading, overrides, completion for BasicSR."""

import copy
import os
import textwrap

import pytest

from ast_plugin import options
from ast_plugin.errors import OptionError


def load(tmp_path, text, *overrides):
    file = tmp_path / 'file.yml'
    file.write_text(textwrap.dedent(text), encoding='utf-8')
    return options.load(file, overrides)


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('1e-4', 1e-4),
        ('.5', 0.5),
        ('-3', -3),
        ('1_000', 1000),
        ('010', 10),
        ('0x1F', 31),
        ('-.inf', float('-inf')),
        ('!!float 5e3', 5000.0),
        ('!!str 5', '5'),
        ("'1e-4'", '1e-4'),
        ('1:30', '1:30'),
        ('2024-01-02', '2024-01-02'),
        ('1e', '1e'),
        ('true', True),
        ('No', False),
        ('on', True),
        ('y', 'y'),
        ('~', None),
        ('', None),
        ('none', 'none'),
        ('[1, 2e0, a]', [1, 2.0, 'a']),
        ('{a: {b: 1}}', {'a': {'b': 1}}),
        ("'<<'", '<<'),
    ],
)
def test_values(tmp_path, text, value):
    read = load(tmp_path, f'key: {text}\n')['key']
    assert read == value
    assert type(read) is type(value)


def test_aliases_and_merge_keys(tmp_path):
    opt = load(
        tmp_path,
        """\
        base: &base {type: disk, size: 1}
        same: *base
        more: {<<: *base, size: 2}
        both: {<<: [{size: 3}, *base]}
        """,
    )
    assert opt['same'] == {'type': 'disk', 'size': 1}
    assert opt['same'] is not opt['base']
    assert opt['more'] == {'type': 'disk', 'size': 2}
    assert opt['both'] == {'type': 'disk', 'size': 3}


BOMB = 'a: &a [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join(["*" + before] * 10)}]\n' for before, name in zip('abcdefg', 'bcdefgh', strict=True)
)


@pytest.mark.parametrize(
    ('text', 'complaint'),
    [
        ('', 'got nothing'),
        ('# only a comment\n', 'got nothing'),
        ('- a\n- b\n', 'got a list'),
        ('a: 1\n\tb: 2\n', 'not YAML'),
        ('a:\n\t- 1\n', 'spaces, not tabs'),
        ('a: [1, 2\nb: 3\n', 'file.yml:2: not YAML'),
        ('a: 1\n---\nb: 2\n', 'not YAML'),
        ('a: 1\nb: 2\na: 3\n', 'file.yml:3: the key a is given twice'),
        ('1: a\n', 'keys must be text, got 1'),
        ('{a: 1}: b\n', "keys must be text, got {'a': 1}"),
        ('a: {{ value }}\n', 'keys must be text'),
        ('a: "{{ os.system(1) }}"\n', 'a: templates are not filled in'),
        ('a: {b: ["${HO ME}/x"]}\n', 'a.b.0: expected ${NAME} or ${NAME:default}'),
        ('a: "${${HOME}}"\n', 'a: expected ${NAME} or ${NAME:default}'),
        ('"${HOME}": 1\n', 'templates are not filled in where keys are'),
        ('custom_imports: {imports: [antigravity]}\n', 'custom_imports: refused'),
        ('a: !!python/object/apply:os.system ["touch ran"]\n', 'the tag !!python/object/apply:os.system is refused'),
        ('a: !!python/name:os.system\n', 'is refused'),
        ('!!python/object/new:os.system ["touch ran"]\n', 'is refused'),
        ('a: !!binary aGVsbG8=\n', 'the tag !!binary is refused'),
        ('a: !own b\n', 'the tag !own is refused'),
        ('a: !!float x\n', "cannot be read as float: 'x'"),
        ('a: ' + '9' * 5000 + '\n', 'cannot be read as int'),
        ('a: *b\n', 'not YAML'),
        ('a: &a [*a]\n', 'does an alias hold itself'),
        ('<<: 1\n', 'takes a mapping'),
        ('a: ' + '[' * 50_000, 'nested deeper'),
        (BOMB, 'values once its aliases are expanded'),
        ('a: ' + 'x' * 300_000, 'larger than 256 KiB'),
    ],
)
def test_refused(tmp_path, monkeypatch, text, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError) as caught:
        load(tmp_path, text)
    assert complaint in str(caught.value)
    assert 'file.yml' in str(caught.value)
    assert os.listdir(tmp_path) == ['file.yml']


@pytest.mark.parametrize('content', [b'\xff\xfe\x00\x01', b'\x89PNG\r\n\x1a\n\x00\x00', b'name: caf\xe9\n', b'a: \x00'])
def test_binary_refused(tmp_path, content):
    file = tmp_path / 'file.yml'
    file.write_bytes(content)
    with pytest.raises(OptionError, match=r'file\.yml'):
        options.load(file)


def test_byte_order_mark_is_accepted(tmp_path):
    file = tmp_path / 'file.yml'
    file.write_bytes('name: é\n'.encode('utf-8-sig'))
    assert options.load(file) == {'name': 'é'}


FILE = """\
name: x
train: {total_iter: 5, periods: [1, 2, 3], optim_g: {lr: 1}}
list: [{a: 1}, {a: 2}]
path:
"""


@pytest.mark.parametrize(
    ('override', 'keys', 'value'),
    [
        ('name=y', ['name'], 'y'),
        ('new=3', ['new'], 3),
        ('train:total_iter=1e3', ['train', 'total_iter'], 1e3),
        ('train:new=true', ['train', 'new'], True),
        ('train:optim_g:betas=[0.9, 0.99]', ['train', 'optim_g', 'betas'], [0.9, 0.99]),
        ('train:optim_g={type: Adam}', ['train', 'optim_g'], {'type': 'Adam'}),
        ('train:periods:1=9', ['train', 'periods', 1], 9),
        ('list:0:b=1', ['list', 0, 'b'], 1),
        ('path:resume_state=a=b', ['path', 'resume_state'], 'a=b'),
        ('name=None', ['name'], None),
        ("name='1'", ['name'], '1'),
        ('name=__import__("os").system("touch ran")', ['name'], '__import__("os").system("touch ran")'),
        ('name=[__import__("os").system("touch ran")]', ['name'], ['__import__("os").system("touch ran")']),
    ],
)
def test_override(tmp_path, override, keys, value):
    opt = load(tmp_path, FILE, override)
    for key in keys:
        opt = opt[key]
    assert opt == value
    assert type(opt) is type(value)


@pytest.mark.parametrize(
    ('override', 'complaint'),
    [
        ('name', 'expected key:sub=value'),
        ('train::a=3', 'expected key:sub=value'),
        ('trian:total_iter=3', 'the file has no section trian, did you mean train?'),
        ('train:optim:lr=3', 'train has no section optim, did you mean optim_g?'),
        ('name:a=3', 'neither a section nor a list'),
        ('list:2:a=3', 'expected a number from 0 to 1'),
        ('list:a=3', 'expected a number from 0 to 1'),
        ('name=[1, 2', 'not YAML'),
        ('name=!!python/object/apply:os.system [touch ran]', 'is refused'),
        ('name="{{a}}"', 'templates'),
    ],
)
def test_bad_override(tmp_path, monkeypatch, override, complaint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError) as caught:
        load(tmp_path, FILE, override)
    assert complaint in str(caught.value)
    assert not (tmp_path / 'ran').exists()


def test_override_of_an_alias_changes_one_place(tmp_path):
    opt = load(tmp_path, 'a: &x {b: 1}\nc: *x\n', 'a:b=2')
    assert opt == {'a': {'b': 2}, 'c': {'b': 1}}


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = options.find('AST_quickstart')
    assert shipped.is_file()
    assert options.find('AST_quickstart.yml') == shipped
    assert options.find('AST_quickstart.yaml') == shipped
    (tmp_path / 'own.yml').write_text('a: 1')
    assert options.find('own.yml').read_text() == 'a: 1'
    with pytest.raises(OptionError, match='did you mean AST_quickstart'):
        options.find('AST_quikstart.yml')
    with pytest.raises(OptionError, match='this is a folder'):
        options.find(tmp_path)
    with pytest.raises(OptionError, match='no such option file'):
        options.find('~nobody/x.yml')


def test_shipped_files_leave_out_parts(tmp_path, monkeypatch):
    for name in ('AST_a.yml', '_base_/data.yml', 'mix/AST_b.yml', '_part.yml', 'note.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('a: 1')
    monkeypatch.setattr(options.reading, '_SHIPPED_FOLDERS', (tmp_path / 'nothing', tmp_path))
    assert list(options.shipped_files()) == ['AST_a', 'mix/AST_b']
    assert options.find('mix/AST_b') == tmp_path / 'mix' / 'AST_b.yml'


OPT = {
    'name': 'run',
    'model_type': 'SRModel',
    'num_gpu': 0,
    'datasets': {
        'train': {'name': 'a', 'type': 'Seeded', 'dataroot_lq': '~/lq'},
        'val': {'name': 'b', 'type': 'Plain'},
        'val_2': {'name': 'c', 'type': 'Seeded', 'seed': 3},
        'test_rain': {'name': 'd', 'type': 'Plain'},
    },
    'path': {'pretrain_network_g': '~/w.pth', 'strict_load_g': True},
    'train': {'total_iter': 5},
    'val': {'val_freq': 5},
    'logger': {'print_freq': 100, 'save_checkpoint_freq': 100},
}


class Seeded:
    class options_type:
        model_fields = {'seed': None}


TYPES = {'Seeded': Seeded, 'Plain': object}


def test_prepare_for_training(tmp_path):
    before = copy.deepcopy(OPT)
    opt = options.prepare(OPT, root=tmp_path, is_train=True, rank=1, world_size=2, dist=True, dataset_types=TYPES)
    assert before == OPT
    assert list(opt['datasets']) == ['train', 'val', 'val_2']
    assert [dataset['phase'] for dataset in opt['datasets'].values()] == ['train', 'val', 'val']
    assert all(dataset['scale'] == 1 for dataset in opt['datasets'].values())
    assert opt['datasets']['train']['seed'] == opt['manual_seed']
    assert opt['datasets']['val_2']['seed'] == 3
    assert 'seed' not in opt['datasets']['val']
    assert opt['datasets']['train']['dataroot_lq'] == os.path.expanduser('~/lq')
    assert opt['path'] == {
        'pretrain_network_g': os.path.expanduser('~/w.pth'),
        'strict_load_g': True,
        'experiments_root': str(tmp_path / 'experiments/run'),
        'log': str(tmp_path / 'experiments/run'),
        'models': str(tmp_path / 'experiments/run/models'),
        'training_states': str(tmp_path / 'experiments/run/training_states'),
        'visualization': str(tmp_path / 'experiments/run/visualization'),
    }
    process = {'is_train': True, 'rank': 1, 'world_size': 2, 'dist': True, 'auto_resume': False}
    assert {key: opt[key] for key in process} == process
    assert opt['val'] == {'val_freq': 5, 'save_img': False, 'suffix': None}
    assert opt['logger'] == {**OPT['logger'], 'use_tb_logger': False}  # which BasicSR reads whether it is there or not
    assert os.listdir(tmp_path) == []


def test_prepare_for_testing(tmp_path):
    without = {key: value for key, value in OPT.items() if key not in ('val', 'path', 'num_gpu')}
    opt = options.prepare(without, root=tmp_path, is_train=False)
    assert list(opt['datasets']) == ['val', 'val_2', 'test_rain']
    assert opt['val'] == {'save_img': False, 'suffix': None}
    assert set(opt['path']) == {'results_root', 'log', 'visualization'}
    assert isinstance(opt['num_gpu'], int)


def test_prepare_draws_a_seed():
    assert len({options.prepare(OPT)['manual_seed'] for _ in range(8)}) > 1


def test_debug_mode():
    opt = options.prepare(OPT, debug=True)
    assert opt['name'] == 'debug_run'
    assert opt['path']['experiments_root'].endswith('debug_run')
    assert (opt['val']['val_freq'], opt['logger']['print_freq'], opt['logger']['save_checkpoint_freq']) == (8, 1, 8)
    assert options.prepare({**OPT, 'val': None}, debug=True)['val'] is None


@pytest.mark.parametrize(
    ('model_type', 'given', 'expected'),
    [('RestorationModel', None, True), ('RestorationModel', False, False), ('SRModel', None, False)],
)
def test_keep_uint8_by_model(tmp_path, model_type, given, expected):
    class Kept:
        class options_type:
            model_fields = {'keep_uint8': None}

    datasets = {key: {'name': key, 'type': 'Kept', 'keep_uint8': given} for key in ('train', 'val')}
    opt = {**OPT, 'model_type': model_type, 'datasets': datasets}
    prepared = options.prepare(opt, root=tmp_path, dataset_types={'Kept': Kept})['datasets']
    assert prepared['train']['keep_uint8'] is expected and prepared['val']['keep_uint8'] is given


def test_keep_uint8_refused_for_floats(tmp_path):
    class Kept:
        class options_type:
            model_fields = {'keep_uint8': None}

    datasets = {'train': {'name': 'a', 'type': 'Kept', 'keep_uint8': True}}
    with pytest.raises(OptionError, match=r'datasets\.train\.keep_uint8: SRModel expects floats'):
        options.prepare({**OPT, 'datasets': datasets}, root=tmp_path, dataset_types={'Kept': Kept})
