"""Contact sheets: positions of images and text, checked by pixels."""

import math

import numpy as np
import pytest

from ast_plugin.data.contact_sheet import CAPTION, GAP, HEADING, Cell, draw_contact_sheet, save_sheet
from ast_plugin.errors import FileError, ShapeError
from ast_plugin.evaluation.results import ImageResult, Ranking, ValidationResults

COLOURS = {'input': (200, 0, 0), 'restored': (0, 200, 0), 'ground truth': (0, 0, 200)}


def flat(colour, height=20, width=40):
    return np.full((height, width, 3), colour, np.uint8)


def test_worst_and_best_lie_side_by_side(monkeypatch):
    thumbnails = tuple(flat(np.array(colour) // (place + 1)) for place, colour in enumerate(COLOURS.values()))
    images = [
        ImageResult(number, f'image{number}', {'psnr': value, 'ssim': 0.9}, {'psnr': 20.0, 'ssim': 0.5}, thumbnails)
        for number, value in enumerate([25.0, 30.0, 21.234, math.inf])
    ]
    written = []
    monkeypatch.setattr('ast_plugin.data.contact_sheet._write_text', lambda pen, text, *rest: written.append(text))
    sheet = ValidationResults.collect('rain', images, Ranking('psnr', count=1)).draw_examples()
    assert written == [
        *COLOURS,
        'image2: psnr 20.00, ssim 0.5000',
        'psnr 21.23, ssim 0.9000',
        'rank 4 of 4 by psnr',
        'image3: psnr 20.00, ssim 0.5000',
        'psnr inf, ssim 0.9000',
        'rank 1 of 4 by psnr',
    ]
    width, height = 480 + GAP, 240 + CAPTION + 2 * GAP
    assert sheet.size == (3 * width + GAP, HEADING + 2 * GAP + 2 * height)
    for row in range(2):
        for column, colour in enumerate(COLOURS.values()):
            place = GAP + column * width + 240, HEADING + 2 * GAP + row * height + 120
            assert sheet.getpixel(place) == tuple(value // (column + 1) for value in colour)


def test_nothing_measured_gives_no_sheet():
    assert ValidationResults('rain').draw_examples() is None
    assert ValidationResults('rain', restored={'a': {}}, ranking=Ranking('psnr', count=1)).draw_examples() is None


def test_rows_of_other_sizes_are_rejected():
    for row in ([Cell(flat(0)), Cell(flat(0, width=41))], [Cell(flat(0))]):
        with pytest.raises(ShapeError, match='expected 2 images of equal size in a row'):
            draw_contact_sheet(('a', 'b'), [row])


def test_sheet_that_cannot_be_written(tmp_path):
    with pytest.raises(FileError, match='cannot be written'):
        save_sheet(draw_contact_sheet(('a',), [[Cell(flat(0))]]), tmp_path)
