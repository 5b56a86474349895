"""The recipes of the package's own weights: checked, and their data and network built."""

import cv2
import numpy as np
import pytest

from ast_plugin import options, schema
from ast_plugin.cli import registries
from ast_plugin.options import stages

TASKS = ('rain', 'raindrop', 'haze')
LARGEST_FILE = 8_000_000  # bytes, in float16


@pytest.fixture(scope='module')
def registered():
    return registries.load()


@pytest.fixture(params=TASKS)
def recipe(request, registered, tmp_path, monkeypatch):
    """A task, and the options of each of its stages over one photograph."""
    cv2.imwrite(str(tmp_path / 'photo.png'), np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    monkeypatch.setenv('PHOTOS', str(tmp_path))
    monkeypatch.setenv('PHOTOS_VAL', str(tmp_path))
    path = options.find(f'pretrained/{request.param}')
    opt = options.load(path)
    schema.check(opt, str(path), registered)
    runs = [options.prepare({**stage.opt, 'num_gpu': 0}, stage=stage.name) for stage in stages.expand(opt)]
    return request.param, runs


def test_every_pretrained_file_is_a_task():
    files = {name for name in options.shipped_files() if name.startswith('pretrained/')}
    assert files == {f'pretrained/{task}' for task in TASKS}


def test_pretrained_data(recipe, registered):
    task, runs = recipe
    for run in runs:
        train = run['datasets']['train']
        sample = registered.get('dataset', train['type'])(train)[0, 0]
        assert sample['lq'].shape == (3, train['gt_size'], train['gt_size'])
        assert train['degradation']['type'] == run['datasets']['val']['degradation']['type'] == task
        assert train['clean_share'] > 0


def test_pretrained_network_size(recipe, registered):
    _, runs = recipe
    arguments = dict(runs[0]['network_g'])
    network = registered.get('arch', arguments.pop('type'))(**arguments)
    assert 2 * sum(array.numel() for array in network.state_dict().values()) < LARGEST_FILE
    assert all(run['network_g'] == runs[0]['network_g'] for run in runs)
