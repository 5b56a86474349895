import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ast_plugin  # noqa: F401  registers everything
from ast_plugin.compare import benchmark_network, benchmark_ops, benchmark_table, benchmark_targets
from ast_plugin.compare.benchmark_backends import add_ratios, table, take_turns
from ast_plugin.compare.benchmark_network import Way, count, prepare, ways
from ast_plugin.compare.resident_memory import resident_growth
from ast_plugin.errors import DataError, OptionError

ROOT = Path(__file__).parents[2]


def parsed(module, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


def test_functions_take_turns():
    order = []
    taken = take_turns({name: lambda name=name: order.append(name) for name in 'ab'}, 3)
    assert ''.join(order) == 'ababab'
    assert all(len(line['seconds']) == len(line['cpu_seconds']) == 3 for line in taken.values())


def test_ratios_are_against_the_first_line_of_a_case():
    lines = [
        {'case': 'one', 'path': 'a', 'seconds': [4.0, 2.0, 3.0], 'cpu_seconds': [6.0], 'peak_bytes': 100, 'floor': 1.0},
        {'case': 'one', 'path': 'b', 'seconds': [1.5], 'cpu_seconds': [2.0], 'peak_bytes': 20 * 2**20, 'floor': 1.5},
        {'case': 'two', 'path': 'c', 'seconds': [0.5], 'cpu_seconds': [0.5], 'peak_bytes': None, 'error': 1e-7},
        {'case': 'two', 'path': 'd', 'skipped': 'no time'},
    ]
    add_ratios(lines)
    assert [line.get('faster') for line in lines] == [1, 2, 1, None]
    assert (lines[1]['less_cpu'], lines[1]['of_floor'], lines[0]['fastest']) == (3, 1, 2)
    rows = table(lines).splitlines()
    assert rows[3] == '| one | b | 1.50 s | 1.50 s | 2.00 | 2.00 s | 3.00 | 20 | 209715.20 | 100% |  |'
    assert rows[4] == '| two | c | 500.0 ms | 500.0 ms | 1.00 | 500.0 ms | 1.00 |  |  |  | 1e-07 |'
    assert rows[5].startswith('| two | d | no time |')
    assert len({row.count('|') for row in rows}) == 1


def test_growth_is_what_a_call_needs():
    if not Path('/proc/self/status').exists():
        pytest.skip('only Linux tells')
    assert 2**28 * 0.9 < resident_growth(lambda: bytearray(b'x' * 2**27)) < 2**28 * 1.5  # the bytes, and their copy


def test_the_lines_of_a_network():
    every = ways('AST_B', 512, list(benchmark_network.CASES))
    assert [(way.case, way.path) for way in every if way.backend == 'reference'] == [
        ('256² forward', 'reference'),
        ('512² forward', 'reference'),
        ('2×128² forward and backward', 'reference'),
        ('photograph 480×720', 'reference, 768²'),
    ]
    assert {way.padded for way in every if way.case.startswith('photograph')} == {(768, 768), (480, 720)}
    assert all(way.case != '256² forward' or way.precision == 'fp32' for way in every)


def test_counted_operations():
    way = Way('', '', 'AST_B', 'fused', 'fp32', 1, (256, 256))
    operations, moved = count(way)
    # 109.8 GMACs, as the README's table of variants has it; its way of counting leaves out products of scores.
    assert 2 * 109.8e9 <= operations <= 2 * 109.8e9 * 1.1
    assert moved > 0
    small = [count(Way('', '', 'AST_XS', 'fused', 'fp32', batch, (128, 128)))[0] for batch in (1, 2)]
    assert small[1] == 2 * small[0]
    trained = count(Way('', '', 'AST_XS', 'fused', 'fp32', 1, (128, 128), True))[0]
    assert trained == 3 * small[0]


@pytest.mark.parametrize('trains', [False, True])
def test_ways_compute_the_same(trains):
    outputs = []
    for backend in ('reference', 'fused'):
        compute = prepare(Way('', '', 'AST_XS', backend, 'fp32', 1, (40, 56), trains))
        outputs.append(compute())
        assert torch.equal(compute(), outputs[-1])
    assert outputs[0].shape == (1, 3, 40, 56)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_torch_compile_is_a_line_of_each_case_where_it_is_asked_for(monkeypatch):
    compiled = [way for way in ways('AST_XS', 128, ['forward', 'train', 'photograph'], True) if way.is_compiled]
    assert [way.case[:5] for way in compiled] == ['256² ', '128² ', '2×128', 'photo']
    monkeypatch.setattr(torch, 'compile', lambda network, dynamic: lambda x: network(x) + 1)
    outputs = [prepare(replace(compiled[0], size=(32, 40), is_compiled=is_compiled))() for is_compiled in (False, True)]
    torch.testing.assert_close(outputs[0] + 1, outputs[1])


def test_the_command_restores_as_the_network():
    way = Way('', '', 'AST_XS', 'fused', 'fp32', 1, (40, 56))
    plain, command = prepare(way)(), prepare(replace(way, is_command=True))()
    # Written with 8 bits, from a picture of 8 bits.
    assert (plain.clamp(0, 1) - command).abs().max() < 3 / 255
    assert command.unique().numel() > 50


def test_halves_of_blocks():
    lines = benchmark_ops.measure([16], 1, False, {'fp32': 1e9, 'bf16': 1e9}, lambda text: None)
    measured = [line for line in lines if 'skipped' not in line]
    assert len(measured) == 12
    assert all(line['error'] < (1e-5 if 'fp32' in line['case'] else 3e-2) for line in measured)
    assert all(line['of_floor'] > 0 for line in measured)


@pytest.mark.parametrize(
    ('module', 'words', 'message'),
    [
        (benchmark_network, ['--turns', '0'], '1 or more'),
        (benchmark_network, ['--net', 'AST_C'], 'AST_C: no network'),
        (benchmark_network, ['--net', 'MSRResNet'], 'MSRResNet: expected an AST'),
        (benchmark_ops, ['--turns', '0'], '1 or more'),
    ],
)
def test_wrong_arguments(module, words, message):
    with pytest.raises(OptionError, match=message):
        module.run(parsed(module, *words))


@pytest.mark.parametrize(
    'content',
    [
        '{',
        '[]',
        '{"results": []}',
        '{"results": [1], "machine": {}, "versions": {}}',
        '{"results": [], "machine": {}, "versions": {"torch": ""}}',
        '{"results": [], "machine": {"processor": "", "threads": 1, "load": 1}, "versions": {}}',
    ],
)
def test_files_that_are_no_records(content, tmp_path):
    (tmp_path / 'a.json').write_text(content)
    with pytest.raises(DataError, match=r'a\.json is no record'):
        benchmark_table.run(parsed(benchmark_table, str(tmp_path / 'a.json')))


@pytest.mark.parametrize(('name', 'message'), [('folder', 'is a folder'), ('file/out.json', 'cannot be written')])
def test_records_that_cannot_be_written_are_refused_first(name, message, tmp_path):
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'file').touch()
    words = [sys.executable, ROOT / 'tools' / 'benchmark.py', 'net', '--turns', '0', '--json', tmp_path / name]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr


def test_a_run_prints_a_table_and_writes_a_record(tmp_path, capsys):
    words = ['--net', 'AST_XS', '--turns', '1', '--cases', 'train', '--json', str(tmp_path / 'net.json')]
    assert benchmark_network.run(parsed(benchmark_network, *words)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    record = json.loads((tmp_path / 'net.json').read_text())
    assert [line['path'] for line in record['results']] == ['reference', 'fused', 'torch.compile']
    assert record['results'][1]['peak_bytes'] < record['results'][0]['peak_bytes']
    assert benchmark_table.run(parsed(benchmark_table, str(tmp_path / 'net.json'))) == 0
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines


def test_the_command_has_them():
    result = subprocess.run([sys.executable, ROOT / 'tools' / 'benchmark.py', '-h'], capture_output=True, text=True)
    assert 'net,ops,table' in result.stdout


@pytest.mark.parametrize('file', sorted((ROOT / 'benchmarks').glob('net*.json')), ids=lambda file: file.name)
def test_records_of_the_project_can_be_read(file, capsys):
    benchmark_table.run(parsed(benchmark_table, str(file)))
    assert '| 512² forward | fused |' in capsys.readouterr().out


def test_whether_targets_are_reached():
    lines = [
        {'case': '512² forward', 'path': 'reference', 'median': 8.0},
        {'case': '512² forward', 'path': 'fused', 'faster': 2.6, 'of_memory': 0.3},
        {'case': '512² forward', 'path': 'fused, bf16', 'faster': 4.9, 'of_memory': 0.3},
        {'case': '2×128² forward and backward', 'path': 'fused', 'faster': 2.0, 'of_memory': 0.7},
        {'case': '64² forward', 'path': 'fused', 'faster': 9.0},
    ]
    said = benchmark_targets.reached(lines)
    assert [': reached:' in line for line in said] == [True, False, False]
    # 16 s at 193 GFLOP/s are 8 s at twice the rate.
    text = benchmark_targets.official(lines, 386e9)
    assert len(text) == 1
    assert 'the reference takes 8.00 s, the official network 8.00 s' in text[0]
