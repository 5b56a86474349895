"""The benchmark of reading: what it reads, and what its table and record say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def benchmark():
    spec = importlib.util.spec_from_file_location('benchmark', ROOT / 'tools' / 'benchmark.py')
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_it_reads_every_way_and_says_so(benchmark, tmp_path, capsys):
    file = tmp_path / 'record.json'
    few = ['--pairs', '3', '--size', '64', '--patch', '32', '--rounds', '2', '--workers', '0', '--json', str(file)]
    assert benchmark.main(['data', *few]) == 0
    rows = [line.split('|') for line in capsys.readouterr().out.splitlines() if line.startswith('|')]
    record = json.loads(file.read_text())
    lines = {line['reader']: line for line in record['results']['one_process']}
    assert [row[1].strip() for row in rows[2:]] == list(lines)
    assert lines['OpenCV alone, PNG files']['of_opencv'] == lines['BasicSR, its PNG LMDB']['of_basicsr'] == 1
    assert all(len(line['seconds']) == 2 and line['pairs_per_second'] > 0 for line in lines.values())
    assert lines['ours, raw LMDB']['of_basicsr'] > 1
    assert record['settings']['patch'] == 32 and record['results']['loader'] is None
    assert {'opencv-python', 'lmdb', 'numpy'} <= record['versions'].keys()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--pairs', '0'], 'must be 1 or more'),
        (['--patch', '300'], '--patch 300 must not exceed --size 256'),
        (['--size', '5000'], 'no packaged photograph is as large'),
    ],
)
def test_wrong_settings(benchmark, capsys, arguments, message):
    assert benchmark.main(['data', *arguments]) == 2
    assert message in capsys.readouterr().err
