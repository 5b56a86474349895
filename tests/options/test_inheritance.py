"""Option files that build on others, and values of the environment; merging, overriding and staging as such."""

import os

import pytest

from ast_plugin import options
from ast_plugin.errors import OptionError
from ast_plugin.options import safe_yaml
from ast_plugin.options.reading import fill_in, merge


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(**files):
        for name, text in files.items():
            path = tmp_path / f'{name.replace("__", "/")}.yml'
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return write


def load(name='file', *overrides):
    return options.load(f'{name}.yml', overrides)


# ---- _base_

LADDER = zip(('file', *'abcdef'), 'abcdefg', strict=True)  # each names the next one twice


def test_files_are_laid_over_their_bases(write):
    write(
        parts__data='datasets: {train: {type: A, size: 1}}\ntrain: {total_iter: 5, optim_g: {type: Adam, lr: 1}}\n',
        parts__more='_base_: data.yml\nname: more\ntrain: {optim_g: {lr: 2}}\n',
        parts__val='val: {val_freq: 3}\n',
        file='_base_: [parts/more.yml, parts/val.yml]\nname: mine\ntrain: {optim_g: {eps: 1e-8}}\n',
    )
    assert load() == {
        'name': 'mine',
        'datasets': {'train': {'type': 'A', 'size': 1}},
        'train': {'total_iter': 5, 'optim_g': {'type': 'Adam', 'lr': 2, 'eps': 1e-8}},
        'val': {'val_freq': 3},
    }


@pytest.mark.parametrize(
    ('base', 'changes', 'expected'),
    [
        ({'a': {'b': 1, 'c': 2}}, {'a': {'c': 3}}, {'a': {'b': 1, 'c': 3}}),
        ({'a': {'b': 1}}, {'a': {'_delete_': True, 'c': 3}}, {'a': {'c': 3}}),
        ({'a': {'b': 1}}, {'a': {'_delete_': False, 'c': 3}}, {'a': {'b': 1, 'c': 3}}),
        ({}, {'a': {'b': {'_delete_': True, 'c': 3}}}, {'a': {'b': {'c': 3}}}),
        ({'a': [1, 2]}, {'a': [3]}, {'a': [3]}),
        ({'a': {'b': 1}}, {'a': None}, {'a': None}),
        ({'a': None}, {'a': {'b': 1}}, {'a': {'b': 1}}),
        ({'a': 3}, {'a': {'b': 1}}, {'a': {'b': 1}}),
        ({'items': 1, 'a.b': 2, 'text': 3}, {'filename': 4}, {'items': 1, 'a.b': 2, 'text': 3, 'filename': 4}),
        ({'train': {'total_iter': 5, 'x': 1}}, {'train': {'total_epochs': 2}}, {'train': {'total_epochs': 2, 'x': 1}}),
        ({'train': {'total_iter': 5}}, {'train': {'total_epochs': None}}, None),
        ({'val': {'times_per_epoch': 5}}, {'val': {'val_freq': 2}}, {'val': {'val_freq': 2}}),
        (
            {'train': {'scheduler': {'warmup_iter': 5}}},
            {'train': {'scheduler': {'warmup_epochs': 2}}},
            {'train': {'scheduler': {'warmup_epochs': 2}}},
        ),
    ],
)
def test_merge(base, changes, expected):
    before = repr((base, changes))
    merged = merge(base, changes)
    assert merged == (expected or {'train': {'total_iter': 5, 'total_epochs': None}})
    assert type(merged) is dict
    assert repr((base, changes)) == before


@pytest.mark.parametrize(
    ('files', 'complaint'),
    [
        ({'file': '_base_: nothing.yml\n'}, 'file.yml: _base_: no such file: nothing.yml'),
        ({'file': '_base_: basee.yml\n', 'base': 'a: 1\n'}, 'did you mean base.yml?'),
        ({'file': '_base_: file.yml\n'}, 'inherits from itself: file.yml -> file.yml'),
        ({'file': '_base_: a.yml\n', 'a': '_base_: b.yml\n', 'b': '_base_: ./a.yml\n'}, 'a.yml -> b.yml -> a.yml'),
        ({'file': '_base_: /etc/hosts.yml\n'}, 'expected a path relative to this file'),
        ({'file': '_base_: 3\n'}, 'or the name of a shipped one, got 3'),
        ({'file': '_base_: [{a: 1}]\n'}, 'expected the path of a .yml file'),
        ({'file': '_base_: ~\n'}, 'expected the path of a .yml file'),
        ({'file': '_base_: base.py\n'}, 'expected the path of a .yml file'),
        ({'file': '_base_: "a\\0.yml"\n'}, 'in double quotes a backslash begins'),
        ({'file': '_base_: mmdet::a.yml\n'}, 'no such file: mmdet::a.yml'),
        ({'file': '_base_: a.yml\n', 'a': '- 1\n'}, 'a.yml: expected keys and values'),
        ({'file': '_base_: a.yml\n', 'a': 'x: !!python/name:os.system\n'}, 'a.yml:1: the tag'),
        ({'file': '_base_: a.yml\n', 'a': 'custom_imports: {imports: [antigravity]}\n'}, 'a.yml: custom_imports: ref'),
        ({'file': '_base_: a.yml\nb: {_delete_: 1}\n', 'a': 'b: {}\n'}, 'file.yml: b._delete_: expected true or false'),
        (
            {'g': 'x: 1\n'} | {name: f'_base_: [{base}.yml, {base}.yml]\n' for name, base in LADDER},
            'inherits from more than 64 files',
        ),
    ],
)
def test_bad_bases(write, files, complaint):
    write(**files)
    with pytest.raises(OptionError) as caught:
        load()
    assert complaint in str(caught.value)
    assert str(caught.value).count('.yml: ') <= 2


def test_mmengine_sees_values_only(write, monkeypatch):
    """Its own reading of files would run code."""
    from mmengine import Config

    monkeypatch.setattr(Config, 'fromfile', None)
    monkeypatch.setattr('yaml.load', None)
    write(file='_base_: a.yml\nb: 1\n', a='c: 2\n')
    assert load() == {'c': 2, 'b': 1}


# ---- ${NAME:default}


@pytest.mark.parametrize(
    ('text', 'environment', 'value'),
    [
        ('${NUMBER}', {'NUMBER': '1e-4'}, 1e-4),
        ('${NUMBER:4}', {}, 4),
        ('${NUMBER:4}', {'NUMBER': '5'}, 5),
        ('${FLAG:false}', {}, False),
        ('${NOTHING:}', {}, None),
        ('${FOLDER:datasets/SPAD}', {}, 'datasets/SPAD'),
        ('${FOLDER}/a/${NUMBER:3}', {'FOLDER': '/x'}, '/x/a/3'),
        ('${FOLDER}', {'FOLDER': '[1, 2]'}, '[1, 2]'),
        ('${FOLDER}', {'FOLDER': '{a: 1}'}, '{a: 1}'),
        ('${FOLDER}', {'FOLDER': 'a: b: c'}, 'a: b: c'),
        ('${FOLDER}', {'FOLDER': '!!python/name:os.system'}, '!!python/name:os.system'),
        ('${FOLDER}', {'FOLDER': '${NUMBER}{{x}}'}, '${NUMBER}{{x}}'),
        ('"${FOLDER}"', {'FOLDER': '010'}, 10),
        ('$FOLDER', {'FOLDER': 'x'}, '$FOLDER'),
    ],
)
def test_variables(write, monkeypatch, text, environment, value):
    for name, content in environment.items():
        monkeypatch.setenv(name, content)
    write(file=f'a: [{{b: 1}}]\nkey:\n  sub: {text}\n')
    assert load()['key']['sub'] == value
    assert type(load()['key']['sub']) is type(value)


def test_every_missing_variable_is_named(write, monkeypatch):
    monkeypatch.setenv('AST_TEST_DATA', 'x')
    write(file='a: ${AST_TEST_DAAT}\nb: [x, "y/${AST_MISSING}"]\n')
    with pytest.raises(OptionError) as caught:
        load()
    first, second = str(caught.value).splitlines()
    assert first.startswith('file.yml: a: the environment has no variable AST_TEST_DAAT, did you mean AST_TEST_DATA?')
    assert second.startswith('file.yml: b.1: the environment has no variable AST_MISSING')


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


def runs(*overrides):
    return [(stage.name, stage.opt) for stage in options.expand(load('file', *overrides))]


def test_stages_are_laid_over_the_file(write):
    write(file=STAGED)
    (first, one), (second, two) = runs()
    assert (first, second) == ('stage_1', 'fine')
    assert one['name'] == two['name'] == 'x' and 'stages' not in one
    assert one['train'] == {
        'total_epochs': 3,
        'optim_g': {'type': 'Adam', 'lr': 1},
        'scheduler': {'type': 'S', 'periods': [1, 2]},
    }
    assert two['train']['total_iter'] == 100 and two['train']['optim_g'] == {'type': 'Adam', 'lr': 2}
    assert (one['val'], two['val']) == ({'val_freq': 5}, None)


@pytest.mark.parametrize(
    ('overrides', 'where', 'values'),
    [
        (['train:total_epochs=1'], ('train', 'total_epochs'), [1, 1]),
        (['train:total_epochs=1'], ('train', 'total_iter'), [None, None]),
        (['train:total_iter=7'], ('train', 'total_iter'), [7, 7]),
        (['train:total_iter=7'], ('train', 'total_epochs'), [None, None]),
        (['train:optim_g:lr=5'], ('train', 'optim_g', 'lr'), [5, 5]),
        (['train:optim_g={type: B}'], ('train', 'optim_g'), [{'type': 'B'}] * 2),
        (['train:scheduler:periods:1=9'], ('train', 'scheduler', 'periods'), [[1, 9], [3, 9]]),
        (['val:val_freq=9'], ('val',), [{'val_freq': 9}, None]),
        (['val={val_freq: 9}'], ('val',), [{'val_freq': 9}] * 2),
        (['new=1'], ('new',), [1, 1]),
        (['stages:0:train:total_epochs=9'], ('train', 'total_epochs'), [9, None]),
        (['stages:0:train:total_iter=9'], ('train', 'total_iter'), [9, 100]),
        (['stages:0:train:total_iter=9'], ('train', 'total_epochs'), [None, None]),
        (['stages:0:val:val_freq=9'], ('val',), [{'val_freq': 9}, None]),
        (['stages:1:val:val_freq=9'], ('val',), [{'val_freq': 5}, {'val_freq': 9}]),
        (['stages:0:train:optim_g:lr=9', 'train:optim_g:lr=8'], ('train', 'optim_g', 'lr'), [9, 8]),
        (['name=y'], ('name',), ['y', 'y']),
    ],
)
def test_overrides_win_over_stages(write, overrides, where, values):
    write(file=STAGED)
    found = []
    for _, value in runs(*overrides):
        for key in where:
            value = value.get(key)
        found.append(value)
    assert found == values


def test_overrides_of_stages_that_are_not_there(write):
    write(file=STAGED)
    for override, complaint in [
        ('stages:2:name=x', 'expected a number from 0 to 1'),
        ('stages:0:trian:total_iter=1', 'stages:0 has no section trian, did you mean train?'),
        ('logger:print_freq=1', 'the file has no section logger'),
    ]:
        with pytest.raises(OptionError) as caught:
            load('file', override)
        assert complaint in str(caught.value)
    write(file='stages: [{train: {a: 1}}, {b: 1}]\n')
    assert load('file', 'train:a=2')['stages'][0] == {'train': {'a': 2}}


@pytest.mark.parametrize('value', ['3', '[]', '[1]', '{a: 1}', '[{name: a}, {name: a}]', '[{name: stage_2}, {}]'])
def test_bad_stages(write, value):
    write(file=f'name: x\nstages: {value}\n')
    with pytest.raises(OptionError, match='stages: '):
        runs()


# ---- writing


def test_what_is_written_reads_the_same():
    value = {
        'text': ['1e-4', '010', 'yes', '~', '', 'a: b', '${X:1}', '<<', 'é', '\udc80', ' x ', '# x', '1:30', 'null'],
        'values': [1e-4, 1e20, -0.5, float('inf'), 10, True, False, None, {}, [], [{'a': [1]}]],
        'on': {'y': 1, '=': 2},
    }
    value['same'] = value['values']
    assert safe_yaml.read_text(safe_yaml.write_text(value), 'x') == value


def test_a_filled_in_file_is_a_copy():
    opt = {'a': [{'b': '${HOME:x}'}]}
    assert fill_in(opt, 'x')['a'][0]['b'] == os.environ.get('HOME', 'x')
    assert opt == {'a': [{'b': '${HOME:x}'}]}
