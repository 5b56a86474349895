"""What YAML makes of text: kept where it is text, quoted as it stands where it is not; what is inherited is said."""

import pytest

from ast_plugin import options
from ast_plugin.cli.main import main
from ast_plugin.errors import OptionError
from ast_plugin.models.preflight import load_registered
from ast_plugin.options import safe_yaml, validation
from ast_plugin.options.reading import Sources
from ast_plugin.options.validation import Registered

FILE = """\
name: {name}
model_type: {model_type}
manual_seed: 0
num_gpu: 0
datasets:
  train: {{name: {train}, type: {dataset}, source: {photos}, degradation: {{type: {rain}}}, gt_size: 64,
    use_hflip: true, use_rot: true, batch_size_per_gpu: 1, num_worker_per_gpu: 0}}
network_g: {{type: {network}, img_size: 64, attention: {attention}}}
path: {{pretrain_network_g: {weights}, param_key_g: {key}}}
train:
  total_iter: 2
  precision: {precision}
  optim_g: {{type: {optimizer}, lr: 1e-3}}
  scheduler: {{type: {scheduler}, warmup_iter: 0, eta_min: 0}}
  pixel_opt: {{type: {loss}}}
val: {{val_freq: 1, best_metric: {best}, suffix: {suffix}, metrics: {{psnr: {{type: {metric}, crop_border: 0}}}}}}
logger: {{print_freq: 1, save_checkpoint_freq: 1, wandb: {{project: {project}}}}}
"""
RIGHT = {
    'name': 'a',
    'model_type': 'RestorationModel',
    'train': 'photos',
    'dataset': 'SyntheticPairsDataset',
    'photos': 'packaged',
    'rain': 'rain',
    'network': 'AST_XS',
    'attention': 'assa',
    'weights': '~',
    'key': '~',
    'precision': 'fp32',
    'optimizer': 'AdamW',
    'scheduler': 'WarmupCosineLR',
    'loss': 'ASTCharbonnierLoss',
    'best': 'psnr',
    'suffix': '~',
    'metric': 'calculate_psnr',
    'project': '~',
}
MAY_BE_NOTHING = {'weights', 'key', 'precision', 'best', 'suffix', 'project'}
# No text to this reader, whichever key it stands at.
NOT_TEXT = ['on', 'No', '007', '1e-4', '1_000', '0o17', '0x1F', '.inf', '1.0', 'null']
# Text that readers of YAML 1.1 take for something else.
TEXT = ['2024_06_01', '1_0', '2024-06-01', '12:30:00', '1:30', '0b101', '1_0.5', 'y', 'n', 'nan', "'on'", '1.2.3']


@pytest.fixture(scope='module')
def registered() -> Registered:
    return load_registered()


def faults(tmp_path, registered, overrides=(), **changed):
    path = tmp_path / 'my.yml'
    path.write_text(FILE.format(**{**RIGHT, **changed}))
    opt = options.load(path, overrides)
    with pytest.raises(OptionError) as error:
        validation.check(opt, 'my.yml', registered, explain=Sources(path, overrides).explain)
    return str(error.value)


@pytest.mark.parametrize('key', RIGHT)
def test_what_stands_there_is_quoted(key, tmp_path, registered):
    for written in NOT_TEXT:
        if written == 'null' and key in MAY_BE_NOTHING:
            continue
        message = faults(tmp_path, registered, **{key: written})
        assert f'YAML makes of {written}: put quotes around it' in message, message
        assert f"'{written}'" in message


@pytest.mark.parametrize('text', TEXT)
def test_text_stays_text(text, tmp_path):
    for line in (f'name: {text}', f'[{text}]', f'a: {{b: {text}}}'):
        (tmp_path / 'my.yml').write_text(line if line[0] != '[' else f'a: {line}')
        assert repr(text.strip("'")) in repr(options.load(tmp_path / 'my.yml'))
    assert safe_yaml.read_text(safe_yaml.write_text([text.strip("'")]), 'x') == [text.strip("'")]


def test_overrides_and_variables(tmp_path, registered, monkeypatch):
    assert 'makes of 007: put quotes' in faults(tmp_path, registered, ['name=007'])
    monkeypatch.setenv('RUN', '1_000')
    assert "makes of 1_000: put quotes around it in ${RUN}, '1_000'" in faults(tmp_path, registered, name='${RUN}')


def test_keys_of_sections():
    for written in ('on', '2024', '~', '1e3'):
        with pytest.raises(OptionError, match=f'YAML makes of {written}: put quotes'):
            safe_yaml.read_text(f'{written}: 1', 'my.yml')


def test_numbers_need_no_quotes(tmp_path, registered):
    message = faults(tmp_path, registered, ['manual_seed=12:30', 'train:optim_g:lr=on'])
    assert "manual_seed: expected a whole number, got the text '12:30'" in message
    assert 'put quotes' not in message and 'take the quotes' not in message
    path = tmp_path / 'my.yml'
    text = path.read_text().replace('total_iter: 2', "total_iter: '2'").replace('manual_seed: 0', 'manual_seed: "0"')
    path.write_text(text)
    with pytest.raises(OptionError) as error:
        validation.check(options.load(path), 'my.yml', registered, explain=Sources(path).explain)
    assert str(error.value).count(': take the quotes away') == 2


def test_stages_and_comparisons(tmp_path, capsys):
    text = FILE.format(**RIGHT) + 'stages:\n  - {name: 007, train: {total_iter: 3}}\n'
    (tmp_path / 'my.yml').write_text(text)
    assert main(['check', '-opt', str(tmp_path / 'my.yml')]) == 2
    assert 'makes of 007: put quotes' in capsys.readouterr().err
    lines = [line for line in FILE.format(**RIGHT).splitlines() if not line.startswith(('network_g', 'path'))]
    (tmp_path / 'my.yml').write_text('\n'.join([*lines, 'networks: [{name: on, network_g: {type: AST_XS}}]']))
    assert main(['check', '-opt', str(tmp_path / 'my.yml')]) == 2
    assert 'makes of on: put quotes' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('rule', 'key', 'written'),
    [('match: 007, with: {type: MLP}', 'match', '007'), ("match: 'body.*', with: {type: on}", 'with.type', 'on')],
)
def test_rules_of_a_mix_are_quoted(tmp_path, registered, rule, key, written):
    path = tmp_path / 'my.yml'
    text = FILE.format(**RIGHT).replace('{type: AST_XS, img_size: 64, attention: assa}', '{type: Mixed, base: {}}')
    path.write_text(text.replace('base: {}', f'base: {{type: EDSR, upscale: 1}}, mix: [{{{rule}}}]'))
    with pytest.raises(OptionError) as error:
        validation.check(options.load(path), 'my.yml', registered, explain=Sources(path).explain)
    assert f'network_g.mix.0.{key}: expected text' in str(error.value)
    assert f'YAML makes of {written}: put quotes around it' in str(error.value)


def test_none_of_python_is_no_text(tmp_path, registered):
    for changed in ({'weights': 'None'}, {'key': 'None'}):
        assert "expected text, or nothing, which is written ~ (got the text 'None')" in faults(
            tmp_path, registered, **changed
        )


@pytest.mark.parametrize('name', ['a: b', '@x', '%x', '`x', '*x', '!x', '&x: y'])
def test_marks_of_yaml_want_quotes(name):
    with pytest.raises(OptionError, match='put quotes around text'):
        safe_yaml.read_text(f'name: {name}', 'my.yml')


def test_space_that_does_not_break_is_said():
    with pytest.raises(OptionError, match=r'line 3 begins .*U\+00A0'):
        safe_yaml.read_text('a:\n  b: 1\n\u00a0\u00a0c:\n    d: 1\n  e: 2\n', 'my.yml')


def test_numbers_with_exponents_are_whole(tmp_path, registered):
    path = tmp_path / 'my.yml'
    path.write_text(
        FILE.format(**RIGHT).replace('total_iter: 2', 'total_iter: 1e5').replace('val_freq: 1', 'val_freq: 2e3')
    )
    opt = options.load(path)
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


@pytest.mark.parametrize('base', ['AST_quickstart', 'AST_derain', 'AST_deraindrop', 'pretrained/rain'])
def test_inherited_keys_are_said(base, tmp_path, registered):
    path = tmp_path / 'my.yml'
    path.write_text(PASTED.format(base=base))
    opt = options.load(path)
    with pytest.raises(OptionError) as error:
        validation.check(opt, str(path), registered, explain=Sources(path).explain)
    for line in str(error.value).splitlines():
        file = 'options/pretrained/' if 'pretrained' in base else f'{base}.yml:'
        assert 'inherited from' in line and file in line, line
        assert '`_delete_: true` in datasets.train' in line
    text = path.read_text().replace('type: Pairs', '_delete_: true\n    gt_size: 64\n    type: Pairs')
    more = '    batch_size_per_gpu: 1\n    num_worker_per_gpu: 0\n'
    path.write_text(text + more)
    opt = options.load(path)
    for stage in options.expand(opt):
        assert 'dataroot' not in stage.opt['datasets']['train']
