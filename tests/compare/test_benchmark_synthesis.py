"""The strength and the time of degradations."""

import json

import numpy as np
import pytest

from ast_plugin.compare import benchmark_synthesis
from ast_plugin.degradations.degradations import DEGRADATIONS
from tools import benchmark


def test_photographs_of_one_size():
    photos = benchmark_synthesis.scaled_photos()
    assert len(photos) > 1 and {photo.shape for photo in photos} == {(480, 720, 3)}
    assert all(photo.dtype == np.float32 and 0 <= photo.min() < photo.max() <= 1 for photo in photos)


def test_record_and_table(tmp_path, monkeypatch, capsys):
    photo = benchmark_synthesis.scaled_photos()[0]
    monkeypatch.setattr(benchmark_synthesis, 'scaled_photos', lambda: [photo])
    file = tmp_path / 'synthesis.json'
    assert benchmark.main(['synthesis', '--seeds', '2', '--json', str(file)]) == 0
    lines = json.loads(file.read_text())['results']
    assert [line['degradation'] for line in lines] == list(DEGRADATIONS)
    table = capsys.readouterr().out
    for line in lines:
        assert 10 <= line['psnr'][0] < line['psnr'][-1] <= 36 and sorted(line['psnr']) == line['psnr']
        assert line['milliseconds'] > 0 and f'| {line["degradation"]} | ' in table


@pytest.mark.parametrize('seeds', ['0', '-1'])
def test_no_seeds(seeds, capsys):
    assert benchmark.main(['synthesis', '--seeds', seeds]) == 2
    assert '--seeds must be 1 or more' in capsys.readouterr().err
