"""Option files: safe reading, inheritance, variables, overrides and stages; merging and writing."""

import os
from pathlib import Path

import pytest

from ast_plugin import options
from ast_plugin.errors import OptionError
from ast_plugin.faults import Fault
from ast_plugin.options import safe_yaml
from ast_plugin.options.reading import Sources, fill_in, merge


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files into the working directory; `a__b` is b.yml in the folder a."""
    monkeypatch.chdir(tmp_path)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / f'{name.replace("__", "/")}.yml'
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def load(*overrides):
    return options.load('file.yml', overrides)


def refused(*overrides):
    with pytest.raises(OptionError) as caught:
        load(*overrides)
    return str(caught.value)


# ---- YAML


def test_values(write):
    write(
        file="""\
        numbers: [1e-4, .5, -3, 1_000, 010, 0x1F, -.inf, !!float 5e3]
        texts: [!!str 5, '1e-4', 1:30, 2024-01-02, 1e, y, none, '<<', é]
        truths: [true, No, on]
        nothing: [~, null]
        empty:
        base: &base {type: disk, size: 1}
        same: *base
        more: {<<: *base, size: 2}
        both: {<<: [{size: 3}, *base]}
        """
    )
    base = {'type': 'disk', 'size': 1}
    opt = load()
    assert repr(opt) == repr(
        {
            'numbers': [1e-4, 0.5, -3, 1000, 10, 31, float('-inf'), 5000.0],
            'texts': ['5', '1e-4', '1:30', '2024-01-02', '1e', 'y', 'none', '<<', 'é'],
            'truths': [True, False, True],
            'nothing': [None, None],
            'empty': None,
            'base': base,
            'same': base,
            'more': {**base, 'size': 2},
            'both': {**base, 'size': 3},
        }
    )
    assert opt['same'] is not opt['base']
    write(file='name: é\n'.encode('utf-8-sig'))  # with a byte order mark
    assert load() == {'name': 'é'}


BOMB = 'a: &a [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'{name}: &{name} [{", ".join(["*" + before] * 10)}]\n' for before, name in zip('abcdefg', 'bcdefgh', strict=True)
)


@pytest.mark.parametrize(
    ('text', 'complaint'),
    [
        ('# only a comment\n', 'got nothing'),
        ('- a\n- b\n', 'got a list'),
        ('a: 1\n\tb: 2\n', 'not YAML'),
        ('a:\n\t- 1\n', 'spaces, not tabs'),
        ('a: [1, 2\nb: 3\n', 'file.yml:2: not YAML'),
        ('a: 1\n---\nb: 2\n', 'not YAML'),
        ('a: 1\nb: 2\na: 3\n', 'file.yml:3: duplicate key a'),
        ('1: a\n', 'keys must be text, got 1'),
        ('a: {{ value }}\n', 'keys must be text'),
        ('a: "{{ os.system(1) }}"\n', 'a: templates are not supported'),
        ('a: {b: ["${HO ME}/x"]}\n', 'a.b.0: expected ${NAME} or ${NAME:default}'),
        ('a: "${${HOME}}"\n', 'a: expected ${NAME} or ${NAME:default}'),
        ('"${HOME}": 1\n', 'templates are not supported in keys'),
        ('custom_imports: {imports: [antigravity]}\n', 'custom_imports: not supported'),
        ('a: !!python/object/apply:os.system ["touch ran"]\n', 'tag !!python/object/apply:os.system is not supported'),
        ('!!python/object/new:os.system ["touch ran"]\n', 'is not supported'),
        ('a: !!binary aGVsbG8=\n', 'the tag !!binary is not supported'),
        ('a: !!float x\n', "cannot be read as float: 'x'"),
        ('a: ' + '9' * 5000 + '\n', 'cannot be read as int'),
        ('a: *b\n', 'not YAML'),
        ('a: "\\UDEADBEEF"\n', 'in double quotes a backslash starts'),
        ('a: &a [*a]\n', 'does an alias contain itself'),
        ('<<: 1\n', 'expected a mapping'),
        ('a: ' + '[' * 500, 'nested deeper'),
        (BOMB, 'values through aliases'),
        ('a: ' + 'x' * 300_000, 'at most 256 KiB'),
        (b'\x89PNG\r\n\x1a\n\x00\x00', 'expected YAML text in UTF-8'),
        (b'a: \x00', 'not YAML'),
    ],
)
def test_rejected(write, tmp_path, text, complaint):
    write(file=text)
    message = refused()
    assert complaint in message and 'file.yml' in message
    assert os.listdir(tmp_path) == ['file.yml']


def test_what_is_written_reads_the_same():
    value = {
        'text': ['1e-4', '010', 'yes', '~', '', 'a: b', '${X:1}', '<<', 'é', '\udc80', ' x ', '# x', '1:30', 'null'],
        'values': [1e-4, 1e20, -0.5, float('inf'), 10, True, False, None, {}, [], [{'a': [1]}]],
        'on': {'y': 1, '=': 2},
    }
    value['same'] = value['values']
    assert safe_yaml.read_text(safe_yaml.write_text(value), 'x') == value


# ---- inheritance


def test_files_are_laid_over_their_bases(write):
    write(
        parts__data='datasets: {_delete_: true, train: {type: A, size: 1}}\ntrain: {total_iter: 5, optim_g: {lr: 1}}\n',
        parts__more='_base_: data.yml\nname: more\ntrain: {optim_g: {lr: 2}}\n',
        parts__val='val: {val_freq: 3}\n',
        file='_base_: [parts/more.yml, parts/val.yml]\nname: mine\ntrain: {optim_g: {eps: 1e-8}}\n',
    )
    assert load() == {
        'name': 'mine',
        'datasets': {'train': {'type': 'A', 'size': 1}},
        'train': {'total_iter': 5, 'optim_g': {'lr': 2, 'eps': 1e-8}},
        'val': {'val_freq': 3},
    }


def test_merge():
    for base, changes, expected in [
        ({'a': {'b': 1, 'c': 2}}, {'a': {'c': 3}}, {'a': {'b': 1, 'c': 3}}),
        ({'a': {'b': 1}}, {'a': {'_delete_': True, 'c': 3}}, {'a': {'c': 3}}),
        ({'a': {'b': 1}}, {'a': {'_delete_': False, 'c': 3}}, {'a': {'b': 1, 'c': 3}}),
        ({}, {'a': {'b': {'_delete_': True, 'c': 3}}}, {'a': {'b': {'c': 3}}}),
        ({'a': [1, 2]}, {'a': [3]}, {'a': [3]}),
        ({'a': {'b': 1}}, {'a': None}, {'a': None}),
        ({'a': 3}, {'a': {'b': 1}}, {'a': {'b': 1}}),
        ({'items': 1, 'a.b': 2}, {'filename': 4}, {'items': 1, 'a.b': 2, 'filename': 4}),
        # Setting one of two alternative keys removes the other, unless it is null.
        ({'train': {'total_iter': 5, 'x': 1}}, {'train': {'total_epochs': 2}}, {'train': {'total_epochs': 2, 'x': 1}}),
        ({'val': {'times_per_epoch': 5}}, {'val': {'val_freq': 2}}, {'val': {'val_freq': 2}}),
        (*[{'train': {'scheduler': {key: 2}}} for key in ('warmup_iter', 'warmup_epochs', 'warmup_epochs')],),
        (
            {'val': {'val_freq': 5}},
            {'val': {'times_per_epoch': None}},
            {'val': {'val_freq': 5, 'times_per_epoch': None}},
        ),
    ]:
        before = repr((base, changes))
        assert merge(base, changes) == expected
        assert repr((base, changes)) == before


def test_sources_name_the_last_base(write):
    write(a='train: {x: 1}\n', b='\ntrain: {x: 2}\n', file='_base_: [a.yml, b.yml]\nname: x\n')
    fault = Sources(Path('file.yml')).explain(Fault(('train', 'x'), 'unknown key', unknown_key=True))
    assert '(x inherited from b.yml:2)' in fault.message


LADDER = {
    name: f'_base_: [{base}.yml, {base}.yml]\n' for name, base in zip(('file', *'abcdef'), 'abcdefg', strict=True)
}
LADDER['g'] = 'x: 1\n'  # each file inherits twice from the next


@pytest.mark.parametrize(
    ('files', 'complaint'),
    [
        ({'file': '_base_: nothing.yml\n'}, 'file.yml: _base_: no such file: nothing.yml'),
        ({'file': '_base_: basee.yml\n', 'base': 'a: 1\n'}, 'did you mean base.yml?'),
        ({'file': '_base_: file.yml\n'}, 'inherits from itself: file.yml -> file.yml'),
        ({'file': '_base_: a.yml\n', 'a': '_base_: b.yml\n', 'b': '_base_: ./a.yml\n'}, 'a.yml -> b.yml -> a.yml'),
        ({'file': '_base_: /etc/hosts.yml\n'}, 'expected a path relative to this file'),
        ({'file': '_base_: 3\n'}, 'or the name of a shipped option file, got 3'),
        ({'file': '_base_: [{a: 1}]\n'}, 'expected the path of a .yml file'),
        ({'file': '_base_: base.py\n'}, 'expected the path of a .yml file'),
        ({'file': '_base_: "a\\0.yml"\n'}, 'in double quotes a backslash starts'),
        ({'file': '_base_: a.yml\n', 'a': '- 1\n'}, 'a.yml: expected keys and values'),
        ({'file': '_base_: a.yml\n', 'a': 'x: !!python/name:os.system\n'}, 'a.yml:1: the tag'),
        ({'file': '_base_: a.yml\nb: {_delete_: 1}\n', 'a': 'b: {}\n'}, 'file.yml: b._delete_: expected true or false'),
        (LADDER, 'inherits from more than 64 files'),
    ],
)
def test_bad_bases(write, files, complaint):
    write(**files)
    message = refused()
    assert complaint in message
    assert message.count('.yml: ') <= 2


def test_find(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = options.find('AST_quickstart')
    assert shipped.is_file()
    assert options.find('AST_quickstart.yml') == options.find('AST_quickstart.yaml') == shipped
    (tmp_path / 'own.yml').write_text('a: 1')
    os.mkfifo('pipe.yml')
    assert options.find('own.yml').read_text() == 'a: 1'
    for name, complaint in [
        ('AST_quikstart.yml', 'did you mean AST_quickstart'),
        (tmp_path, 'got a folder'),
        ('pipe.yml', 'got a folder, pipe or device'),
        ('~nobody/x.yml', 'no such option file'),
    ]:
        with pytest.raises(OptionError, match=complaint):
            options.find(name)


def test_shipped_files_leave_out_parts(tmp_path, monkeypatch):
    for name in ('AST_a.yml', '_base_/data.yml', 'mix/AST_b.yml', '_part.yml', 'note.txt'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('a: 1')
    monkeypatch.setattr(options.reading, '_SHIPPED_FOLDERS', (tmp_path / 'nothing', tmp_path))
    assert list(options.shipped_files()) == ['AST_a', 'mix/AST_b']
    assert options.find('mix/AST_b') == tmp_path / 'mix' / 'AST_b.yml'


# ---- ${NAME:default}


def test_variables(write, monkeypatch):
    environment = {'RATE': '1e-4', 'FIVE': '5', 'ROOT': '/x', 'LIST': '[1, 2]', 'PAIR': 'a: b: c', 'TEN': '010'}
    environment |= {'TAG': '!!python/name:os.system', 'NESTED': '${FIVE}{{x}}', 'MARK': ' /x #2', 'HASH': '#2'}
    for name, content in environment.items():
        monkeypatch.setenv(name, content)
    write(
        file="""\
        one: ['${RATE}', '${MISSING:4}', '${FIVE:4}', '${MISSING:false}', '${MISSING:}', '${MISSING:datasets/SPAD}']
        two: {in: '${ROOT}/a/${MISSING:3}', list: '${LIST}', pair: '${PAIR}', tag: '${TAG}', nested: '${NESTED}'}
        three: ["${TEN}", $ROOT, '${MARK}', '${HASH}']
        """
    )
    expected = {
        'one': [1e-4, 4, 5, False, None, 'datasets/SPAD'],
        'two': {'in': '/x/a/3', **{key.lower(): environment[key] for key in ('LIST', 'PAIR', 'TAG', 'NESTED')}},
        'three': [10, '$ROOT', '/x #2', '#2'],
    }
    assert repr(load()) == repr(expected)
    opt = {'a': ['${ROOT}']}
    assert fill_in(opt, 'x') == {'a': ['/x']} and opt == {'a': ['${ROOT}']}


def test_every_missing_variable_is_named(write, monkeypatch):
    monkeypatch.setenv('AST_TEST_DATA', 'x')
    write(file='a: ${AST_TEST_DAAT}\nb: [x, "y/${AST_MISSING}"]\n')
    first, second = refused().splitlines()
    assert first.startswith('file.yml: a: environment variable AST_TEST_DAAT is not set, did you mean AST_TEST_DATA?')
    assert second.startswith('file.yml: b.1: environment variable AST_MISSING is not set')


# ---- overrides

FILE = """\
name: x
train: {total_iter: 5, periods: [1, 2, 3], optim_g: {lr: 1}}
list: [{a: 1}, {a: 2}]
path:
"""
CODE = '__import__("os").system("touch ran")'


def at(opt, *keys):
    for key in keys:
        opt = opt[key] if isinstance(key, int) else opt.get(key)
    return opt


def test_override(write, tmp_path):
    write(file=FILE)
    for override, keys, value in [
        ('name=y', ['name'], 'y'),
        ('new=3', ['new'], 3),
        ('train:total_iter=1e3', ['train', 'total_iter'], 1e3),
        ('train:new=true', ['train', 'new'], True),
        ('train:optim_g={type: Adam}', ['train', 'optim_g'], {'type': 'Adam'}),
        ('train:periods:1=9', ['train', 'periods', 1], 9),
        ('list:0:b=1', ['list', 0, 'b'], 1),
        ('path:resume_state=a=b', ['path', 'resume_state'], 'a=b'),
        ('name=None', ['name'], None),
        ("name='1'", ['name'], '1'),
        ('name=/x #2', ['name'], '/x #2'),
        (f'name={CODE}', ['name'], CODE),
        (f'name=[{CODE}]', ['name'], [CODE]),
    ]:
        assert repr(at(load(override), *keys)) == repr(value)
    for override, complaint in [
        ('name', 'expected key:sub=value'),
        ('train::a=3', 'expected key:sub=value'),
        ('trian:total_iter=3', 'the file has no section trian, did you mean train?'),
        ('train:optim:lr=3', 'train has no section optim, did you mean optim_g?'),
        ('name:a=3', 'neither a section nor a list'),
        ('list:2:a=3', 'expected a list index from 0 to 1'),
        ('list:a=3', 'expected a list index from 0 to 1'),
        ('name=[1, 2', 'not YAML'),
        ('name=!!python/object/apply:os.system [touch ran]', 'is not supported'),
        ('name="{{a}}"', 'templates'),
    ]:
        assert complaint in refused(override)
    assert not (tmp_path / 'ran').exists()
    write(file='a: &x {b: 1}\nc: *x\n')
    assert load('a:b=2') == {'a': {'b': 2}, 'c': {'b': 1}}


# ---- stages

STAGED = """\
name: x
train: {total_iter: 100, optim_g: {type: Adam, lr: 1}, scheduler: {type: S, periods: [1, 2]}}
val: {val_freq: 5}
stages:
  - train: {total_epochs: 3}
  - name: fine
    train: {optim_g: {lr: 2}, scheduler: {periods: [3, 4]}}
    val: ~
"""


def test_stages_are_laid_over_the_file(write):
    write(file=STAGED)
    first, second = options.expand(load())
    assert (first.name, second.name) == ('stage_1', 'fine')
    assert first.opt['name'] == second.opt['name'] == 'x' and 'stages' not in first.opt
    assert first.opt['train'] == {
        'total_epochs': 3,
        'optim_g': {'type': 'Adam', 'lr': 1},
        'scheduler': {'type': 'S', 'periods': [1, 2]},
    }
    assert second.opt['train']['total_iter'] == 100 and second.opt['train']['optim_g'] == {'type': 'Adam', 'lr': 2}
    assert (first.opt['val'], second.opt['val']) == ({'val_freq': 5}, None)
    for value in ('3', '[]', '[1]', '{a: 1}', '[{name: a}, {name: a}]', '[{name: stage_2}, {}]'):
        write(file=f'name: x\nstages: {value}\n')
        with pytest.raises(OptionError, match='stages: '):
            options.expand(load())


def test_overrides_win_over_stages(write):
    write(file=STAGED)
    for overrides, where, values in [
        (['train:total_epochs=1'], ['train', 'total_epochs'], [1, 1]),
        (['train:total_epochs=1'], ['train', 'total_iter'], [None, None]),
        (['train:total_iter=7'], ['train', 'total_iter'], [7, 7]),
        (['train:total_iter=7'], ['train', 'total_epochs'], [None, None]),
        (['train:optim_g:lr=5'], ['train', 'optim_g', 'lr'], [5, 5]),
        (['train:optim_g={type: B}'], ['train', 'optim_g'], [{'type': 'B'}] * 2),
        (['train:optim_g={type: B}', 'stages:1:train:optim_g:lr=9'], ['train', 'optim_g', 'lr'], [None, 9]),
        (['train:scheduler:periods:1=9'], ['train', 'scheduler', 'periods'], [[1, 9], [3, 9]]),
        (['val:val_freq=9'], ['val'], [{'val_freq': 9}, None]),
        (['val={val_freq: 9}'], ['val'], [{'val_freq': 9}] * 2),
        (['new=1'], ['new'], [1, 1]),
        (['stages:0:train:total_iter=9'], ['train', 'total_iter'], [9, 100]),
        (['stages:0:train:total_iter=9'], ['train', 'total_epochs'], [None, None]),
        (['stages:0:val:val_freq=9'], ['val'], [{'val_freq': 9}, None]),
        (['stages:1:val:val_freq=9'], ['val'], [{'val_freq': 5}, {'val_freq': 9}]),
        (['stages:0:train:optim_g:lr=9', 'train:optim_g:lr=8'], ['train', 'optim_g', 'lr'], [9, 8]),
        (['name=y'], ['name'], ['y', 'y']),
        (['stages=[{val: {val_freq: 4}}]'], ['val', 'val_freq'], [4]),
    ]:
        assert [at(stage.opt, *where) for stage in options.expand(load(*overrides))] == values, overrides
    for override, complaint in [
        ('stages:2:name=x', 'expected a list index from 0 to 1'),
        ('stages:0:trian:total_iter=1', 'stages:0 has no section trian, did you mean train?'),
        ('logger:print_freq=1', 'the file has no section logger'),
    ]:
        assert complaint in refused(override)
    write(file='stages: [{train: {a: 1}}, {b: 1}]\n')
    assert load('train:a=2')['stages'][0] == {'train': {'a': 2}}
    write(file='train: {a: 1}\nnetworks: [{name: x, train: {a: 1}}, {name: y}]\n')
    first, second = load('networks:1:train:a=4', 'train:a=2', 'name=z')['networks']
    assert (first, second) == ({'name': 'x', 'train': {'a': 2}}, {'name': 'y', 'train': {'a': 4}})
