"""Tables and confidence intervals of a comparison."""

import csv
import io

import numpy as np
import pytest

from ast_plugin.compare import results as formats
from ast_plugin.compare.results import Results, Row, estimate

SPEED = {'macs': 7_190_000_000, 'milliseconds': 200.0, 'peak_bytes': 2**20 * 335, 'uncounted': {}, 'load': 0.5}


def make_results(**options) -> Results:
    images = ('one', 'two')

    def values(psnr, error):
        return {image: {'psnr': psnr + i, 'error': error} for i, image in enumerate(images)}

    rows = [
        Row('input', values=values(20.0, 0.5)),
        Row('A', 'AST', parameters=3_780_000, speeds={(256, 256): SPEED}, values=values(29.0, 0.2)),
        Row('B', 'EDSR', parameters=900, values=values(28.0, 0.1), training={'iterations': 300, 'seconds': 61.5}),
        Row('C', 'RCAN', failed='training: the loss is nan'),
    ]
    return Results('test', rows, frozenset({'error'}), **options)


def test_best_and_reference():
    found = make_results()
    assert found.metrics == ['psnr', 'error']
    assert found.best('psnr').name == 'A'
    assert found.best('error').name == 'B'  # lower is better
    assert found.reference().name == 'A'
    assert make_results(baseline='B').reference().name == 'B'
    assert make_results(baseline='C').reference().name == 'A'  # it failed
    _, a, b, c = found.rows
    assert found.difference(b, 'psnr') == (-1, -1, -1)
    assert found.difference(a, 'psnr') is found.difference(c, 'psnr') is None


def test_failures_leave_no_common_image():
    found = make_results()
    found.rows[1].values['one']['psnr'] = float('nan')
    found.rows[2].values['two']['error'] = float('inf')
    assert found.incomparable() == []
    found.rows[2].values['two']['psnr'] = float('nan')
    assert found.incomparable() == ['psnr']


def test_csv_has_all_numbers_in_full():
    rows = list(csv.DictReader(io.StringIO(make_results().to_csv())))
    assert [row['network'] for row in rows] == ['input', 'A', 'B', 'C']
    assert (rows[1]['macs 256x256'], rows[1]['ms 256x256']) == ('7190000000', '200.0')
    assert (float(rows[1]['psnr']), float(rows[1]['psnr low'])) == (29.5, 29.0)
    assert rows[2]['macs 256x256'] == ''
    assert float(rows[2]['psnr difference']) == -1
    assert (rows[2]['iterations'], rows[2]['training seconds']) == ('300', '61.5')
    assert (rows[3]['failed'], rows[3]['psnr']) == ('training: the loss is nan', '')
    rows = list(csv.DictReader(io.StringIO(make_results().images_to_csv())))
    assert len(rows) == 6
    assert rows[3] == {'network': 'A', 'image': 'two', 'psnr': '30.0', 'error': '0.2'}


def test_markdown():
    lines = make_results().to_markdown().splitlines()
    assert len({len(line) for line in lines}) == 1  # aligned
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines]
    metrics = ['psnr', 'error', 'Δ psnr vs. A']
    assert cells[0] == ['network', 'parameters', 'MACs at 256²', 'ms at 256²', 'MB at 256²', *metrics]
    assert cells[2][:2] == ['input', '–']
    assert cells[3] == ['A', '3.78 M', '7.19 G', '200', '335', '29.50 [29.00, 30.00]', '0.2000 [0.2000, 0.2000]', '–']
    assert cells[4][-1] == '-1.00 [-1.00, -1.00]'
    assert set(cells[5][1:]) == {'–'}
    best = {column.title: column.best for column in make_results().columns()}
    assert (best['parameters'], best['psnr'], best['error']) == (900, 29.5, pytest.approx(0.1))
    assert best['ms at 256²'] is best['Δ psnr vs. A'] is None  # only one network; no best for differences


def test_perfect_images_are_left_out_of_all_means():
    found = make_results()
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


def test_numbers():
    assert [formats.format_count(value) for value in (6_645_347, 109.8e9, 999)] == ['6.65 M', '110 G', '999']
    assert [formats.format_milliseconds(value) for value in (3.14159, 1234.5)] == ['3.14', '1234']
    assert [formats.format_duration(value) for value in (41.4, 200, 20_000)] == ['41 s', '3.3 min', '5.6 h']
    assert [formats.format_tick(value) for value in (200_000, 0.05)] == ['200 k', '0.05']
    values = {'psnr': 29.456, 'ssim': 0.98765, 'lpips': 0.12345, 'niqe': 4.321}
    assert [formats.format_metric(*item) for item in values.items()] == ['29.46', '0.9877', '0.1235', '4.32']


# ---- intervals


def test_interval_of_two_values():
    """A resample has both values, or one of them twice: a quarter of the means lie at each end."""
    found = estimate([0.0, 1.0], confidence=0.95)
    assert (found.mean, found.low, found.high) == (0.5, 0.0, 1.0)
    narrow = estimate([0.0, 1.0], confidence=0.4)
    assert (narrow.low, narrow.high) == (0.5, 0.5)
    equal = estimate([3.5] * 7)
    assert (equal.mean, equal.low, equal.high) == (3.5, 3.5, 3.5)


def test_interval_coverage():
    draws = np.random.default_rng(2).normal(0, 1, (200, 60))
    found = [estimate(values, confidence=0.8, resamples=400) for values in draws]
    assert 0.72 < sum(each.low <= 0 <= each.high for each in found) / 200 < 0.86
    assert found[0] == estimate(draws[0], confidence=0.8, resamples=400)


def test_no_interval_without_two_finite_values():
    for values in ([5.0], [float('inf'), 30.0]):
        assert estimate(values) == (np.mean(values), None, None)


def test_difference_is_paired():
    """A constant gain has a zero-width interval, however much the images differ."""
    worse, better = (
        Row(n, values={str(v): {'psnr': v + gain} for v in (10, 20, 30)}) for n, gain in (('A', 0), ('B', 0.5))
    )
    found = Results('test', [worse, better])
    difference, mean = found.difference(better, 'psnr', worse), found.estimate(worse, 'psnr')
    assert (difference.mean, difference.low, difference.high) == (0.5, 0.5, 0.5)
    assert mean.high - mean.low > 10


def test_many_images_are_resampled_in_parts():
    found = estimate(np.arange(50_000, dtype=float), resamples=200)
    assert found.low < 24_999.5 < found.high
    assert found.high - found.low < 600
