import pytest
import torch

import ast_plugin  # noqa: F401  registers everything
from ast_plugin.compare import benchmark_cuda, benchmark_network, benchmark_ops
from ast_plugin.compare.benchmark_backends import table
from ast_plugin.errors import OptionError
from tests.compare.test_benchmark_backends import parsed


def test_without_a_gpu_every_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert benchmark_network.run(parsed(benchmark_network, '--cases', 'gpu', '--turns', '1')) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if 'CUDA' in row]
    assert len(rows) == len(benchmark_cuda.CASES) * len(benchmark_cuda.PATHS)
    assert all('not run: torch finds no GPU here' in row for row in rows)


def test_halves_of_blocks_need_a_gpu_for_theirs(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(OptionError, match='--device cuda: torch finds no GPU here'):
        benchmark_ops.run(parsed(benchmark_ops, '--device', 'cuda'))


@pytest.mark.parametrize('trains', [False, True])
def test_lines_are_measured(monkeypatch, trains):
    """On the CPU, where `triton` has no device: its line says so, and the others have numbers."""
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setattr(benchmark_cuda, 'CASES', {'case': (1, 32, trains)})
    monkeypatch.setattr(
        benchmark_cuda,
        'PATHS',
        {'reference': ('reference', False), 'triton': ('triton', False), 'fused': ('fused', False)},
    )
    cpu = torch.device('cpu')
    speed = benchmark_cuda.rates(cpu, 64)
    assert min(speed.values()) > 0
    lines = benchmark_cuda.measure_case('AST_XS', 'case', 2, cpu, speed, lambda text: None)
    reference, triton, fused = lines
    assert "backend 'triton' cannot run" in triton['skipped'] and 'seconds' not in triton
    assert len(reference['seconds']) == len(fused['seconds']) == 2
    assert reference['error'] == 0 and 0 < fused['error'] < 3e-2
    assert fused['floor'] > 0 and fused['peak_bytes'] is None
    assert table(lines).count('\n') == 4
