"""Drawings of a comparison: every mark has its name, names do not cover one another, and nothing breaks on little."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from ast_plugin.compare import report as plots
from ast_plugin.compare.results import Results, Row

NAMES = ('AST', 'SwinIR', 'EDSR', 'RCAN', 'MSRResNet')


def results(psnrs=(30.0, 29.9, 29.8, 29.7, 22.0), costs=(1e6, 1e6, 1e6, 2e6, 5e7)) -> Results:
    rows = [Row('input', values={'a': {'psnr': 22.0}, 'b': {'psnr': 23.0}})]
    for name, psnr, cost in zip(NAMES, psnrs, costs, strict=True):
        speed = {'macs': int(cost * 900), 'milliseconds': cost / 1e5, 'peak_bytes': 2**20, 'uncounted': {}}
        values = {'a': {'psnr': psnr - 1}, 'b': {'psnr': psnr + 1}}
        rows.append(Row(name, parameters=int(cost), speeds={(256, 256): speed}, values=values))
    return Results('test', rows)


def curves():
    iterations = np.arange(1, 301)
    return {
        name: {
            'l_pix': (iterations, 1 / iterations + 0.01 * number),
            'val/psnr': (np.array([100, 200, 300]), np.array([25.0, 27.0, 28.0 + 0.001 * number])),
        }
        for number, name in enumerate(NAMES)
    }


def test_all_drawings():
    drawn = plots.draw_all(results(), curves(), 'val/psnr')
    assert [plot.name for plot in drawn] == [
        'psnr_against_parameters',
        'psnr_against_macs',
        'psnr_against_latency',
        'psnr_against_memory',
        'training_loss',
        'training_validation',
    ]
    for plot in drawn:
        image = np.asarray(Image.open(io.BytesIO(plot.png)).convert('L'))
        assert image.shape[0] > 700 and 0.01 < (image < 128).mean() < 0.3
        assert plot.svg.count('<svg') == 1
        assert plots.INK in plot.svg and plots.GRID in plot.svg


@pytest.mark.parametrize('same', [False, True])
def test_names_do_not_cover_one_another(monkeypatch, same):
    boxes = []
    original = plots._name_marks

    def spy(axis, marks, note):
        original(axis, marks, note)
        texts = [text for text in axis.texts if text.get_text() in NAMES]
        boxes.extend((text.get_text(), text.get_window_extent()) for text in texts)

    monkeypatch.setattr(plots, '_name_marks', spy)
    found = results(psnrs=(30.0,) * 5, costs=(1e6,) * 5) if same else results()
    for row in found.rows:
        row.speeds = {}
    plots.draw_all(found, {}, None)
    assert sorted(name for name, _ in boxes) == sorted(NAMES)
    covered = [
        (a, b)
        for i, (a, x) in enumerate(boxes)
        for b, y in boxes[i + 1 :]
        if x.shrunk(0.9, 0.9).overlaps(y.shrunk(0.9, 0.9))
    ]
    assert not covered


def test_little_to_draw():
    assert plots.draw_all(Results('none', [Row('input')]), {}, None) == []
    only_input = Results('one', [Row('input', values={'a': {'psnr': 22.0}})])
    assert plots.draw_all(only_input, {}, None) == []
    one = results()
    one.rows = one.rows[:2]
    one.rows[1].speeds = {}
    assert [plot.name for plot in plots.draw_all(one, {}, None)] == ['psnr_against_parameters']
    one.rows[1].values['a']['psnr'] = float('inf')  # a perfect result
    assert plots.draw_all(one, {'AST': {'iter': (np.array([1]), np.array([1.0]))}}, 'val/psnr')


def test_a_drawing_is_the_same_each_time():
    found = results()
    found.rows = found.rows[:1]
    first, second = (plots.draw_all(found, curves(), 'val/psnr')[-1].svg for _ in range(2))
    assert first == second
    assert not re.search(r'20\d\d-\d\d-\d\d', first)
