"""YAML conversions of text: kept for text options, quoted in errors otherwise; inherited values are reported."""

import pytest

from ast_plugin import options
from ast_plugin.cli.main import main
from ast_plugin.errors import OptionError
from ast_plugin.models.preflight import load_registered
from ast_plugin.options import safe_yaml, validation
from ast_plugin.options.reading import Sources
from ast_plugin.options.validation import Registered

KEYS = [
    *('name', 'model_type', 'datasets.train.name', 'datasets.train.type', 'datasets.train.source'),
    *('datasets.train.degradation.type', 'network_g.type', 'network_g.attention', 'path.pretrain_network_g'),
    *('path.param_key_g', 'train.precision', 'train.optim_g.type', 'train.scheduler.type', 'train.pixel_opt.type'),
    *('val.best_metric', 'val.suffix', 'val.metrics.psnr.type', 'logger.wandb.project'),
]
# No text to this reader, whichever key it stands at.
NOT_TEXT = ['on', 'No', '007', '1e-4', '1_000', '0o17', '0x1F', '.inf', '1.0', 'null']
# Text that readers of YAML 1.1 take for something else.
TEXT = ['2024_06_01', '1_0', '2024-06-01', '12:30:00', '1:30', '0b101', '1_0.5', 'y', 'n', 'nan', "'on'", '1.2.3']


@pytest.fixture(scope='module')
def registered() -> Registered:
    return load_registered()


def own_file(folder, text):
    """Write an option file that overrides the shipped one it inherits from."""
    (folder / 'my.yml').write_text(f'_base_: AST_quickstart\n{text}')
    return folder / 'my.yml'


def at(key, written):
    """Return the value of a key as a line of YAML."""
    first, *sections = key.split('.')
    return f'{first}: ' + ''.join(f'{{{section}: ' for section in sections) + written + '}' * len(sections)


def faults(path, registered, overrides=()):
    explain = Sources(path, overrides).explain
    with pytest.raises(OptionError) as error:
        validation.check(options.load(path, overrides), str(path), registered, explain=explain)
    return str(error.value)


@pytest.mark.parametrize('key', KEYS)
def test_what_stands_there_is_quoted(key, tmp_path, registered):
    for written in NOT_TEXT if key == 'name' else NOT_TEXT[:1]:
        message = faults(own_file(tmp_path, at(key, written)), registered)
        assert f'as YAML interprets {written}: put quotes around it' in message, message
        assert f"'{written}'" in message


@pytest.mark.parametrize('text', TEXT)
def test_text_stays_text(text, tmp_path):
    for line in (f'name: {text}', f'[{text}]', f'a: {{b: {text}}}'):
        (tmp_path / 'my.yml').write_text(line if line[0] != '[' else f'a: {line}')
        assert repr(text.strip("'")) in repr(options.load(tmp_path / 'my.yml'))
    assert safe_yaml.read_text(safe_yaml.write_text([text.strip("'")]), 'x') == [text.strip("'")]


def test_overrides_and_variables(tmp_path, registered, monkeypatch):
    assert 'interprets 007: put quotes' in faults(own_file(tmp_path, ''), registered, ['name=007'])
    monkeypatch.setenv('RUN', '1_000')
    message = faults(own_file(tmp_path, 'name: ${RUN}'), registered)
    assert "interprets 1_000: put quotes around it in ${RUN}, '1_000'" in message


def test_numbers_need_no_quotes(tmp_path, registered):
    message = faults(own_file(tmp_path, ''), registered, ['manual_seed=12:30', 'train:optim_g:lr=on'])
    assert "manual_seed: expected a whole number, got the text '12:30'" in message
    assert 'put quotes' not in message and 'remove the quotes' not in message
    path = own_file(tmp_path, """train: {total_iter: '2'}\nmanual_seed: "0"\n""")
    assert faults(path, registered).count(': remove the quotes') == 2


def test_stages_and_comparisons(tmp_path, capsys):
    path = own_file(tmp_path, 'stages:\n  - {name: 007, train: {total_iter: 3}}\n')
    assert main(['check', '-opt', str(path)]) == 2
    assert 'interprets 007: put quotes' in capsys.readouterr().err
    path.write_text('_base_: compare/quick\nnetworks: [{name: on, network_g: {type: AST_XS}}]')
    assert main(['check', '-opt', str(path)]) == 2
    assert 'interprets on: put quotes' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('rule', 'key', 'written'),
    [('match: 007, with: {type: MLP}', 'match', '007'), ("match: 'body.*', with: {type: on}", 'with.type', 'on')],
)
def test_rules_of_a_mix_are_quoted(tmp_path, registered, rule, key, written):
    mixed = f'{{_delete_: true, type: Mixed, base: {{type: EDSR, upscale: 1}}, mix: [{{{rule}}}]}}'
    message = faults(own_file(tmp_path, f'network_g: {mixed}'), registered)
    assert f'network_g.mix.0.{key}: expected text' in message
    assert f'as YAML interprets {written}: put quotes around it' in message


def test_none_of_python_is_no_text(tmp_path, registered):
    for key in ('path.pretrain_network_g', 'path.param_key_g'):
        message = faults(own_file(tmp_path, at(key, 'None')), registered)
        assert "expected text, or ~ for no value (got the text 'None')" in message


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        *((f'{key}: 1', f'as YAML interprets {key}: put quotes') for key in ('on', '2024', '~', '1e3')),
        *((f'name: {name}', 'put quotes around text') for name in ('a: b', '@x', '%x', '`x', '*x', '!x', '&x: y')),
        ('a:\n  b: 1\n\u00a0\u00a0c:\n    d: 1\n  e: 2\n', r'line 3 starts .*U\+00A0'),  # a no-break space
    ],
)
def test_text_that_is_no_yaml(text, message):
    with pytest.raises(OptionError, match=message):
        safe_yaml.read_text(text, 'my.yml')


def test_numbers_with_exponents_are_whole(tmp_path):
    opt = options.load(own_file(tmp_path, 'train: {total_iter: 1e5}\nval: {val_freq: 2e3}'))
    prepared = options.prepare(opt, root=tmp_path, is_train=True, length_of=lambda dataset: 1)
    assert (prepared['train']['total_iter'], prepared['val']['val_freq']) == (100_000, 2000)
    assert {type(prepared['train']['total_iter']), type(prepared['val']['val_freq'])} == {int}


# ---- inheritance

PASTED = """\
_base_: {base}
name: mine
datasets:
  train:
    name: mine_train
    type: PairsDataset
    layout: manifest
    manifest: train.jsonl
"""


@pytest.mark.parametrize('base', ['AST_quickstart', 'AST_quickstart.yml', '[AST_quickstart]', 'mix/SwinIR_ASSA_FRFN'])
def test_base_by_name(base, tmp_path):
    (tmp_path / 'my.yml').write_text(f'_base_: {base}\nname: mine\n')
    opt = options.load(tmp_path / 'my.yml')
    assert opt['name'] == 'mine' and opt['train']


def test_file_beside_comes_before_a_shipped_name(tmp_path):
    (tmp_path / 'AST_derain.yml').write_text('a: 1\n')
    (tmp_path / 'my.yml').write_text('_base_: AST_derain.yml\n')
    assert options.load(tmp_path / 'my.yml') == {'a': 1}
    (tmp_path / 'my.yml').write_text('_base_: AST_derian\n')
    with pytest.raises(OptionError, match='did you mean AST_derain'):
        options.load(tmp_path / 'my.yml')


@pytest.mark.parametrize('base', ['AST_quickstart', 'AST_derain', 'pretrained/rain'])
def test_inherited_keys_are_reported(base, tmp_path, registered):
    path, text = tmp_path / 'my.yml', PASTED.format(base=base)
    path.write_text(text)
    for line in faults(path, registered).splitlines():
        file = 'options/pretrained/' if 'pretrained' in base else f'{base}.yml:'
        assert 'inherited from' in line and file in line, line
        assert '`_delete_: true` in datasets.train' in line
    text = text.replace('type: Pairs', '_delete_: true\n    gt_size: 64\n    type: Pairs')
    path.write_text(text + '    batch_size_per_gpu: 1\n    num_worker_per_gpu: 0\n')
    for stage in options.expand(options.load(path)):
        assert 'dataroot' not in stage.opt['datasets']['train']
