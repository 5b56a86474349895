"""Command line of the benchmarks: invalid input, tables, records, and equal results of all paths of a case."""

import functools
import json
import re
import runpy
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ast_plugin.__main__ import main as basicsr
from ast_plugin.archs.ast_arch import AST
from ast_plugin.degradations import DEGRADATIONS
from ast_plugin.errors import OptionError
from benchmarks import data, net, ops, peers, records, start, synthesis, timing, train
from benchmarks.__main__ import main
from benchmarks.net import Setup

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        ('net --turns 0', '--turns: expected 1 or more, got 0'),
        ('net --net AST_C', 'AST_C: not a registered network'),
        ('net --net MSRResNet', 'MSRResNet: expected an AST'),
        ('start --workers -1', '--workers: expected 0 or more, got -1'),
        ('train --device cuda', '--device cuda: PyTorch found no GPU'),
        ('data --workers 0 -1', '--workers must be 0 or more'),
        ('data --patch 300', '--patch 300 must not exceed --size 256'),
        ('data --size 5000', 'larger than all packaged photos'),
        ('synthesis --json file/out.json', 'cannot be written'),
    ],
)
def test_wrong_arguments(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()
    try:
        status = main(words.split())
    except SystemExit as ended:  # argparse
        status = ended.code
    assert status == 2 and message in capsys.readouterr().err


def test_door_in_tools(tmp_path, monkeypatch, capsys):
    """The documented call works from any folder."""
    door = ROOT / 'tools' / 'benchmark.py'
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [str(door), 'table', str(ROOT / 'benchmarks' / 'net_cpu.json')])
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if Path(path).resolve() != ROOT])
    for name in [name for name in sys.modules if name.partition('.')[0] == 'benchmarks']:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(door), run_name='__main__')
    assert not ended.value.code
    assert '| 512² forward | fused | ' in capsys.readouterr().out


def test_records_of_the_project(capsys):
    for file in (ROOT / 'benchmarks').glob('*.json'):
        record = json.loads(file.read_text())
        if record['benchmark'] in ('net', 'ops', 'peers'):
            assert main(['table', str(file)]) == 0
            assert ' speed-up ' in capsys.readouterr().out
        elif record['benchmark'] == 'train':
            assert train.table(record['results']).startswith('| switch |')
            lines = [line for measured in record['results'].values() for line in measured or ()]
            assert {line['switch'] for line in lines} <= set(train.SWITCHES)


def test_files_that_are_not_records(tmp_path, capsys):
    machine = '{"results": [], "machine": {"processor": "", "threads": 1, "load": 1}, "versions": {}}'
    for content in ('{', '[]', '{"results": [1], "machine": {}, "versions": {}}', machine):
        (tmp_path / 'a.json').write_text(content)
        assert main(['table', str(tmp_path / 'a.json')]) == 2
        assert 'a.json is not a record' in capsys.readouterr().err


# ---- timing


def test_a_path_that_fails_is_a_line():
    def fail():
        raise RuntimeError('no compiler\nat all')

    x = torch.ones(3)
    paths = {'reference': lambda: lambda: x, 'other': lambda: lambda: 1.5 * x, 'broken': fail}
    lines = timing.measure_paths('case', paths, 2, lambda path, compute: 7)
    assert lines['broken']['skipped'] == 'failed: no compiler' and 'seconds' not in lines['broken']
    assert lines['other']['error'] == 0.5 and lines['other']['peak_bytes'] == 7
    assert all(len(lines[path]['seconds']) == len(lines[path]['cpu_seconds']) == 2 for path in ('reference', 'other'))


def test_speeds_between_calls():
    found = iter([0.5, 0.25, 1.0])
    taken = timing.take_turns({'one': lambda: None}, 2, lambda: next(found))
    assert taken['one']['speeds'] == [0.5, 1.0]  # the maximum of before and after


def test_backend_table():
    lines = [
        {'case': 'one', 'path': 'a', 'seconds': [4.0, 2.0, 3.0], 'cpu_seconds': [6.0], 'peak_bytes': 100},
        {'case': 'one', 'path': 'b', 'seconds': [1.5], 'cpu_seconds': [2.0], 'peak_bytes': 20 * 2**20},
        {'case': 'one', 'path': 'c', 'seconds': [0.5], 'cpu_seconds': [0.5], 'peak_bytes': None, 'error': 1e-7},
        {'case': 'one', 'path': 'd', 'skipped': 'no time'},
    ]
    lines[0] |= {'floor': 1.0, 'speeds': [0.5, 1.0, 0.5]}
    lines[1] |= {'floor': 1.5, 'speeds': [1.0]}
    timing.add_ratios(lines)
    assert lines[0]['of_floor'] == 0.5  # the middle one of 2 / 4, 1 / 2 and 2 / 3
    assert [line.get('faster') for line in lines] == [1, 2, 6, None]
    rows = records.backend_table(lines).splitlines()
    assert rows[3] == '| one | b | 1.50 s | 1.50 s | 2.00 | 2.00 s | 3.00 | 20 | 209715.20 | 100% |  |'
    assert rows[4] == '| one | c | 500.0 ms | 500.0 ms | 6.00 | 500.0 ms | 12.00 |  |  |  | 1e-07 |'
    assert rows[5].startswith('| one | d | no time |')
    assert len({row.count('|') for row in rows}) == 1


# ---- net and ops


def test_net_lines():
    found = net.list_setups('AST_B', 512, net.CASES, compiles=True)
    assert {case: [setup.path for setup in setups] for case, setups in found.items()} == {
        '256² forward': ['reference', 'fused', 'torch.compile'],
        '512² forward': ['reference', 'fused', 'fused, bf16', 'torch.compile'],
        '2×128² forward and backward': ['reference', 'fused', 'torch.compile'],
        'photograph 480×720': ['reference, 768²', 'fused, whole', 'torch.compile', 'basicsr infer'],
        '480×720, exported': ['reference', 'fused', 'onnxruntime'],
        '512² forward, bf16, CUDA': ['reference', 'triton', 'triton, graph', 'torch.compile'],
        '8×256² forward and backward, bf16, CUDA': ['reference', 'triton', 'triton, graph', 'torch.compile'],
    }
    assert {setup.padded for setup in found['photograph 480×720']} == {(768, 768), (480, 720)}
    on_cpu = [case for case, setups in found.items() if setups[0].device == 'cpu']
    assert on_cpu[-1] == '2×128² forward and backward'  # as it makes malloc keep freed memory until the process ends


def ast(net='AST_XS', **settings):
    return Setup({'type': net, 'drop_path_rate': 0.0}, **settings)


def test_net_operations():
    operations, moved = net.count(ast('AST_B', backend='fused'))
    # 109.8 GMACs as in the README's table of variants, which does not count the products of attention scores.
    assert 2 * 109.8e9 <= operations <= 2 * 109.8e9 * 1.1
    assert moved > 0
    setup = ast(size=(128, 128))
    one, two, trained = (net.count(each)[0] for each in (setup, replace(setup, batch=2), replace(setup, trains=True)))
    assert (two, trained) == (2 * one, 3 * one)


@pytest.mark.parametrize('trains', [False, True])
def test_net_ways_compute_one_thing(monkeypatch, trains):
    setup = ast(size=(40, 56), trains=trains)
    reference = net.prepare(setup)()
    compute = net.prepare(replace(setup, backend='fused'))
    output = compute()
    assert output.shape == (1, 3, 40, 56) and torch.equal(compute(), output)
    torch.testing.assert_close(output, reference, rtol=1e-4, atol=1e-5)
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **options: compiled.append(type(self).__name__))
    for changes in ({'is_compiled': True}, {'is_graphed': True} if trains else {}):
        torch.testing.assert_close(net.prepare(replace(setup, **changes))(), reference)
    assert set(compiled) == {'ASTBlock'}
    if not trains:
        command = net.prepare(replace(setup, backend='fused', is_command=True))()
        assert (output.clamp(0, 1) - command).abs().max() < 3 / 255  # input and output are 8-bit images
        assert command.unique().numel() > 50
        pytest.importorskip('onnxruntime', reason='extra onnx')
        exported = net.prepare(replace(setup, is_exported=True))()
        torch.testing.assert_close(exported, reference, rtol=0, atol=1e-5)


def test_net_prints_and_writes(tmp_path, monkeypatch, capsys):
    """Measure a case on the CPU with its memory; GPU rows are marked as not run."""
    gpu = net.list_setups('AST_XS', 512, ['gpu'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(timing, '_fastest', lambda compute, device, calls=6: 1e-3)
    small = {'small': [ast(case='small', path='reference', size=(64, 64))]}
    monkeypatch.setattr(net, 'list_setups', lambda *_: {**small, **gpu})
    file = tmp_path / 'net.json'
    assert main(['net', '--net', 'AST_XS', '--turns', '1', '--json', str(file)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    record = json.loads(file.read_text())
    small, compiled, *gpu = record['results']
    assert (small['path'], compiled['skipped'][:7]) == ('reference', 'not run')
    assert small['peak_bytes'] > 2**20 and small['of_floor'] > 0
    assert [line['skipped'] for line in gpu] == ['not run: PyTorch found no GPU'] * 6
    assert record['versions']['torch'] == torch.__version__ and record['machine']['threads'] > 0
    assert main(['table', str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines


def test_net_targets():
    lines = [
        {'case': '512² forward', 'path': 'reference', 'median': 8.0},
        {'case': '512² forward', 'path': 'fused', 'of_floor': 0.76, 'of_memory': 0.3},
        {'case': '512² forward', 'path': 'fused, bf16', 'of_floor': 0.69, 'of_memory': 0.3},
        {'case': '2×128² forward and backward', 'path': 'fused', 'of_floor': 0.8, 'of_memory': 0.7},
        {'case': '64² forward', 'path': 'fused', 'of_floor': 0.9},
    ]
    assert [': reached:' in line for line in net.target_remarks(lines)] == [True, False, False]
    # 16 s at 193 GFLOP/s are 8 s at twice the rate.
    (text,) = net.official_remarks(lines, 386e9)
    assert 'the reference takes 8.00 s, the official network 8.00 s' in text


def test_peers_lines(monkeypatch):
    published = [setup.path for setup in peers.list_setups('published')]
    assert published == ['AST-B', 'AST-B, by plain operators', 'NAFNet', 'Restormer', 'Uformer-B', 'SwinIR']
    monkeypatch.setattr(peers, '_SIZE', 64)
    monkeypatch.setattr(net, 'in_onnx_runtime', lambda network: network)
    monkeypatch.setattr(net, 'in_fresh_process', lambda function, *arguments: 2**20)
    setups = [setup for setup in peers.list_setups('equal') if 'AST' in setup.path or setup.path == 'SwinIR']
    lines = net.measure_case(setups, 1, {'fp32': 1e9, 'copy': 1e9})
    assert [line['path'] for line in lines] == ['AST', 'AST, by plain operators', 'AST, by ONNX Runtime', 'SwinIR']
    assert [line['operations'] for line in lines] == [lines[0]['operations']] * 3 + [lines[3]['operations']]
    assert all(line['of_floor'] > 0 and line['faster'] > 0 for line in lines)


def test_ops_halves():
    lines = ops.measure([16], 1, False, {'fp32': 1e9, 'bf16': 1e9})
    measured = [line for line in lines if 'skipped' not in line]
    assert len(measured) == 12
    assert all(line['error'] < (1e-5 if 'fp32' in line['case'] else 3e-2) for line in measured)
    assert all(line['of_floor'] > 0 for line in measured)


# ---- train


@pytest.fixture
def tiny(monkeypatch):
    from basicsr.utils.registry import ARCH_REGISTRY

    build = functools.partial(AST, img_size=16, embed_dim=4, depths=[1] * 9, num_heads=[1] * 9)
    monkeypatch.setitem(ARCH_REGISTRY._obj_map, 'TinyAST', build)
    monkeypatch.setattr('ast_plugin.models.network_switches.DEFAULT_BACKEND', 'eager')
    return train.Settings('TinyAST', batch=2, size=16, iters=3, device='cpu')


def test_train_switches_start_from_equal_weights(tiny, monkeypatch):
    seen = []
    original = torch.optim.AdamW.step

    @functools.wraps(original)
    def step(self, *args, **kwargs):
        seen.append(torch.cat([p.detach().flatten().clone() for p in self.param_groups[0]['params']]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, 'step', step)
    for name in (train.REFERENCE, 'bf16', 'channels_last', 'gradient_checkpointing', 'ema_decay'):
        train.Steps(tiny, train.SWITCHES[name]).warm_up()
    assert len(seen) == 2 * 5
    assert all(torch.equal(weights, seen[0]) for weights in seen[::2])
    assert not any(torch.equal(weights, seen[0]) for weights in seen[1::2])


def test_train_switch_that_fails_is_a_line(tiny, monkeypatch):
    class Steps:
        def __init__(self, settings, switches):
            if switches.get('precision') == 'fp16':
                raise OptionError('not here\nat all')

        def __call__(self):
            time.sleep(0.001)

        def warm_up(self):
            pass

    monkeypatch.setattr(train, 'Steps', Steps)
    monkeypatch.setattr(train, 'in_fresh_process', lambda function, *arguments: 2**20)
    lines = train.measure(tiny, {name: train.SWITCHES[name] for name in ('fp32', 'fp16', 'bf16')})
    assert [line.get('failed') for line in lines] == [None, 'OptionError: not here', None]
    assert all(len(line['seconds']) == 3 and line['peak_bytes'] == 2**20 for line in lines[::2])


def test_train_prints_and_writes(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(train, 'in_fresh_process', lambda function, *arguments: function(*arguments))
    file = tmp_path / 'records' / 'train.json'
    words = ['--net', 'TinyAST', '--size', '16', '--batch', '1', '--iters', '1', '--switches', 'fp32']
    assert main(['train', *words, '--json', str(file)]) == 0
    printed = capsys.readouterr().out
    assert '| fp32 | ' in printed
    assert 'CUDA: AST_B, batch 8 of 256²: not measured, no GPU found' in printed
    results = json.loads(file.read_text())['results']
    assert results['cuda'] is None and results['cpu'][0]['iterations_per_second'] > 0


def test_train_table():
    lines = [
        {'switch': 'fp32', 'iterations_per_second': 2.0, 'peak_bytes': 100 * 2**20},
        {'switch': 'bf16', 'iterations_per_second': 3.0, 'peak_bytes': 60 * 2**20},
        {'switch': 'fp16', 'failed': 'OptionError: no', 'peak_bytes': 1},
        {'switch': 'fused', 'iterations_per_second': 2.5, 'peak_bytes': None},
    ]
    rows = train.table({'cpu': lines, 'cuda': None}).splitlines()
    assert rows[0] == '| switch | CPU it/s | × | CPU peak MB | × | CUDA it/s | × | CUDA peak MB | × |'
    assert [re.sub(' +', ' ', row) for row in rows[2:]] == [
        '| fp32 | 2.000 | 1.00 | 100 | 1.00 | | | | |',
        '| bf16 | 3.000 | 1.50 | 60 | 0.60 | | | | |',
        '| fp16 | not supported | | | | | | | |',
        '| fused | 2.500 | 1.25 | | | | | | |',
    ]


# ---- data and synthesis


def test_data_reads_every_way(tmp_path, capsys):
    file = tmp_path / 'record.json'
    few = ['--pairs', '3', '--size', '64', '--patch', '32', '--rounds', '2', '--workers', '0', '--json', str(file)]
    assert main(['data', *few]) == 0
    rows = [line.split('|') for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    record = json.loads(file.read_text())
    lines = {line['reader']: line for line in record['results']['one_process']}
    assert [row[1].strip() for row in rows[2:]] == list(lines)
    assert lines[data.OPENCV]['of_opencv'] == lines[data.BASICSR]['of_basicsr'] == 1
    assert all(len(line['seconds']) == 2 and line['pairs_per_second'] > 0 for line in lines.values())
    assert record['settings']['patch'] == 32 and record['results']['loader'] == {}


def test_start_options_are_right(tmp_path, capsys):
    data.write_pairs(tmp_path, 5, 96)
    started = start.commands(tmp_path, 0)
    assert basicsr(['check', '-opt', str(tmp_path / 'ours.yml'), '--root', str(tmp_path)]) == 0, capsys.readouterr().err
    assert 'PairedImageDataset' in (tmp_path / 'theirs.yml').read_text()
    assert [name for name in started if 'iteration' in name] == list(started)[2:]


def test_start_takes_the_first_iteration(tmp_path):
    says = "import sys, time; print('[iter:       1, lr]'); time.sleep(1)"
    commands = {'a first iteration': [sys.executable, '-c', says], 'import': [sys.executable, '-c', '']}
    lines = start.measure(commands, tmp_path, 2)
    assert all(seconds < 1 for seconds in lines[0]['seconds']) and len(lines[1]['cpu_seconds']) == 2
    with pytest.raises(OptionError, match='ended with 0'):  # without an iteration
        start.measure({'a first iteration': [sys.executable, '-c', '']}, tmp_path, 1)
    with pytest.raises(OptionError, match='ended with 3: broken'):
        start.measure({'import': [sys.executable, '-c', "print('broken'); raise SystemExit(3)"]}, tmp_path, 1)


def test_synthesis_record_and_table(tmp_path, monkeypatch, capsys):
    photos = synthesis.scaled_photos()
    assert len(photos) > 1 and {photo.shape for photo in photos} == {(480, 720, 3)}
    assert all(photo.dtype == np.float32 and 0 <= photo.min() < photo.max() <= 1 for photo in photos)
    monkeypatch.setattr(synthesis, 'scaled_photos', lambda: photos[:1])
    file = tmp_path / 'synthesis.json'
    assert main(['synthesis', '--seeds', '2', '--json', str(file)]) == 0
    lines = json.loads(file.read_text())['results']
    assert [line['degradation'] for line in lines] == list(DEGRADATIONS)
    table = capsys.readouterr().out
    for line in lines:
        assert 10 <= line['psnr'][0] < line['psnr'][-1] <= 36 and sorted(line['psnr']) == line['psnr']
        assert line['milliseconds'] > 0 and f'| {line["degradation"]} | ' in table
