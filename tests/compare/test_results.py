"""Tables of a comparison: the input first, what failed, what is missing, which way is better."""

import csv
import io

import pytest

from ast_plugin.compare import formats
from ast_plugin.compare.results import Results, Row, Speed

SPEED = {'macs': 7_190_000_000, 'seconds': [0.2, 0.1, 0.4], 'peak_bytes': 2**20 * 335, 'uncounted': {}, 'load': 0.5}


def results(**options) -> Results:
    images = ('one', 'two')

    def values(psnr, error):
        return {image: {'psnr': psnr + i, 'error': error} for i, image in enumerate(images)}

    rows = [
        Row('input', values=values(20.0, 0.5)),
        Row('A', 'AST', parameters=3_780_000, speeds={(256, 256): Speed.from_record(SPEED)}, values=values(29.0, 0.2)),
        Row('B', 'EDSR', parameters=900, values=values(28.0, 0.1), training={'iterations': 300, 'seconds': 61.5}),
        Row('C', 'RCAN', failed='training: the loss is nan'),
    ]
    return Results('test', rows, frozenset({'error'}), **options)


def test_speed_of_a_record():
    speed = Speed.from_record(SPEED)
    assert (speed.milliseconds, speed.fastest, speed.slowest) == (200, 100, 400)


def test_best_and_reference():
    found = results()
    assert found.metrics == ['psnr', 'error']
    assert found.best('psnr').name == 'A'
    assert found.best('error').name == 'B'  # of which little is good
    assert found.reference().name == 'A'
    assert results(baseline='B').reference().name == 'B'
    assert results(baseline='C').reference().name == 'A'  # it failed


def test_differences():
    found = results()
    _, a, b, c = found.rows
    assert found.difference(b, 'psnr').mean == found.difference(b, 'psnr').high == -1
    assert found.difference(a, 'psnr') is None
    assert found.difference(c, 'psnr') is None


def test_csv_has_all_numbers_in_full():
    rows = list(csv.DictReader(io.StringIO(results().to_csv())))
    assert [row['network'] for row in rows] == ['input', 'A', 'B', 'C']
    assert rows[1]['macs 256x256'] == '7190000000'
    assert rows[1]['ms 256x256'] == '200.0'
    assert float(rows[1]['psnr']) == 29.5
    assert float(rows[1]['psnr low']) == 29.0
    assert rows[2]['macs 256x256'] == ''
    assert float(rows[2]['psnr difference']) == -1
    assert (rows[2]['iterations'], rows[2]['training seconds']) == ('300', '61.5')
    assert rows[3]['failed'] == 'training: the loss is nan'
    assert rows[3]['psnr'] == ''


def test_csv_of_images():
    rows = list(csv.DictReader(io.StringIO(results().images_to_csv())))
    assert len(rows) == 6
    assert rows[3] == {'network': 'A', 'image': 'two', 'psnr': '30.0', 'error': '0.2'}


def test_markdown():
    lines = results().to_markdown().splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    assert cells[0] == [
        'network',
        'parameters',
        'MACs at 256²',
        'ms at 256²',
        'MB at 256²',
        'psnr',
        'error',
        'psnr against A',
    ]
    assert cells[2][:2] == ['input', '–']
    assert cells[3] == ['A', '3.78 M', '7.19 G', '200', '335', '29.50 [29.00, 30.00]', '0.2000 [0.2000, 0.2000]', '–']
    assert cells[4][-1] == '-1.00 [-1.00, -1.00]'
    assert set(cells[5][1:]) == {'–'}


def test_what_one_restores_perfectly_is_left_out_of_all_means():
    found = results()
    _, a, b, _ = found.rows
    a.values['two']['psnr'] = float('inf')
    assert found.perfect('psnr') == ['two'] and found.perfect('error') == []
    assert [found.estimate(row, 'psnr').mean for row in (a, b)] == [29, 28]
    assert found.difference(b, 'psnr').mean == -1
    assert found.estimate(a, 'error').mean == pytest.approx(0.2)
    b.values['one']['psnr'] = float('inf')
    assert found.estimate(a, 'psnr').mean == float('inf')
    assert 'inf' in found.to_markdown()


def test_nothing_measured():
    found = Results('none', [Row('input'), Row('A', failed='x')])
    assert found.metrics == [] and found.reference() is None
    assert 'A' in found.to_markdown() and 'A' in found.to_csv()


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        (formats.count(6_645_347), '6.65 M'),
        (formats.count(109.8e9), '110 G'),
        (formats.count(999), '999'),
        (formats.count(None), '–'),
        (formats.milliseconds(3.14159), '3.14'),
        (formats.milliseconds(1234.5), '1234'),
        (formats.duration(41.4), '41 s'),
        (formats.duration(200), '3.3 min'),
        (formats.duration(20_000), '5.6 h'),
        (formats.megabytes(3 * 2**30), '3,072'),
        (formats.axis_number(200_000), '200 k'),
        (formats.axis_number(0.05), '0.05'),
        (formats.metric_value('psnr', 29.456), '29.46'),
        (formats.metric_value('ssim', 0.98765), '0.9877'),
        (formats.metric_value('lpips', 0.12345), '0.1235'),
        (formats.metric_value('niqe', 4.321), '4.32'),
    ],
)
def test_numbers(text, expected):
    assert text == expected
