"""Location of pairs in each layout, and errors for missing ones."""

from pathlib import Path

import pytest

from ast_plugin.data.layouts import LAYOUTS, Source, list_pairs
from ast_plugin.errors import DataError, OptionError
from tests.data.images import touch


def found(layout: str, root: Path, **options) -> dict[str, tuple[str, str]]:
    """List the pairs by key; folders are given relative to the root."""
    if layout == 'folders':
        options = {'dataroot_lq': 'lq', 'dataroot_gt': 'gt', **options}
        options |= {key: str(root / options[key]) for key in ('dataroot_lq', 'dataroot_gt')}
    else:
        options = {'dataroot': str(root), **options}
    pairs = list_pairs(layout, Source(**options))
    return {
        pair.key: (Path(pair.lq).relative_to(root).as_posix(), Path(pair.gt).relative_to(root).as_posix())
        for pair in pairs
    }


ONE_FOLDER = {'dataroot_lq': 'all', 'dataroot_gt': 'all'}
FOLDERS = [  # options, other files, and pairs by key
    ({}, ['lq/notes.txt', 'lq/.b.png'], {'a': ('lq/a.jpg', 'gt/a.png'), 'b': ('lq/b.png', 'gt/b.PNG')}),
    *(
        (
            {**ONE_FOLDER, 'lq_template': f'{{}}_rain{suffix}', 'gt_template': f'{{}}_clean{suffix}'},
            ['all/other.png'],
            {key: (f'all/{key}_rain.png', f'all/{key}_clean.png') for key in ('10', '9')},
        )
        for suffix in ('', '.png')
    ),
    ({'gt_template': '{}.jpg'}, ['gt/a.png'], {'a': ('lq/a.png', 'gt/a.jpg')}),
    ({}, [], {name: (f'lq/{name}', f'gt/{name}') for name in ('a.jpg', 'a.png')}),
]


@pytest.mark.parametrize(('options', 'others', 'pairs'), FOLDERS)
def test_folders_match_by_key(tmp_path, options, others, pairs):
    touch(tmp_path, *others, *(name for pair in pairs.values() for name in pair))
    assert found('folders', tmp_path, **options) == pairs


@pytest.mark.parametrize(
    ('files', 'options', 'expected'),
    [
        (['lq/a.png', 'lq/b.png', 'gt/a.png'], {}, r'1 x no partner: .*lq/b\.png \(no b\.\* in '),
        (
            ['lq/a.png', 'gt/a.png', *(f'gt/{n}.png' for n in range(9))],
            {},
            r'9 x no partner: .*gt/0\.png \(no 0\.\* in.* and 6 more',
        ),
        (
            ['lq/a.png', 'gt/a.png', 'gt/a.jpg'],
            {},
            r'several partners: .*a\.png \(a\.png with a\.jpg or a\.png\).*gt_template',
        ),
        (['lq/readme.txt', 'gt/a.png'], {}, 'no image in folder .*lq'),
        (
            ['lq/a.png', 'gt/a.png'],
            {'lq_template': '{}_rain'},
            r'none of the 1 images .*lq is named \{\}_rain\.\* .*a\.png',
        ),
        (['lq/a.png', 'gt'], {}, r'folder of clean images was not found at .*datasets\.val\.dataroot_gt'),
        (['gt/a.png'], {}, r'folder of degraded images was not found at .*datasets\.val\.dataroot_lq'),
        (['lq/a.png'], {'dataroot_gt': 'lq'}, r'the same file: .*a\.png'),
        (['lq/a.png'], {'dataroot_gt': 'link'}, r'the same file: .*a\.png'),
    ],
)
def test_faults_of_folders(tmp_path, files, options, expected):
    touch(tmp_path, *files)
    (tmp_path / 'link').symlink_to('lq')
    with pytest.raises(DataError, match=expected) as caught:
        found('folders', tmp_path, phase='val', **options)
    assert 'datasets.val' in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ('layout', 'options', 'expected'),
    [
        ('spadd', {}, 'did you mean spad'),
        ('spad', {'dataroot': None}, 'requires dataroot'),
        ('folders', {'dataroot': 'x'}, 'does not use dataroot'),
        ('agan', {'list_file': 'x.txt'}, 'does not use list_file'),
        ('densehaze', {'split': 'test_a'}, 'train, test; got'),
        *(('folders', {'lq_template': text}, 'name template') for text in ('rain', '{}_{}', 'rain/{}.png')),
    ],
)
def test_options_that_mean_nothing_to_a_layout(tmp_path, layout, options, expected):
    touch(tmp_path, 'lq/a.png', 'gt/a.png', 'input/1.png', 'gt/1.png')
    with pytest.raises(OptionError, match=expected):
        found(layout, tmp_path, **options)


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


@pytest.mark.parametrize(
    ('layout', 'phase', 'files', 'expected'),
    [
        ('agan', 'val', ['test_a/data/1_rain.png'], r'test_a/gt/ is missing \(datasets\.val'),
        ('densehaze', 'train', ['input/a.png', 'gt/a.png'], 'numbered'),
        ('densehaze', 'test', ['input/1.png', 'gt/1.png'], 'numbers 51 to 55'),
        ('densehaze', 'train', ['input/1.png', 'gt/2.png'], 'no partner'),
        ('densehaze', 'train', ['input/a.txt', 'gt/1.png'], 'no image in folder'),
        ('densehaze', 'train', ['1_hazy.png', '2.png'], r'2 images .* named \{\}_GT'),
        ('densehaze', 'train', ['input/1.png'], 'gt/ is missing'),
    ],
)
def test_faults_of_distributed_layouts(tmp_path, layout, phase, files, expected):
    with pytest.raises(DataError, match=expected):
        found(layout, touch(tmp_path, *files), phase=phase)


SPACES = ('my rain/a b.png', 'my gt/a b.png')
LISTS = [  # content, and pairs
    (b'/r/1.png /g/1.png\n/r/2.png /g/2.png\n', [('r/1.png', 'g/1.png'), ('r/2.png', 'g/2.png')]),
    (b'\r\n/r/1.png /g/1.png\r\n\r\n  \r\n/r/2.png\t/g/2.png ', [('r/1.png', 'g/1.png'), ('r/2.png', 'g/2.png')]),
    (b'\xef\xbb\xbfr//1.png   g/1.png', [('r/1.png', 'g/1.png')]),
    (b'/my rain/a b.png /my gt/a b.png', [SPACES]),
    (b'/my rain/a b.png\t/my gt/a b.png', [SPACES]),
    (b'r/a.png b.png g/a.png b.png', [('r/a.png b.png', 'g/a.png b.png')]),
    ('/r/雨.png /g/雨.png'.encode(), [('r/雨.png', 'g/雨.png')]),
]


@pytest.mark.parametrize(('content', 'pairs'), LISTS)
def test_spad_lists(tmp_path, content, pairs):
    touch(tmp_path, *(name for pair in pairs for name in pair), 'lists/x')
    options = {'real_world.txt': {}, 'real_test_1000.txt': {'phase': 'test'}, 'lists/x': {'list_file': 'lists/x'}}
    for name, more in options.items():
        (tmp_path / name).write_bytes(content)
        assert found('spad', tmp_path, **more) == {lq: (lq, gt) for lq, gt in pairs}


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
    (tmp_path / 'real_world.txt').write_text(content)
    with pytest.raises(DataError, match=expected) as caught:
        found('spad', tmp_path)
    assert str(tmp_path / 'real_world.txt') in str(caught.value) and 'datasets.train' in str(caught.value)
