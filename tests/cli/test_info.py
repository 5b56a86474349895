"""`basicsr info`: output for a small network, and errors for wrong sizes, files and weights."""

import re
import sys
from functools import partial

import pytest

from ast_plugin.cli import info as module
from ast_plugin.cli.info import parse_size, predict_memory
from ast_plugin.compare.measure import KINDS
from ast_plugin.errors import OptionError

NET = {'type': 'SRVGGNetCompact', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_conv': 1, 'upscale': 1}


@pytest.fixture
def info(run_on_network):
    return partial(run_on_network, 'info')


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux reports the memory of a process')
def test_info_output(info, monkeypatch):
    run_child = module._run_child

    def run_fewer(kind, job):  # one run in a separate process
        return run_child(kind, job) if kind == 'speed' else KINDS[kind](job)

    monkeypatch.setattr(module, '_run_child', run_fewer)
    status, out, _ = info(NET, '--size', '40x300', '--run')
    assert status == 0
    # convolutions 3 -> 8, 8 -> 8 and 8 -> 3, and a slope per channel of two activations
    assert f'parameters  {(3 * 8 + 8 * 8 + 8 * 3) * 9 + 8 + 8 + 3 + 16:,d}, ' in out
    assert f'MACs        {40 * 300 * (3 * 8 + 8 * 8 + 8 * 3) * 9 / 1e9:.2f} G' in out
    assert 'no AST blocks' in out
    assert re.search(r'memory {6}about \d+ MiB', out)
    assert re.search(r'measured {4}\d+\.\d{3} s \(median of 3, \d+ threads', out)


def test_memory_lies_on_a_line(monkeypatch):
    measured = {(256, 256): 1000, (512, 512): 2500, (1024, 1024): 6500}
    monkeypatch.setattr(module, '_run_child', lambda kind, job: {'peak_bytes': measured[job['size']]})
    free = 2**20
    assert [predict_memory({}, size, 128, free) for size in ((256, 256), (200, 512), (480, 720))] == [1000, 1500, 3500]
    larger = (1024, 512), (2000, 1024)
    assert [predict_memory({}, size, 128, free) for size in larger] == [2500 + 4000 // 3, 2500 + 4000 * 7 // 3]
    free = 16000  # half of it is less than 8500, predicted for 1024x1024 from the smaller images
    assert predict_memory({}, larger[0], 128, free) == 4500


def test_sizes():
    assert parse_size('480x720') == parse_size('480X720') == parse_size('480×720') == (480, 720)
    for text in ('', '480', '480x', '0x5', '-3x5', '4.5x3', 'axb', '480x720x3', '99999999x2', '٣x٣'):
        with pytest.raises(OptionError, match='--size'):
            parse_size(text)


@pytest.mark.parametrize(
    ('network', 'arguments', 'says'),
    [
        (None, [], 'network_g'),
        ({**NET, 'num_feat': 0}, [], 'network_g'),
        (NET, ['--weights', 'none.pth'], 'none.pth'),
        (NET, ['--size', 'large'], '--size'),
    ],
)
def test_wrong_files(info, network, arguments, says):
    status, _, err = info(network, *arguments)
    assert status == 2 and says in err and 'Traceback' not in err
