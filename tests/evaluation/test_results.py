import csv
import hashlib
import io
import math
import os

import numpy as np
import torch

import ast_plugin
from ast_plugin.data.contact_sheet import join_images, make_thumbnails
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.evaluation.results import ImageResult, Ranking, ValidationResults, describe_provenance

RESULTS = ValidationResults(
    'rain',
    restored={'cat': {'psnr': 30.0, 'ssim': 0.9}, 'china town': {'psnr': 32.0, 'ssim': 0.8}},
    degraded={'cat': {'psnr': 20.0, 'ssim': 0.5}, 'china town': {'psnr': 22.5, 'ssim': 0.6}},
)


def test_means():
    assert RESULTS.mean() == {'psnr': 31.0, 'ssim': 0.8500000000000001}
    assert RESULTS.mean_input()['psnr'] == 21.25
    assert ValidationResults('none').mean() == {}


def test_table():
    lines = RESULTS.to_markdown().splitlines()
    assert lines[0] == '| image      | input psnr |    psnr | input ssim |   ssim |'
    assert lines[1] == '| ---------- | ---------: | ------: | ---------: | -----: |'
    assert lines[-1] == '| mean       |    21.2500 | 31.0000 |     0.5500 | 0.8500 |'
    assert len({len(line) for line in lines}) == 1


def test_comma_separated_values():
    assert RESULTS.to_csv().splitlines()[2] == 'china town,22.5000,32.0000,0.6000,0.8000'
    alone = ValidationResults('rain', restored={'a,b': {'psnr': 1.0}})
    assert alone.to_csv() == 'image,psnr\n"a,b",1.0000\nmean,1.0000\n'


def test_names_that_are_not_text(tmp_path):
    made = {'weights': os.fsdecode(b'w\xff.pth')}
    odd = ValidationResults('rain', restored={os.fsdecode(b'a\xff\nb'): {'psnr': 1.0}}, provenance=made)
    odd.write(tmp_path)
    table = (tmp_path / 'rain.md').read_text()
    assert table.splitlines()[2] == r'| a\udcff\nb | 1.0000 |' and r'weights: w\udcff.pth' in table
    rows = list(csv.reader((tmp_path / 'rain.csv').read_text().splitlines()))
    assert [row[0] for row in rows] == ['image', r'a\udcff\nb', 'mean'] and r'w\udcff.pth' in rows[1]


def test_images_are_in_dataset_order():
    shown = (np.zeros((2, 2, 3), np.uint8),) * 3
    images = [
        ImageResult(0, 'cat', {'psnr': 1.0}, {'psnr': 0.5}, shown),
        ImageResult(2, 'cat', {'psnr': 3.0}),
        ImageResult(1, 'dog', {'psnr': 2.0}, {'psnr': 0.7}),
    ]
    results = ValidationResults.collect('rain', images)
    assert results.restored == {'cat': {'psnr': 1.0}, 'dog': {'psnr': 2.0}, 'cat_2': {'psnr': 3.0}}
    assert list(results.degraded) == ['cat', 'dog'] and list(results.thumbnails) == ['cat']
    assert results.rows()[3] == ['cat_2', '', '3.0000']
    assert results.mean_input() == {'psnr': 0.6}


def test_images_side_by_side():
    blue = np.zeros((30, 1024, 3), np.uint8)
    blue[..., 2] = 255
    strip = join_images(make_thumbnails([blue[:15, :512], np.full((30, 1024, 1), 7, np.uint8), blue]))
    assert strip.shape == (15, 3 * 512 + 2 * 8, 3)
    assert strip[3, 3].tolist() == [0, 0, 255]
    assert strip[3, 515].tolist() == [255, 255, 255]
    assert strip[3, 600].tolist() == [7, 7, 7]


def test_mean_excludes_infinite_values():
    results = ValidationResults(
        'rain',
        restored={'a': {'psnr': math.inf, 'ssim': 1.0}, 'b': {'psnr': 30.0, 'ssim': 0.8}},
        degraded={'a': {'psnr': 20.0, 'ssim': 0.5}, 'b': {'psnr': 22.0, 'ssim': 0.6}},
    )
    assert results.mean() == {'psnr': 30.0, 'ssim': 0.9}
    assert results.rows()[1] == ['a', '20.0000', 'inf', '0.5000', '1.0000']
    assert results.notes() == ['psnr: 1 of 2 are inf and excluded from the mean']
    assert results.to_markdown().endswith('|\n\n- psnr: 1 of 2 are inf and excluded from the mean')
    alone = ValidationResults('rain', restored={'a': {'psnr': math.inf}})
    assert alone.mean() == {'psnr': math.inf} and alone.notes() == []
    broken = ValidationResults('rain', restored={'a': {'psnr': math.nan}, 'b': {'psnr': 30.0}})
    assert broken.mean()['psnr'] == 30.0 and broken.notes() == ['psnr: 1 of 2 are nan and excluded from the mean']


def test_files_contain_provenance(tmp_path):
    weights = tmp_path / 'w.pth'
    weights.write_bytes(b'weights' * 1000)
    metrics = {'psnr': {'type': 'calculate_psnr', 'crop_border': 4, 'better': 'higher'}}
    results = ValidationResults('rain', restored={'a|b': {'psnr': 30.0}})
    results.provenance = describe_provenance(read_protocol('agan'), metrics, weights, torch.device('cpu'))
    (row, mean) = csv.DictReader(io.StringIO(results.to_csv()))
    assert (row['image'], row['psnr'], mean['image']) == ('a|b', '30.0000', 'mean')
    for line in (row, mean):
        assert line['protocol'] == 'agan: tiles of 384, overlap 80, mean; not rounded'
        assert line['metrics'] == 'psnr: calculate_psnr, crop_border 4'
        assert line['weights'] == str(weights)
        assert line['sha256'] == hashlib.sha256(b'weights' * 1000).hexdigest()
        assert f'ast_plugin {ast_plugin.__version__}, basicsr 1.4.2, torch {torch.__version__}' in line['versions']
        assert line['versions'].endswith('device cpu')
    text = results.to_markdown()
    assert '| a\\|b' in text and f'\n- sha256: {row["sha256"]}\n- versions: ' in text
    none = describe_provenance(read_protocol(None), {}, None, torch.device('cpu'))
    assert (none['weights'], none['sha256']) == ('', '')


def images(values, shown=True):
    picture = (np.zeros((2, 2, 3), np.uint8),) * 3
    return [ImageResult(n, f'image{n}', {'m': value}, {}, picture * shown) for n, value in enumerate(values)]


def test_the_worst_and_the_best():
    values = [5.0, 1.0, math.nan, 4.0, math.inf, 2.0, 3.0]
    results = ValidationResults.collect('rain', images(values), Ranking('m', count=2))
    assert results.examples() == ['image2', 'image1', 'image0', 'image4']
    assert results.ranks() == {f'image{n}': rank for rank, n in enumerate([4, 0, 3, 6, 5, 1, 2], 1)}
    lower = ValidationResults.collect('rain', images(values), Ranking('m', is_lower_better=True, count=2))
    assert lower.examples() == ['image2', 'image4', 'image5', 'image1']
    few = ValidationResults.collect('rain', images(values[:3]), Ranking('m', count=2))
    assert few.examples() == ['image2', 'image1', 'image0']
    assert ValidationResults.collect('rain', images(values)).examples() == []
    assert ValidationResults.collect('rain', images(values, shown=False), Ranking('m', count=2)).examples() == []
