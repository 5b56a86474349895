"""Weights files in common wrappers: the state is found, used and ignored parts are reported, others are rejected."""

import argparse
import itertools
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from ast_plugin.archs.ast_arch import AST
from ast_plugin.archs.networks import build_network, load_network, network_of
from ast_plugin.archs.state import OFFICIAL_NAMES, load_into
from ast_plugin.checkpoints import read_checkpoint, save_weights
from ast_plugin.cli.main import main
from ast_plugin.errors import CheckpointError
from ast_plugin.evaluation.restorer import Restorer
from tests import tiny_run
from tests.models import test_restoration_model as training

TINY = {'type': 'AST', 'img_size': 16, 'embed_dim': 4, 'depths': [1] * 9, 'num_heads': [1] * 9, 'window_size': 2}
NET_OF_RUN = {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 1, 'upscale': 1}
OTHER = {'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1, 'upscale': 1}


def state_of(seed, options=TINY):
    torch.manual_seed(seed)
    return dict(build_network(options).state_dict())


STATE, EMA, GRAY = state_of(0), state_of(1), state_of(2, {**TINY, 'out_chans': 1})
NUM = len(STATE)


def under(*prefixes, state=STATE):
    return {f'{prefix}{name}': tensor for prefix in prefixes for name, tensor in state.items()}


def official(state):
    names = {'input_proj.': 'input_proj.proj.0.', 'output_proj.': 'output_proj.proj.0.', '.ffn.expand.': '.mlp.fc1.'}
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed


def write(path, content):
    torch.save(content, path)
    return path


def same(network, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


WRAPPED = {
    'compiled': under('_orig_mod.'),
    'compiled_in_parallel': under('module._orig_mod.'),
    'parallel_compiled': under('_orig_mod.module.'),
    'compiled_inside': {name.replace('encoder.0.', 'encoder.0._orig_mod.'): t for name, t in STATE.items()},
    'parallel_inside': {name.replace('encoder.0.', 'encoder.0.module.'): t for name, t in STATE.items()},
    'lightning': {'state_dict': under('net.'), 'hyper_parameters': argparse.Namespace(lr=1), 'epoch': 3},
    'lightning_with_losses': {'state_dict': under('net.') | {'loss.vgg.0.weight': torch.ones(3, 3)}},
    'model': under('model.'),
    'nested': {'model': {'state_dict': under('module.net.')}},
    'generator': {'generator': STATE, 'discriminator': {'conv.weight': torch.ones(2, 2)}},
    'gen': {'gen': STATE, 'disc': {'conv.weight': torch.ones(2, 2)}},
    'kair': {'netG': STATE, 'netD': {'conv.weight': torch.ones(2, 2)}},
    'number_inside': {'params': {**STATE, 'scale': 1}},
    'flat_with_more': {**STATE, 'epoch': 3, 'optimizer': {'state': {0: {'exp_avg': torch.ones(9)}}}},
    'average_of_swa_utils': under('module.') | {'n_averaged': torch.tensor(3)},
    'counted_by_thop': STATE | {'total_ops': torch.zeros(1).sum(), 'encoder.0.total_params': torch.tensor(1.0)},
    'numpy_numbers': {
        'best_psnr': np.float64(31.2),
        'best': {'i': np.int64(-3), 'b': np.bool_(True), 'f': np.float32(2)},
        'mean': np.ones(3),
        'path': Path('x'),
        'state_dict': STATE,
    },
    'only_one_of_any_name': {'weights_of_the_thing': STATE, 'note': 'mine'},
    'official': {'epoch': 1, 'state_dict': under('module.', state=official(STATE)), 'optimizer': {'state': {}}},
    'official_compiled': {'state_dict': under('_orig_mod.', state=official(STATE))},
}


NOTES = {
    'number_inside': '(not tensors): scale',
    'lightning_with_losses': 'ignored: loss.vgg.0.weight',
    'average_of_swa_utils': 'ignored: n_averaged',
    'counted_by_thop': 'counters: total_ops',
    'model': 'removed the prefix model.',
}


@pytest.mark.parametrize('case', WRAPPED)
def test_wrapped_state_is_found(case, tmp_path):
    path = write(tmp_path / 'w.pth', WRAPPED[case])
    restorer = Restorer.from_weights(path, device='cpu')  # infer, compare and ast_plugin's own loading
    assert same(restorer.network, STATE)
    assert case not in NOTES or any(NOTES[case] in note for note in restorer.notes), restorer.notes
    for strict in (True, False):  # training and testing
        report = load_into(network := build_network(TINY), read_checkpoint(path), strict=strict)
        assert same(network, STATE)
        assert report[0] == f'{NUM} of {NUM} tensors loaded'


def test_users_own_loading():
    for case in ('compiled', 'compiled_in_parallel', 'model', 'average_of_swa_utils', 'flat_with_more'):
        network = AST(**{key: value for key, value in TINY.items() if key != 'type'})
        network.load_state_dict(WRAPPED[case])
        assert same(network, STATE), case
    with pytest.raises(CheckpointError, match='expected torch'):
        network.load_state_dict({name: tensor.numpy() for name, tensor in STATE.items()}, strict=False)


AVERAGES = {
    'params_ema': {'params': STATE, 'params_ema': EMA},
    'state_dict_ema': {'state_dict': STATE, 'state_dict_ema': EMA},
    'ema': {'model': STATE, 'ema': EMA},
    'ema_state_dict': {'ema_state_dict': EMA, 'state_dict': STATE},
    'g_ema': {'g': STATE, 'd': {'w': torch.ones(2)}, 'g_ema': EMA},
    'names': {'state_dict': under('net.') | under('ema_model.', state=EMA)},
}


@pytest.mark.parametrize('case', AVERAGES)
def test_average_is_preferred_and_reported(case, tmp_path):
    path = write(tmp_path / 'w.pth', AVERAGES[case])
    restorer = Restorer.from_weights(path, network=TINY, device='cpu')
    assert same(restorer.network, EMA)
    assert any('ema' in note for note in restorer.notes)


@pytest.mark.parametrize(
    ('content', 'key'),
    [({'params': STATE}, 'nonsense'), (STATE, 'encoder.9'), ({'params': STATE, 'params_ema': EMA}, 'params.nonsense')],
)
def test_no_other_key_than_requested(content, key, tmp_path):
    path = write(tmp_path / 'w.pth', content)
    with pytest.raises(CheckpointError, match=f"under the key '{key}'; available: "):
        load_network(TINY, path, key)
    (tmp_path / 'in').mkdir()
    assert main(['infer', '-i', str(tmp_path), '-o', str(tmp_path / 'o'), '--weights', str(path), '--param-key', key])


def test_keys_that_are_requested(tmp_path):
    path = write(tmp_path / 'w.pth', {'a': {'b': STATE}, 'flat': under('net_g.', 'other.')})
    for key in ('a.b', 'flat', 'flat.net_g'):
        assert read_checkpoint(path, key).param_key == key
    save_weights(tmp_path / 'w.safetensors', STATE, TINY)
    with pytest.raises(CheckpointError, match='at the top level'):
        read_checkpoint(tmp_path / 'w.safetensors', 'params')
    (tmp_path / 'w.pth').write_bytes((tmp_path / 'w.safetensors').read_bytes())  # downloaded under another name
    assert network_of(read_checkpoint(tmp_path / 'w.pth'))[0] == TINY


def test_several_states_of_unknown_names(tmp_path):
    path = write(tmp_path / 'w.pth', {'first': STATE, 'second': EMA})
    with pytest.raises(CheckpointError, match='several states, first, second: select one with --param-key'):
        read_checkpoint(path)
    assert same(load_network(TINY, path, 'second'), EMA)


@pytest.mark.parametrize('state', [STATE, under('net.', state=official(STATE))], ids=['ours', 'official, wrapped'])
def test_loosely_with_other_channels(state, tmp_path):
    path = write(tmp_path / 'w.pth', {'state_dict': state})
    network = build_network({**TINY, 'out_chans': 1})
    report = load_into(network, read_checkpoint(path), strict=False)
    assert report[0] == f'{NUM - 2} of {NUM} tensors loaded'
    assert any('shape mismatch: output_proj' in line for line in report)
    assert torch.equal(network.state_dict()['input_proj.weight'], STATE['input_proj.weight'])
    with pytest.raises(CheckpointError, match='output_proj'):
        load_into(network, read_checkpoint(path))


def test_zero_tensors_are_rejected(tmp_path):
    path = write(tmp_path / 'w.pth', {'state_dict': state_of(0, OTHER)})
    with pytest.raises(CheckpointError, match=f'none of its .* matches one of the {NUM} of AST'):
        load_into(build_network(TINY), read_checkpoint(path), strict=False)


def test_files_of_other_kinds_are_named(tmp_path):
    for name in ('lfs.pth', 'lfs.safetensors'):
        (tmp_path / name).write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    (tmp_path / 'big.pth').write_bytes(b'\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.')
    with zipfile.ZipFile(tmp_path / 'packed.pth', 'w') as file:
        file.writestr('w.pth', b'0')
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(1, 1, 1)), tmp_path / 'script.pth')
    write(tmp_path / 'arrays.pth', {name: tensor.numpy() for name, tensor in STATE.items()})
    write(tmp_path / 'state.pth', {'epoch': 1, 'iter': 9, 'optimizers': [], 'schedulers': []})
    for name, words in {
        'lfs.pth': 'git lfs pull',
        'lfs.safetensors': 'git lfs pull',
        'big.pth': 'weights file',
        'packed.pth': 'archive of w.pth: unpack it',
        'script.pth': 'TorchScript program',
        'arrays.pth': 'NumPy arrays',
        'state.pth': 'training state',
    }.items():
        with pytest.raises(CheckpointError, match=words) as error:
            read_checkpoint(tmp_path / name)
        assert 'get it again' not in str(error.value) or name == 'big.pth'


UNUSUAL = {
    'meta': lambda tensor: tensor.to('meta'),
    'sparse': lambda tensor: tensor.to_sparse(),
    'complex': lambda tensor: tensor.to(torch.complex64),
    'int8': lambda tensor: tensor.to(torch.int8),
    'bool': lambda tensor: tensor > 0,
}


@pytest.mark.parametrize('case', UNUSUAL)
def test_values_that_are_no_weights(case, tmp_path):
    path = write(tmp_path / 'w.pth', {'params': {name: UNUSUAL[case](tensor) for name, tensor in STATE.items()}})
    for strict in (True, False):
        with pytest.raises(CheckpointError) as error:
            load_into(build_network(TINY), read_checkpoint(path), strict=strict)
        assert len(str(error.value)) < 300


def test_several_states_in_one_dictionary(tmp_path):
    path = write(tmp_path / 'w.pth', {'state_dict': under('student.') | under('teacher.', state=EMA)})
    for strict in (True, False):
        words = r'several state dicts, student, teacher: .* prefixed with state_dict\.'
        with pytest.raises(CheckpointError, match=words):
            load_into(build_network(TINY), read_checkpoint(path), strict=strict)
    assert same(load_network(TINY, path, 'state_dict.teacher'), EMA)
    path = write(tmp_path / 'w.pth', under('old.', state=EMA) | under('net_g.'))
    assert same(load_network(None, path), STATE)  # the one that a run is of
    assert same(load_network(None, write(tmp_path / 'w.pth', {0: STATE})), STATE)


def test_average_without_names_is_reported(tmp_path):
    average = {'decay': 0.9, 'shadow_params': list(EMA.values())}
    path = write(tmp_path / 'w.pth', {'model': STATE, 'ema': average, 'ema_decay': 0.9})
    assert read_checkpoint(path).notes == ('averaged weights under ema have no names and are ignored',)


def test_numpy_numbers_are_plain(tmp_path):
    from ast_plugin.checkpoints import _torch_load

    values = {'a': np.float64(31.2), 'b': np.int32(-7), 'c': np.uint8(200), 'd': np.bool_(True), 'e': np.float16(0.5)}
    read = _torch_load(write(tmp_path / 'w.pth', values))
    assert read == values
    assert {type(value) for value in read.values()} == {float, int, bool}


def test_order_of_states_is_no_matter(tmp_path):
    for order in itertools.permutations(AVERAGES['state_dict_ema'].items()):
        assert read_checkpoint(write(tmp_path / 'w.pth', OrderedDict(order))).param_key == 'state_dict_ema'


def test_official_names_are_what_is_tested():
    assert len(OFFICIAL_NAMES) > 10 and official(STATE).keys() != STATE.keys()


# ---- every place that reads weights


def trained(folder, path, **options):
    opt = training.options(folder, ema_decay=0.5)
    opt['network_g'] = dict(TINY)
    opt['path'].update(pretrain_network_g=str(path), **options)
    return training.build(opt)


def test_training_and_its_average(tmp_path):
    both = write(tmp_path / 'both.pth', {'params': under('_orig_mod.'), 'params_ema': under('_orig_mod.', state=EMA)})
    for strict in (True, False):
        for options, network, average in (({}, EMA, EMA), ({'param_key_g': 'params'}, STATE, EMA)):
            model = trained(tmp_path, both, strict_load_g=strict, **options)
            assert same(model.net_g, network) and same(model.net_g_ema, average)
    with pytest.raises(CheckpointError, match='under the key'):
        trained(tmp_path, both, param_key_g='nonsense')
    with pytest.raises(CheckpointError, match='none of its'):
        trained(tmp_path, write(tmp_path / 'other.pth', state_of(0, OTHER)), strict_load_g=False)


def test_mixed_takes_them_for_its_base(tmp_path):
    base = state_of(3, OTHER)
    path = write(tmp_path / 'w.pth', {'generator': {f'module._orig_mod.{name}': t for name, t in base.items()}})
    rule = {'match': 'body.2', 'with': {'type': 'FRFN', 'mlp_ratio': 2}}
    options = {'type': 'Mixed', 'base': OTHER, 'base_weights': str(path), 'mix': [rule], 'nominal_size': 16}
    mixed = build_network(options)
    assert torch.equal(mixed.state_dict()['base.body.0.weight'], base['body.0.weight'])
    with pytest.raises(CheckpointError, match=r'base_weights: .* under the key'):
        build_network({**options, 'base_param_key': 'params'})


def test_checks_refuse_before_anything_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'other.pth', {'params': state_of(0, TINY)})
    write(tmp_path / 'own.pth', {'generator': {f'net.{name}': t for name, t in state_of(0, NET_OF_RUN).items()}})
    file = str(tiny_run.write(tmp_path))
    opt = ['-opt', file, '--force_yml', 'model_type=RestorationModel']
    for name, more, words in (
        ('other.pth', ['path:strict_load_g=false'], 'none of its'),
        ('own.pth', ['path:param_key_g=params'], "under the key 'params'; available: generator"),
    ):
        for command in ('check', 'train', 'test'):
            assert main([command, *opt, f'path:pretrain_network_g={name}', *more]) == 2
            assert words in capsys.readouterr().err
    assert not (tmp_path / 'experiments').exists() and not (tmp_path / 'results').exists()
    monkeypatch.setattr('ast_plugin.cli.info.predict_memory', lambda *_: None)  # in processes of its own
    assert main(['info', *opt, '--weights', 'own.pth', '--size', '16x16']) == 0
    out = capsys.readouterr().out
    assert 'weights     8 of 8 tensors loaded' in out and 'removed the prefix net.' in out
    # The option file's key is of the weights that it names, not of others.
    assert main(['test', *opt, 'path:param_key_g=state_dict', '--weights', 'own.pth']) == 0
