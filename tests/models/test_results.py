from ast_plugin.models.results import ValidationResults

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
