"""Automatic selection of the task for an image, reports, warnings and uncertainty maps."""

import csv
import os

import cv2
import numpy as np
import pytest
import torch

from ast_plugin import weights
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.cli.main import main
from ast_plugin.data.image_files import ImageFile, write_image
from ast_plugin.evaluation.classifier import CLASSES, DegradationClassifier, classify
from ast_plugin.evaluation.file_restorer import Change, draw_spread
from ast_plugin.evaluation.restorer import Restorer

from .helpers import TINY, decided, identity, load_tool, release_decided, release_tiny


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Restore an image with a classifier that predicts the given class; return exit status, stdout and stderr."""
    folder = tmp_path / 'weights'
    folder.mkdir()
    release_tiny(monkeypatch, folder)
    pixels = np.random.default_rng(0).integers(60, 200, (40, 50, 3)).astype(np.uint8)
    write_image(tmp_path / 'a.jpg', ImageFile(pixels))

    def restore(*more, source='a.jpg', **scores):
        if scores:
            release_decided(**scores)
        status = main(['infer', '-i', str(tmp_path / source), '-o', str(tmp_path / 'out'), *map(str, more)])
        return status, *capsys.readouterr()

    return restore


def test_clean_image_stays(run, tmp_path):
    status, out, err = run('--report', tmp_path / 'r.csv', clean=9)
    assert status == 0 and 'a.jpg (clean 100%, ' in out
    assert 'restored 0 of 1 image in ' in out and ' s (unchanged: 1): ' in out
    assert err == f'note: {tmp_path / "a.jpg"}: no degradation detected (confidence 100%), left unchanged\n'
    assert (tmp_path / 'out' / 'a.jpg').read_bytes() == (tmp_path / 'a.jpg').read_bytes()
    assert run('--format', 'png')[0] == 0  # written anew in another format
    assert (tmp_path / 'out' / 'a.jpg').exists()
    (row,) = csv.DictReader((tmp_path / 'r.csv').open())
    assert (row['task'], row['status']) == ('clean', 'unchanged')
    assert float(row['confidence']) == 1 and float(row['mean_absolute_change']) == 0


def test_specialist_is_chosen(run, tmp_path):
    status, out, err = run('--report', tmp_path / 'r.csv', haze=0.5)
    assert status == 0 and 'a.jpg (haze 35%, ' in out
    assert err == f'warning: {tmp_path / "a.jpg"}: classified as haze with a confidence of only 35%\n'
    (row,) = csv.DictReader((tmp_path / 'r.csv').open())
    assert (row['task'], row['status']) == ('haze', 'restored') and row['warnings'].startswith('classified as haze')
    keys = 'file task confidence mean_absolute_change changed_share mean_color_shift warnings seconds status'
    assert set(row) == set(keys.split())


def test_degradation_without_weights_is_reported(run, tmp_path):
    sums = weights.FOLDER / 'SHA256SUMS'
    sums.write_text(''.join(line for line in sums.read_text().splitlines(True) if 'haze' not in line))
    (weights.FOLDER / 'haze.safetensors').unlink()
    status, _, err = run('--report', tmp_path / 'r.csv', haze=9)
    assert status == 0 and f'{tmp_path / "a.jpg"}: classified as haze (confidence 100%), left unchanged: this' in err
    assert (tmp_path / 'out' / 'a.jpg').read_bytes() == (tmp_path / 'a.jpg').read_bytes()
    (row,) = csv.DictReader((tmp_path / 'r.csv').open())
    assert (row['task'], row['status']) == ('haze', 'unchanged')
    assert run(rain=9)[0] == 0
    (weights.FOLDER / 'rain.safetensors').unlink()  # one that ought to be there
    status, _, err = run(clean=9)
    assert status == 2 and 'rain.safetensors not found' in err


def test_colour_change_is_reported(run, tmp_path):
    network = identity()
    network.output_proj.bias.data = torch.tensor([0.2, 0.0, 0.0])
    weights.release('rain', network.state_dict(), TINY, {})
    status, _, err = run('--task', 'rain', '--report', tmp_path / 'deep' / 'r.csv')
    assert status == 0 and err.startswith(f'warning: {tmp_path / "a.jpg"}: the mean colour changed by +51, ')
    (row,) = csv.DictReader((tmp_path / 'deep' / 'r.csv').open())
    assert float(row['changed_share']) == 1 and 16.9 < float(row['mean_absolute_change']) < 17.1
    network.output_proj.bias.data += 50
    weights.release('rain', network.state_dict(), TINY, {})
    assert '% of the values became black or white' in run('--task', 'rain')[2]


def test_rotated_rain_is_warned_of(run):
    warning = 'warning: --self-ensemble rotates rain, '
    assert warning in run('--self-ensemble', '--task', 'rain')[2]
    assert warning in run('--self-ensemble', clean=9)[2]
    assert warning not in run('--self-ensemble', '--task', 'haze')[2] + run('--task', 'rain')[2]


def test_report_lists_failures(run, tmp_path):
    name = os.fsdecode(b'mu\xf1oz.png')  # which is no text
    (tmp_path / name).write_bytes(b'\x89PNG\r\n\x1a\n')
    status, _, _ = run('--report', tmp_path / 'r.csv', source=name, clean=1)
    assert b'mu\xf1oz.png' in (tmp_path / 'r.csv').read_bytes()
    (row,) = csv.DictReader((tmp_path / 'r.csv').open(errors='surrogateescape'))
    assert status == 1 and row['status'] == 'unreadable' and 'oz.png' in row['warnings']


def test_change_of_gray_and_of_other_sizes():
    gray = np.full((4, 5), 1000, np.uint16)
    change = Change.between(gray, gray + np.uint16(257))
    assert change.mean == pytest.approx(1) and change.share == 0 and change.color == pytest.approx((1,))
    assert Change.between(gray, gray.repeat(2, 0)) is None and not list(change.warnings())


def test_uncertainty_map(run, tmp_path):
    assert run('--uncertainty', '--task', 'rain')[0] == 0
    drawn = cv2.imread(str(tmp_path / 'out' / 'a_uncertainty.png'))
    assert drawn.shape == (40 + 8 + 12 + 24, 260, 3)
    for name in ('x.png', 'x_uncertainty.png'):
        write_image(tmp_path / name, ImageFile(np.zeros((4, 4, 3), np.uint8)))
    status, _, err = run('--uncertainty', '--task', 'rain', '-i', tmp_path / 'x.png', tmp_path / 'x_uncertainty.png')
    assert status == 2 and 'would replace it' in err
    write_image(tmp_path / 'x.jpg', ImageFile(np.zeros((4, 4, 3), np.uint8)))
    both = '--uncertainty', '--task', 'rain', '-i', tmp_path / 'x.png', tmp_path / 'x.jpg'
    status, _, err = run(*both)
    assert status == 2 and 'x_uncertainty.png belongs to another image of that name (use --format png' in err
    assert run(*both, '--format', 'png')[0] == 0 and (tmp_path / 'out' / 'x_jpg_uncertainty.png').exists()
    for report in ('x.png', 'out/x.png'):  # the second is yet to be written
        status, _, err = run('--report', tmp_path / report, '-i', tmp_path / 'x.png')
        assert status == 2 and 'x.png is an image of this run, and --report would replace it' in err


def test_spread():
    image = np.random.default_rng(0).random((6, 9, 3), np.float32)
    assert Restorer(torch.nn.Identity(), device='cpu').spread(image).max() < 1e-6

    class Ramp(torch.nn.Module):
        def forward(self, x):
            return x * 0 + torch.linspace(0, 1, x.shape[-1])

    spread = Restorer(Ramp(), device='cpu').spread(np.zeros((5, 5), np.uint8))
    assert spread.shape == (5, 5) and spread[2, 2] == pytest.approx(0, abs=1e-6) and spread[0, 0] > 0.4
    assert draw_spread(np.zeros((3, 3), np.float32)).startswith(b'\x89PNG')


@pytest.mark.parametrize('shape', [(1, 1), (300, 900, 3), (1200, 700)])
@pytest.mark.parametrize('dtype', [np.uint16, np.float64])
def test_classify_takes_any_image(shape, dtype):
    shares = classify(np.ones(shape, dtype), decided(rain=2))
    assert list(shares) == list(CLASSES) and sum(shares.values()) == pytest.approx(1)
    assert max(shares, key=shares.get) == 'rain'


def test_no_classifier(run):
    state = DegradationClassifier().state_dict()
    assert 2 * sum(tensor.numel() for tensor in state.values()) < 280_000
    (weights.FOLDER / 'classifier.safetensors').unlink()
    status, _, err = run()
    assert status == 2 and 'does not include weights for classifier' in err


def test_samples_of_the_training(tmp_path):
    tool = load_tool('train_classifier')
    photo = np.random.default_rng(0).integers(0, 256, (330, 400, 3)).astype(np.uint8)
    for kind in range(len(CLASSES)):
        first, second = (tool.make_views(photo, kind, np.random.default_rng(1)) for _ in range(2))
        assert [view.shape for view in first] == [(tool.VIEW, tool.VIEW, 3)] * 2 and first[0].dtype == np.uint8
        np.testing.assert_array_equal(first, second)
    views = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3)).astype(np.uint8)
    init = weights.find_weights(weights.CLASSIFIER)
    network = tool.train(views, np.arange(40) % len(CLASSES), epochs=1, seed=0, rate=1e-9, init=init)
    assert not network.training
    bundled = read_checkpoint(init).state['head.bias']
    torch.testing.assert_close(network.head.bias.data, bundled.float(), atol=1e-4, rtol=0)
