"""`basicsr info`: output for a small network, and prediction of memory."""

import re
import sys

import pytest

from ast_plugin.cli import info
from ast_plugin.compare.measure import KINDS
from ast_plugin.errors import OptionError

NET = {'type': 'SRVGGNetCompact', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_conv': 1, 'upscale': 1}


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux reports the memory of a process')
def test_info_output(run_on_network, monkeypatch):
    run_child = info._run_child

    def run_fewer(kind, job):  # one run in a separate process
        return run_child(kind, job) if kind == 'speed' else KINDS[kind](job)

    monkeypatch.setattr(info, '_run_child', run_fewer)
    out, _ = run_on_network('info', NET, '--size', '40x300', '--run')
    # convolutions 3 -> 8, 8 -> 8 and 8 -> 3, and a slope per channel of two activations
    assert f'parameters  {(3 * 8 + 8 * 8 + 8 * 3) * 9 + 8 + 8 + 3 + 16:,d}, ' in out
    assert f'MACs        {40 * 300 * (3 * 8 + 8 * 8 + 8 * 3) * 9 / 1e9:.2f} G' in out
    assert 'no AST blocks' in out
    assert re.search(r'memory {6}about \d+ MiB', out)
    assert re.search(r'measured {4}\d+\.\d{3} s \(median of 3, \d+ threads', out)


def test_memory_lies_on_a_line(monkeypatch):
    measured = {(256, 256): 1000, (512, 512): 2500, (1024, 1024): 6500}
    monkeypatch.setattr(info, '_run_child', lambda kind, job: {'peak_bytes': measured[job['size']]})
    free = 2**20
    expected = {(256, 256): 1000, (200, 512): 1500, (480, 720): 3500}
    expected |= {(1024, 512): 2500 + 4000 // 3, (2000, 1024): 2500 + 4000 * 7 // 3}
    assert {size: info.predict_memory({}, size, 128, free) for size in expected} == expected
    # Half of the free memory is less than 8500, predicted for 1024x1024 from the smaller images.
    assert info.predict_memory({}, (1024, 512), 128, 16000) == 4500


def test_sizes():
    assert info.parse_size('480x720') == info.parse_size('480X720') == info.parse_size('480×720') == (480, 720)
    for text in ('', '480', '480x', '0x5', '-3x5', '4.5x3', 'axb', '480x720x3', '99999999x2', '٣x٣'):
        with pytest.raises(OptionError, match='--size'):
            info.parse_size(text)
