"""Tests of the pyiqa metrics with a stub of the package, and with the package if it is installed."""

import importlib.util
import sys
import urllib.error
from types import ModuleType

import numpy as np
import pytest
import torch

import ast_plugin  # noqa: F401 (before BasicSR)
from ast_plugin.devices import find_device
from ast_plugin.errors import BackendUnavailable, OptionError, ShapeError
from ast_plugin.metrics import psnr_ssim, registered_metrics

IMAGE = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
LPIPS = {'type': 'pyiqa', 'metric': 'lpips'}
REFERENCE = np.random.default_rng(1).integers(0, 256, (16, 12, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _forget():
    registered_metrics._pyiqa_model.cache_clear()
    yield
    registered_metrics._pyiqa_model.cache_clear()


@pytest.fixture
def package(monkeypatch):
    """Replace pyiqa by a stub: full-reference, no-reference, not downloadable, and set metrics."""
    calls = []

    def create_metric(name, as_loss=False, device=None, scale=1.0):
        calls.append((name, scale))
        assert device == find_device()
        if name == 'musiq':
            raise urllib.error.URLError('Name or service not known')
        mode = configs[name]['metric_mode']

        def model(*images):
            assert len(images) == (2 if mode == 'FR' else 1)
            assert all(image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1 for image in images)
            if images[0].shape[-1] < 8:
                raise RuntimeError('Kernel size is larger\nthan the image')
            red = images[0][:, 0].mean() * scale
            return red if mode == 'NR' else (red - images[1][:, 0].mean() * scale).reshape(1)

        model.metric_mode = mode
        return model

    configs = {
        'lpips': {'metric_mode': 'FR', 'lower_better': True},
        'entropy': {'metric_mode': 'NR'},
        'musiq': {'metric_mode': 'NR'},
        'fid': {'metric_mode': 'NR', 'lower_better': True},
    }
    module = ModuleType('pyiqa')
    module.create_metric, module.list_models = create_metric, lambda: sorted(configs)
    settings = ModuleType('pyiqa.default_model_configs')
    settings.DEFAULT_CONFIGS = configs
    monkeypatch.setitem(sys.modules, 'pyiqa', module)
    monkeypatch.setitem(sys.modules, 'pyiqa.default_model_configs', settings)
    return calls


def measure(metric, img=IMAGE, img2=REFERENCE, **options):
    from basicsr.metrics import calculate_metric

    return calculate_metric({'img': img, 'img2': img2}, {'type': 'pyiqa', 'metric': metric, **options})


def test_images_come_as_rgb_in_the_unit_range(package):
    red, other = (image[..., 2].mean() / 255 for image in (IMAGE, REFERENCE))
    assert measure('entropy') == measure('entropy', img2=REFERENCE[:8]) == pytest.approx(red)
    assert measure('lpips') == pytest.approx(red - other)
    assert measure('lpips', psnr_ssim.to_toolbox(IMAGE[..., ::-1] / 255)) == pytest.approx(red - other)
    assert measure('entropy', crop_border=2) == pytest.approx(IMAGE[2:-2, 2:-2, 2].mean() / 255)


def test_model_is_made_once(package):
    for _ in range(3):
        measure('entropy')
        measure('entropy', scale=2.0, better='lower')
    assert package == [('entropy', 1.0), ('entropy', 2.0)]


def test_directions_and_devices(package):
    for options, direction in (
        (LPIPS, 'lower'),
        (LPIPS | {'better': 'higher'}, 'higher'),
        (LPIPS | {'metric': 'entropy'}, 'higher'),
        ({'type': 'calculate_niqe'}, 'lower'),
        ({'type': 'calculate_psnr'}, 'higher'),
    ):
        assert registered_metrics.better_direction(options) == direction
    metrics = {'a': LPIPS, 'b': {'type': 'calculate_psnr'}, 'c': LPIPS | {'device': 'cpu'}}
    placed = registered_metrics.complete(metrics, torch.device('cuda:1'))
    assert [options.get('device') for options in placed.values()] == ['cuda:1', None, 'cpu']


@pytest.mark.parametrize(
    ('metric', 'options', 'error', 'message'),
    [
        ('lpisp', {}, OptionError, 'pyiqa has no metric lpisp, did you mean lpips'),
        ('xyz', {}, OptionError, 'available: entropy, fid, lpips, musiq'),
        ('fid', {}, OptionError, 'fid measures sets of images'),
        ('entropy', {'colour': 3}, OptionError, 'entropy cannot be built with .*colour'),
        ('entropy', {'device': 'nonsense'}, OptionError, 'nonsense is not available; available devices: '),
        ('musiq', {}, BackendUnavailable, 'weights of musiq cannot be downloaded .*Name or service not known'),
        ('lpips', {'crop_border': 4}, ShapeError, 'lpips fails on 4x8 pixels: Kernel size is larger$'),
        ('lpips', {'img2': REFERENCE[:8]}, ShapeError, 'lpips: the image is'),
    ],
)
def test_what_cannot_be_measured(package, metric, options, error, message):
    with pytest.raises(error, match=message) as caught:
        measure(metric, **options)
    assert '\n' not in str(caught.value)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyiqa', None)
    for call in (lambda: measure('lpips'), lambda: registered_metrics.better_direction(LPIPS)):
        with pytest.raises(BackendUnavailable, match=r'pyiqa is not installed: pip install "ast_plugin\[metrics\]"'):
            call()


@pytest.mark.skipif(importlib.util.find_spec('pyiqa') is None, reason='the extra `metrics` is not installed')
def test_the_package_itself(monkeypatch):
    """Metrics without weights work; others report missing network access, which tests do not have."""
    from ast_plugin.metrics import psnr_rgb

    expected = psnr_rgb(IMAGE[..., ::-1], REFERENCE[..., ::-1])
    assert measure('psnr') == pytest.approx(expected, abs=1e-4)
    assert registered_metrics.better_direction(LPIPS) == 'lower'

    def unreachable(*_, **__):
        raise urllib.error.URLError('no network in tests')

    monkeypatch.setattr('urllib.request.urlopen', unreachable)
    monkeypatch.setenv('TORCH_HOME', '/nonexistent')
    with pytest.raises(BackendUnavailable, match='weights of niqe cannot be downloaded'):
        measure('niqe')
