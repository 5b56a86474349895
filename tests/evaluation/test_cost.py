"""What a network costs and how much memory there is."""

import torch

from ast_plugin.evaluation import cost
from ast_plugin.evaluation.cost import _free_in_group, _free_in_machine, available_bytes, peak_bytes


def test_peak_memory_counts_live_tensors():
    def function(x):
        a = x + 1  # 1 lives
        b = a * 2  # 2 live
        del a
        c = b.exp()  # 2 live
        return c.view(-1)[2:]

    with torch.inference_mode():
        assert peak_bytes(function, torch.zeros(1000)) == 2 * 4000


def test_system_tells_its_memory(tmp_path, monkeypatch):
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
