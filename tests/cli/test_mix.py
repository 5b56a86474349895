"""`basicsr mix`: output, and errors for wrong files."""

import re
from functools import partial

import pytest
import yaml
from torch import nn

from ast_plugin.archs.mixed.mixed_arch import build_base
from ast_plugin.checkpoints import read_checkpoint, save_torch
from ast_plugin.cli import main as command
from ast_plugin.evaluation.restorer import Restorer

from .. import tiny_run

BASE = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 2, 'upscale': 1}
RULE = {'match': 'body.*', 'op': 'append', 'with': {'type': 'MLP', 'mlp_ratio': 2}}
ATTENTION = {**RULE, 'with': {'type': 'SparseAttention', 'num_heads': 1}}
MIXED = {'type': 'Mixed', 'base': BASE, 'mix': [RULE]}


@pytest.fixture
def mix(run_on_network):
    return partial(run_on_network, 'mix')


def test_what_it_shows(mix):
    status, out, _ = mix(MIXED, '--size', '11', '17')
    assert status == 0
    rows = [line.split() for line in out.splitlines() if line.startswith('mix.0')]
    assert [row[:5] for row in rows] == [['mix.0', f'body.{n}', 'ResidualBlockNoBN', 'append', 'MLP'] for n in (0, 1)]
    assert all('1x8x64x65' in row for row in rows)
    # a residual block: two convolutions of 8·8·9 + 8; an MLP: 8·16 + 16 and 16·8 + 8
    assert all('1,168 -> 1,448' in line for line in out.splitlines() if line.startswith('mix.0'))
    # the network: the blocks, a convolution after them, 3·8·9 + 8 before, 8·3·9 + 3 at the end
    before = 2 * 1168 + 584 + 224 + 219
    assert re.search(rf'parameters +{before:,d} +{before + 560:,d} +\+16\.7 %', out)
    # MACs at 128x128 without biases
    macs = 128 * 128 * (2 * 1152 + 576 + 216 + 216)
    more = macs + 128 * 128 * 2 * 256
    assert re.search(rf'MACs at 128x128 +{macs / 1e9:.3f} G +{more / 1e9:.3f} G', out)
    assert re.search(r'Not counted: .*gelu', out)
    assert '11x17 -> 11x17: forward' in out and 'all finite' in out


@pytest.fixture
def bases(monkeypatch):
    """Bases `Idle`, with two parameters without gradient, and `Pooled`, which only trains on larger batches."""
    from basicsr.archs.edsr_arch import EDSR
    from basicsr.utils.registry import ARCH_REGISTRY

    class Idle(EDSR):
        def __init__(self, **options):
            super().__init__(**options)
            self.idle = nn.Conv2d(1, 1, 1)

    class Pooled(EDSR):
        def __init__(self, **options):
            super().__init__(**options)
            self.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

        def forward(self, x):
            return super().forward(x) * self.weigh(x)

    for base in (Idle, Pooled):
        monkeypatch.setitem(ARCH_REGISTRY._obj_map, base.__name__, base)


def test_sizes_and_parameters_without_a_gradient(mix, bases):
    status, out, err = mix({**MIXED, 'base': {**BASE, 'type': 'Idle', 'upscale': 2}})
    assert status == 0
    assert '61x75 -> 122x150' in out
    assert 'no gradient for base.idle.weight, base.idle.bias' in err


@pytest.mark.parametrize(
    ('network', 'words'),
    [
        ({'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3}, 'network_g.type: expected Mixed, got EDSR'),
        ({**MIXED, 'base': {**BASE, 'num_feats': 8}}, 'network_g.base.num_feats: unknown key, did you mean num_feat?'),
        ({**MIXED, 'base': {**BASE, 'type': 'EDSRR'}}, 'network_g.base.type: no arch is registered as EDSRR, did you'),
        ({**MIXED, 'base': 'EDSR'}, 'network_g.base: expected a mapping'),
        ({**MIXED, 'mix': 'ASSA'}, 'network_g.mix: expected a list'),
        ({**MIXED, 'nominal_size': '64'}, 'network_g.nominal_size: expected a whole number'),
        ({**MIXED, 'mix': [{**RULE, 'match': 'bodi.*'}]}, 'mix.0.match: no module matches bodi.*; similar names:'),
        ({**MIXED, 'mix': [{**RULE, 'with': {'type': 'FRRN'}}]}, 'no block is registered as FRRN, did you mean FRFN?'),
        ({**MIXED, 'mix': [RULE, RULE]}, 'mix.1.match: body.0 also matches mix.0'),
        ({**MIXED, 'base_weights': 'nowhere.pth'}, 'nowhere.pth does not exist'),
        ({**MIXED, 'base': {**MIXED}}, 'Mixed cannot be the base of a Mixed'),
        ({**MIXED, 'base': {**BASE, 'img_range': 1e38}, 'mix': [ATTENTION]}, 'is not finite'),
        ({**MIXED, 'base': {**BASE, 'type': 'Pooled'}}, 'Pooled does not train on one 61x75 image: ValueError: Expect'),
    ],
)
def test_wrong_files(mix, bases, network, words):
    status, out, err = mix(network)
    assert status == 2
    assert words in err
    assert err.startswith('basicsr: error: ') and 'Traceback' not in err
    assert 'forward' not in out


def test_wrong_sizes(mix):
    status, _, err = mix(MIXED, '--size', '0', '9')
    assert status == 2
    assert '--size 0 9: expected sides of 1 or more' in err


def test_training_of_a_mixed_network(tmp_path, monkeypatch, capsys):
    """Train a mixed network from base weights, resume it, and load it without the base weights file."""
    monkeypatch.chdir(tmp_path)
    file = tiny_run.write(tmp_path)
    save_torch(tmp_path / 'base.pth', {'params': build_base(BASE).state_dict()})
    opt = yaml.safe_load(file.read_text(encoding='utf-8'))
    wrap = {'match': 'body.1', 'op': 'wrap', 'with': {'type': 'ASSA', 'window_size': 4}}
    opt['network_g'] = {**MIXED, 'mix': [wrap], 'base_weights': 'base.pth', 'nominal_size': 32}
    opt['model_type'] = 'RestorationModel'
    file.write_text(yaml.safe_dump(opt, sort_keys=False), encoding='utf-8')
    assert command.main(['train', '-opt', str(file)]) == 0, capsys.readouterr().err[-2000:]
    (tmp_path / 'base.pth').unlink()
    best = tmp_path / 'experiments/tiny/models/net_g_best.safetensors'
    assert 'base_weights' not in read_checkpoint(best).network
    restorer = Restorer.from_weights(best)
    assert type(restorer.network).__name__ == 'Mixed'
    latest = read_checkpoint(tmp_path / 'experiments/tiny/models/net_g_latest.pth')
    restorer.network.load_state_dict(latest.state)
