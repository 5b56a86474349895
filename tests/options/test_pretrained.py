"""The recipes of the package's own weights: checked, and their data and network built."""

import cv2
import numpy as np
import pytest

from ast_plugin import options
from ast_plugin.models.preflight import load_registered
from ast_plugin.options import runs
from ast_plugin.options.validation import check

TASKS = ('rain', 'raindrop', 'haze')
LARGEST_FILE = 8_000_000  # bytes, in float16


@pytest.fixture(scope='module')
def registered():
    return load_registered()


@pytest.fixture(params=TASKS)
def recipe(request, registered, tmp_path, monkeypatch):
    """A task, and the options of each of its stages over one photograph."""
    cv2.imwrite(str(tmp_path / 'photo.png'), np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    monkeypatch.setenv('PHOTOS', str(tmp_path))
    monkeypatch.setenv('PHOTOS_VAL', str(tmp_path))
    path = options.find(f'pretrained/{request.param}')
    opt = options.load(path)
    check(opt, str(path), registered)
    prepared = [runs.prepare({**stage.opt, 'num_gpu': 0}, stage=stage.name) for stage in runs.expand(opt)]
    return request.param, prepared


def test_every_pretrained_file_is_a_task():
    files = {name for name in options.shipped_files() if name.startswith('pretrained/')}
    assert files == {f'pretrained/{task}' for task in TASKS}


def test_pretrained_data(recipe, registered):
    task, stages = recipe
    for run in stages:
        train = run['datasets']['train']
        sample = registered.get('dataset', train['type'])(train)[0, 0]
        assert sample['lq'].shape == (3, train['gt_size'], train['gt_size'])
        assert train['degradation']['type'] == run['datasets']['val']['degradation']['type'] == task
        assert train['clean_share'] > 0


def test_pretrained_network_size(recipe, registered):
    _, stages = recipe
    arguments = dict(stages[0]['network_g'])
    network = registered.get('arch', arguments.pop('type'))(**arguments)
    assert 2 * sum(array.numel() for array in network.state_dict().values()) < LARGEST_FILE
    assert all(run['network_g'] == stages[0]['network_g'] for run in stages)
