"""Location of pairs in each layout, and errors for missing ones."""

from pathlib import Path

import pytest

from ast_plugin.data.layouts import LAYOUTS, Source, list_pairs
from ast_plugin.errors import DataError, OptionError
from tests.data.images import touch


def found(layout: str, root: Path, **options) -> dict[str, tuple[str, str]]:
    source = Source(**{'dataroot': str(root), **options})
    pairs = list_pairs(layout, source)
    return {
        pair.key: (Path(pair.lq).relative_to(root).as_posix(), Path(pair.gt).relative_to(root).as_posix())
        for pair in pairs
    }


def folders(root: Path, **options) -> dict[str, tuple[str, str]]:
    named = {'dataroot': None, 'dataroot_lq': str(root / 'lq'), 'dataroot_gt': str(root / 'gt')}
    return found('folders', root, **{**named, **options})


def test_folders_match_by_key_not_by_position(tmp_path):
    touch(tmp_path, 'lq/b.png', 'lq/a.jpg', 'lq/notes.txt', 'lq/.hidden.png', 'gt/a.png', 'gt/b.PNG')
    assert folders(tmp_path) == {'a': ('lq/a.jpg', 'gt/a.png'), 'b': ('lq/b.png', 'gt/b.PNG')}


@pytest.mark.parametrize('suffix', ['', '.png'])
def test_folders_templates_in_one_folder(tmp_path, suffix):
    touch(tmp_path, 'all/10_rain.png', 'all/9_rain.png', 'all/9_clean.png', 'all/10_clean.png', 'all/other.png')
    templates = {'lq_template': f'{{}}_rain{suffix}', 'gt_template': f'{{}}_clean{suffix}'}
    pairs = folders(tmp_path, dataroot_lq=str(tmp_path / 'all'), dataroot_gt=str(tmp_path / 'all'), **templates)
    assert pairs == {key: (f'all/{key}_rain.png', f'all/{key}_clean.png') for key in ('10', '9')}


def test_a_template_with_an_ending_is_clear(tmp_path):
    touch(tmp_path, 'lq/a.png', 'gt/a.png', 'gt/a.jpg')
    with pytest.raises(DataError, match=r'several partners: .*a\.png \(a\.png with a\.jpg or a\.png\).*gt_template'):
        folders(tmp_path)
    assert folders(tmp_path, gt_template='{}.jpg') == {'a': ('lq/a.png', 'gt/a.jpg')}


def test_equal_names_are_not_ambiguous(tmp_path):
    touch(tmp_path, 'lq/a.png', 'lq/a.jpg', 'gt/a.png', 'gt/a.jpg')
    assert folders(tmp_path) == {'a.jpg': ('lq/a.jpg', 'gt/a.jpg'), 'a.png': ('lq/a.png', 'gt/a.png')}


@pytest.mark.parametrize(
    ('files', 'options', 'expected'),
    [
        (['lq/a.png', 'lq/b.png', 'gt/a.png'], {}, ['1 x no partner: ', 'lq/b.png (no b.* in ']),
        (
            ['lq/a.png', 'gt/a.png', *(f'gt/{n}.png' for n in range(9))],
            {},
            ['9 x no partner: ', 'gt/0.png (no 0.* in', ' and 6 more'],
        ),
        (['lq/readme.txt', 'gt/a.png'], {}, ['no image in folder', 'lq']),
        (
            ['lq/a.png', 'gt/a.png'],
            {'lq_template': '{}_rain'},
            ['none of the 1 images', 'lq is named {}_rain.*', 'a.png'],
        ),
        (['lq/a.png', 'gt'], {}, ['folder of clean images was not found at', 'datasets.val.dataroot_gt']),
        (['gt/a.png'], {}, ['folder of degraded images was not found at', 'datasets.val.dataroot_lq']),
    ],
)
def test_faults_of_folders(tmp_path, files, options, expected):
    touch(tmp_path, *files)
    with pytest.raises(DataError, match=r'datasets\.val') as caught:
        folders(tmp_path, phase='val', **options)
    assert str(tmp_path) in str(caught.value)
    assert all(part in str(caught.value) for part in expected), str(caught.value)


@pytest.mark.parametrize('name', ['lq', 'link'])
def test_an_image_is_not_its_own_partner(tmp_path, name):
    touch(tmp_path, 'lq/a.png')
    (tmp_path / 'link').symlink_to('lq')
    with pytest.raises(DataError, match=r'the same file: .*a\.png'):
        folders(tmp_path, dataroot_gt=str(tmp_path / name))


@pytest.mark.parametrize(
    ('layout', 'options', 'expected'),
    [
        ('spadd', {'dataroot': 'x'}, 'did you mean spad'),
        ('spad', {}, 'requires dataroot'),
        ('folders', {'dataroot': 'x', 'dataroot_lq': 'x', 'dataroot_gt': 'y'}, 'does not use dataroot'),
        ('agan', {'dataroot': 'x', 'list_file': 'x.txt'}, 'does not use list_file'),
    ],
)
def test_options_that_mean_nothing_to_a_layout(layout, options, expected):
    with pytest.raises(OptionError, match=expected):
        list_pairs(layout, Source(**options))


@pytest.mark.parametrize('template', ['rain', '{}_{}', 'rain/{}.png'])
def test_templates_that_are_none(tmp_path, template):
    touch(tmp_path, 'lq/a.png', 'gt/a.png')
    with pytest.raises(OptionError, match='name template'):
        folders(tmp_path, lq_template=template)


DISTRIBUTED = [  # layout, options, files of one pair, and files that are not a pair
    ('agan', {}, 'train/data/12_rain.png', 'train/gt/12_clean.png', ['test_a/data/1_rain.png']),
    ('agan', {'phase': 'val'}, 'test_a/data/12_rain.png', 'test_a/gt/12_clean.jpg', ['train/data/1_rain.png']),
    ('agan', {'split': 'test_b'}, 'test_b/data/12_rain.png', 'test_b/gt/12_clean.png', []),
    ('densehaze', {}, 'input/50.png', 'gt/50.png', ['input/51.png', 'gt/51.png']),
    ('densehaze', {'phase': 'test'}, 'input/51.png', 'gt/51.png', ['input/50.png', 'gt/50.png']),
    ('densehaze', {}, 'hazy/07_hazy.png', 'GT/07_GT.png', []),
    ('densehaze', {}, '01_hazy.png', '01_GT.png', ['55_hazy.png', '55_GT.png']),
    ('densehaze', {}, 'input/01_hazy.png', 'gt/01_GT.png', []),
    ('densehaze', {'phase': 'val'}, 'test/input/1.png', 'test/gt/1.png', ['train/input/1.png', 'train/gt/1.png']),
    ('snow100k', {}, 'train/synthetic/a.jpg', 'train/gt/a.jpg', ['train/mask/a.jpg']),
    ('snow100k', {'split': '.'}, 'synthetic/a.jpg', 'gt/a.jpg', []),
    ('istd', {}, 'train/train_A/1-1.png', 'train/train_C/1-1.png', ['train/train_B/1-1.png']),
    ('istd', {'phase': 'val'}, 'test_A/1-1.png', 'test_C/1-1.png', []),
    ('srd', {}, 'train/shadow/a.jpg', 'train/shadow_free/a_no_shadow.jpg', []),
    ('srd', {'phase': 'test'}, 'test_A/a.jpg', 'test_C/a.jpg', []),
    ('moire', {}, 'trainData/source/1_source.png', 'trainData/target/1_target.png', []),
    ('moire', {'phase': 'val'}, 'test/1_source.png', 'test/1_target.png', []),
]


@pytest.mark.parametrize(('layout', 'options', 'lq', 'gt', 'others'), DISTRIBUTED)
def test_layouts_as_distributed(tmp_path, layout, options, lq, gt, others):
    touch(tmp_path, lq, gt, *others)
    assert list(found(layout, tmp_path, **options).values()) == [(lq, gt)]


@pytest.mark.parametrize(('layout', 'root_exists'), [('agan', False), ('agan', True), ('spad', False), ('spad', True)])
def test_absence_takes_three_lines(tmp_path, layout, root_exists):
    root = tmp_path / 'data set'
    if root_exists:
        root.mkdir()
    with pytest.raises(DataError) as caught:
        found(layout, root)
    first, second, third = str(caught.value).split('\n')
    assert first.startswith(f'{LAYOUTS[layout].title} was not found at {root}: ') and 'datasets.train.dataroot' in first
    assert ('no such folder' in first) != root_exists and ('real_world.txt' in first) == (layout == 'spad')
    assert LAYOUTS[layout].description in second and 'set datasets.train.dataroot' in second
    assert 'basicsr train -opt AST_quickstart' in third


def test_absence_names_the_half_that_is_missing(tmp_path):
    with pytest.raises(DataError, match=r'test_a/gt/ is missing \(datasets\.val'):
        found('agan', touch(tmp_path, 'test_a/data/1_rain.png'), phase='val')


@pytest.mark.parametrize(
    ('files', 'options', 'error', 'expected'),
    [
        (['input/a.png', 'gt/a.png'], {}, DataError, 'numbered'),
        (['input/1.png', 'gt/1.png'], {'phase': 'test'}, DataError, 'numbers 51 to 55'),
        (['input/1.png', 'gt/1.png'], {'split': 'test_a'}, OptionError, 'train, test; got'),
        (['input/1.png', 'gt/2.png'], {}, DataError, 'no partner'),
        (['input/a.txt', 'gt/1.png'], {}, DataError, 'no image in folder'),
        (['1_hazy.png', '2.png'], {}, DataError, r'2 images .* named \{\}_GT'),
        (['input/1.png'], {}, DataError, 'gt/ is missing'),
    ],
)
def test_dense_haze_faults(tmp_path, files, options, error, expected):
    with pytest.raises(error, match=expected):
        found('densehaze', touch(tmp_path, *files), **options)


def spad(root: Path, content: bytes, **options) -> dict[str, tuple[str, str]]:
    (root / 'real_world.txt').write_bytes(content)
    return found('spad', root, **options)


@pytest.mark.parametrize(
    'content',
    [
        b'/r/1.png /g/1.png\n/r/2.png /g/2.png\n',
        b'/r/1.png /g/1.png\n/r/2.png /g/2.png',
        b'\r\n/r/1.png /g/1.png\r\n\r\n  \r\n/r/2.png\t/g/2.png \r\n\r\n',
        b'\xef\xbb\xbfr//1.png   g/1.png\n/r/2.png g/2.png\n',
    ],
)
def test_spad_lists(tmp_path, content):
    touch(tmp_path, 'r/1.png', 'r/2.png', 'g/1.png', 'g/2.png')
    assert spad(tmp_path, content) == {f'r/{n}.png': (f'r/{n}.png', f'g/{n}.png') for n in (1, 2)}


@pytest.mark.parametrize('line', ['/my rain/a b.png /my gt/a b.png', '/my rain/a b.png\t/my gt/a b.png'])
def test_spad_names_with_spaces(tmp_path, line):
    touch(tmp_path, 'my rain/a b.png', 'my gt/a b.png')
    assert spad(tmp_path, line.encode()) == {'my rain/a b.png': ('my rain/a b.png', 'my gt/a b.png')}


def test_spad_names_with_endings_inside(tmp_path):
    touch(tmp_path, 'r/a.png b.png', 'g/a.png b.png')
    assert list(spad(tmp_path, b'r/a.png b.png g/a.png b.png').values()) == [('r/a.png b.png', 'g/a.png b.png')]


def test_spad_other_lists_and_names_beyond_ascii(tmp_path):
    touch(tmp_path, 'r/雨.png', 'g/雨.png', 'lists/x')
    (tmp_path / 'lists/mine.txt').write_text('/r/雨.png /g/雨.png', encoding='utf-8')
    assert list(found('spad', tmp_path, list_file='lists/mine.txt').values()) == [('r/雨.png', 'g/雨.png')]
    (tmp_path / 'real_test_1000.txt').write_text('/r/雨.png /g/雨.png', encoding='utf-8')
    assert len(found('spad', tmp_path, phase='test')) == 1


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('/r/1.png /g/1.png\n/r/1.png\n', 'line 2'),
        ('/r/1.png /g/1.txt\n', 'two image files'),
        ('/r/1.png /g/1.png /x/1.png\n', 'line 1'),
        ('\n\n', 'is empty'),
        ('/r/1.png /g/1.png\n/r/7.png /g/7.png', r'2 x missing: .*r/7\.png'),
        ('/r/1.png /g/1.png\n/r/1.png /r/1.png', 'several clean partners'),
    ],
)
def test_spad_faults(tmp_path, content, expected):
    touch(tmp_path, 'r/1.png', 'g/1.png')
    with pytest.raises(DataError, match=expected) as caught:
        spad(tmp_path, content.encode())
    assert str(tmp_path / 'real_world.txt') in str(caught.value) and 'datasets.train' in str(caught.value)
