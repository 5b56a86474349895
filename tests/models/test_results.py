import numpy as np

from ast_plugin.models.results import PictureResult, ValidationResults, side_by_side, thumbnails

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


def test_pictures_of_several_processes_come_into_the_datasets_order():
    shown = (np.zeros((2, 2, 3), np.uint8),) * 3
    pictures = [
        PictureResult(0, 'cat', {'psnr': 1.0}, {'psnr': 0.5}, shown),
        PictureResult(2, 'cat', {'psnr': 3.0}),
        PictureResult(1, 'dog', {'psnr': 2.0}, {'psnr': 0.7}),
    ]
    results = ValidationResults.collect('rain', pictures)
    assert results.restored == {'cat': {'psnr': 1.0}, 'dog': {'psnr': 2.0}, 'cat_2': {'psnr': 3.0}}
    assert list(results.degraded) == ['cat', 'dog'] and list(results.strips) == ['cat']
    assert results.rows()[3] == ['cat_2', '', '3.0000']
    assert results.mean_input() == {'psnr': 0.6}


def test_side_by_side():
    blue = np.zeros((30, 1024, 3), np.uint8)
    blue[..., 0] = 255
    strip = side_by_side(thumbnails([blue[:15, :512], np.full((30, 1024), 7, np.uint8), blue]))
    assert strip.shape == (15, 3 * 512 + 2 * 8, 3)
    assert strip[3, 3].tolist() == [0, 0, 255]  # RGB
    assert strip[3, 515].tolist() == [255, 255, 255]
    assert strip[3, 600].tolist() == [7, 7, 7]
