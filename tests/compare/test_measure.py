"""Measurements against known values: MACs, peak memory and metrics."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin.archs.networks import load_network
from ast_plugin.checkpoints import save_torch
from ast_plugin.compare import measure
from tests import tiny_run

TINY = {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 1, 'upscale': 1}


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only Linux reports the peak resident set size')
def test_peak_memory():
    peak = measure.peak_memory(lambda: torch.ones(2**24).sum())  # 64 MiB, freed afterwards
    assert 60 * 2**20 < peak < 100 * 2**20


def test_few_runs_where_they_take_long(monkeypatch):
    monkeypatch.setattr(measure, '_MOST_SECONDS', 0.0)
    calls = []
    taken = measure._time_runs(lambda image: calls.append(1), torch.rand(1, 3, 8, 8), runs=10)
    assert len(taken) == 3 and len(calls) == 5


def test_speed():
    job = {'network': TINY, 'weights': None, 'param_key': None, 'size': [16, 24], 'runs': 4, 'device': 'cpu'}
    record = measure.measure_speed(job)
    network = load_network(TINY, None)
    assert record['parameters'] == sum(parameter.numel() for parameter in network.parameters())
    assert record['macs'] == 16 * 24 * (9 * (3 * 8 + 8 * 8 + 8 * 3) + 3)  # convolutions and the residual addition
    assert len(record['seconds']) == 4 and min(record['seconds']) > 0
    assert record['threads'] == torch.get_num_threads()


def quality_job(folder, network, **options):
    tiny_run.write(folder)
    dataset = {
        'name': 'val',
        'type': 'PairedImageDataset',
        'dataroot_lq': str(folder / 'data/lq'),
        'dataroot_gt': str(folder / 'data/gt'),
        'io_backend': {'type': 'disk'},
        'phase': 'val',
        'scale': 1,
    }
    return {
        'kind': 'quality',
        'network': network,
        'weights': None,
        'param_key': None,
        'dataset': dataset,
        'protocol': None,
        'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 0}},
        'device': 'cpu',
        'kept': 2,
        'folder': str(folder / 'pictures'),
        **options,
    }


def test_quality_of_the_input(tmp_path):
    record = measure.measure_quality(quality_job(tmp_path, None))
    assert list(record['values']) == ['0', '1', '2', '3']
    clean = np.asarray(Image.open(tmp_path / 'data/gt/2.png'), float)
    degraded = np.asarray(Image.open(tmp_path / 'data/lq/2.png'), float)
    expected = 20 * np.log10(255) - 10 * np.log10(((clean - degraded) ** 2).mean())
    assert record['values']['2']['psnr'] == pytest.approx(expected, abs=1e-6)
    assert record['kept'] == ['0', '1']
    kept = np.asarray(Image.open(tmp_path / 'pictures/restored/1.png'))
    assert (kept == np.asarray(Image.open(tmp_path / 'data/lq/1.png'))).all()
    kept = np.asarray(Image.open(tmp_path / 'pictures/clean/1.png'))
    assert (kept == np.asarray(Image.open(tmp_path / 'data/gt/1.png'))).all()


def test_a_network_with_its_weights(tmp_path):
    network = load_network(TINY, None)
    save_torch(tmp_path / 'w.pth', {'params': network.state_dict()})
    record = measure.measure_quality(quality_job(tmp_path, TINY, weights=str(tmp_path / 'w.pth')))
    lq = torch.from_numpy(np.asarray(Image.open(tmp_path / 'data/lq/0.png')).copy()).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        restored = (network(lq).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    clean = np.asarray(Image.open(tmp_path / 'data/gt/0.png'), float)
    expected = 20 * np.log10(255) - 10 * np.log10(((clean - restored) ** 2).mean())
    assert record['values']['0']['psnr'] == pytest.approx(expected, abs=1e-3)
    assert (np.asarray(Image.open(tmp_path / 'pictures/restored/0.png')) == restored.astype(np.uint8)).all()


def test_failure_is_one_line(tmp_path, monkeypatch, capsys):
    job = quality_job(tmp_path, TINY, weights=str(tmp_path / 'missing.pth'), record=str(tmp_path / 'record.json'))
    (tmp_path / 'job.json').write_text(json.dumps(job))
    monkeypatch.setattr(sys, 'argv', ['measure', str(tmp_path / 'job.json')])
    assert measure.main() == 2
    assert capsys.readouterr().err.startswith(f'basicsr: error: {tmp_path}/missing.pth does not exist')
    assert not (tmp_path / 'record.json').exists()
