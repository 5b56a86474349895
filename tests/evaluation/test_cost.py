"""MACs and peak memory of networks, and the memory available on a device."""

import pytest
import torch
from torch import nn

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin.archs.networks import load_network
from ast_plugin.evaluation import cost
from ast_plugin.evaluation.cost import _free_in_group, _free_in_machine, available_bytes, count_macs, peak_bytes


def test_peak_memory_counts_live_tensors():
    x = torch.zeros(1000)

    def function():
        a = x + 1  # 1 lives
        b = a * 2  # 2 live
        del a
        c = b.exp()  # 2 live
        return c.view(-1)[2:]

    with torch.inference_mode():
        assert peak_bytes(function, x.device) == 2 * 4000


def test_memory_reserved_by_graphs_is_not_free(monkeypatch):
    segments = [
        {'device': 0, 'segment_pool_id': (0, 0), 'total_size': 100, 'allocated_size': 40},
        {'device': 0, 'segment_pool_id': (0, 1), 'total_size': 1000, 'allocated_size': 0},
        {'device': 1, 'segment_pool_id': (0, 0), 'total_size': 1000, 'allocated_size': 0},
    ]
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (7, 10_000))
    monkeypatch.setattr(torch.cuda, 'memory_snapshot', lambda: segments)
    assert available_bytes(torch.device('cuda:0')) == 7 + 60


def test_memory_reported_by_the_system(tmp_path, monkeypatch):
    assert 0 < available_bytes(torch.device('cpu')) < 2**50
    information = tmp_path / 'meminfo'
    information.write_text('MemTotal:  99 kB\nMemFree:   10 kB\nMemAvailable:   42 kB\n')
    monkeypatch.setattr(cost, '_MEMORY_INFO', information)
    assert _free_in_machine() == 42 * 1024
    files = tuple(tmp_path / name for name in ('max', 'current', 'stat'))
    assert _free_in_group(files) is None
    for file, text in zip(files, ('1000\n', '700\n', 'anon 1\ninactive_file 50\n'), strict=True):
        file.write_text(text)
    assert _free_in_group(files) == 350
    files[0].write_text('max\n')
    assert _free_in_group(files) is None


def test_limit_of_the_address_space_counts(monkeypatch):
    resource = pytest.importorskip('resource')
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (2**50, 2**50))
    before = cost._free_in_process()
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (2**50 - before + 10**6, 2**50))
    assert 0 <= available_bytes(torch.device('cpu')) <= 10**6
    monkeypatch.setattr(resource, 'getrlimit', lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert cost._free_in_process() is None


def test_macs_of_a_convolution_and_a_product():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3, padding=1)

        def forward(self, image):
            maps = self.conv(image).flatten(2)
            return (maps @ maps.transpose(1, 2)).exp()

    macs, uncounted = count_macs(Net().eval(), torch.rand(1, 3, 8, 10))
    assert macs == 3 * 5 * 9 * 80 + 5 * 5 * 80
    assert uncounted == {'aten::exp': 1}


def test_macs_of_ast_are_those_of_its_plain_form():
    options = {'type': 'AST_XS', 'img_size': 128, 'embed_dim': 4, 'num_heads': [1] * 9}
    network = load_network(options, None)
    macs, uncounted = count_macs(network, torch.rand(1, 3, 128, 128))
    # input and output projections alone have about 2.7 million; uncounted operators are elementwise
    assert macs > 20e6
    assert not [name for name in uncounted if 'mkldnn' in name or 'conv' in name or 'linear' in name]
