"""`basicsr mix`: output, and networks that do not train."""

import re

import pytest
import yaml
from torch import nn

from ast_plugin.archs.mixed.mixed_arch import build_base
from ast_plugin.checkpoints import read_checkpoint, save_torch
from ast_plugin.evaluation.restorer import Restorer

from .. import tiny_run

BASE = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 2, 'upscale': 1}
RULE = {'match': 'body.*', 'op': 'append', 'with': {'type': 'MLP', 'mlp_ratio': 2}}
MIXED = {'type': 'Mixed', 'base': BASE, 'mix': [RULE]}


def test_mix_output(run_on_network):
    out, _ = run_on_network('mix', MIXED, '--size', '11', '17')
    lines = [line for line in out.splitlines() if line.startswith('mix.0')]
    assert [line.split()[:5] for line in lines] == [
        ['mix.0', f'body.{number}', 'ResidualBlockNoBN', 'append', 'MLP'] for number in (0, 1)
    ]
    # a residual block: two convolutions of 8·8·9 + 8; an MLP: 8·16 + 16 and 16·8 + 8
    assert all('1x8x64x65' in line and '1,168 -> 1,448' in line for line in lines)
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


def test_mix_of_bases_that_train_in_part(run_on_network, bases):
    out, err = run_on_network('mix', {**MIXED, 'base': {**BASE, 'type': 'Idle', 'upscale': 2}})
    assert '61x75 -> 122x150' in out
    assert 'no gradient for base.idle.weight, base.idle.bias' in err
    _, err = run_on_network('mix', {**MIXED, 'base': {**BASE, 'type': 'Pooled'}}, status=2)
    assert 'Pooled does not train on one 61x75 image: ValueError: Expect' in err


def test_training_of_a_mixed_network(basicsr, tmp_path, monkeypatch):
    """Train a mixed network from base weights, and load it without the base weights file."""
    monkeypatch.chdir(tmp_path)
    file = tiny_run.write(tmp_path)
    save_torch(tmp_path / 'base.pth', {'params': build_base(BASE).state_dict()})
    opt = yaml.safe_load(file.read_text(encoding='utf-8'))
    wrap = {'match': 'body.1', 'op': 'wrap', 'with': {'type': 'ASSA', 'window_size': 4}}
    opt['network_g'] = {**MIXED, 'mix': [wrap], 'base_weights': 'base.pth', 'nominal_size': 32}
    opt['model_type'] = 'RestorationModel'
    file.write_text(yaml.safe_dump(opt, sort_keys=False), encoding='utf-8')
    basicsr('train', '-opt', file)
    (tmp_path / 'base.pth').unlink()
    models = tmp_path / 'experiments/tiny/models'
    assert 'base_weights' not in read_checkpoint(models / 'net_g_best.safetensors').network
    network = Restorer.from_weights(models / 'net_g_best.safetensors').network
    assert type(network).__name__ == 'Mixed'
    network.load_state_dict(read_checkpoint(models / 'net_g_latest.pth').state)
