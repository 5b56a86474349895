"""How datasets lie on disk: a row for each layout, and what to say when a dataset is not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ast_plugin.data.list_files import read_list
from ast_plugin.data.manifest import read_manifest
from ast_plugin.data.matching import Fault, Faults, Pair, match_folders, some
from ast_plugin.data.pair_table import PairTable
from ast_plugin.data.places import Place, choose_place, make_places
from ast_plugin.errors import DataError, OptionError, did_you_mean


@dataclass(frozen=True)
class Source:
    """Where the options say that pairs are; the keys of PairsDataset."""

    phase: str = 'train'
    dataroot: str | None = None
    dataroot_lq: str | None = None
    dataroot_gt: str | None = None
    lq_template: str | None = None
    gt_template: str | None = None
    split: str | None = None
    list_file: str | None = None
    manifest: str | None = None


@dataclass(frozen=True)
class Layout:
    """How a dataset lies on disk.

    Attributes:
        title: what the dataset is called.
        description: what is expected where below `dataroot`, in a line.
        find: lists the pairs.
        needs, may_have: names of the options in `Source` that the layout reads.
        train_splits, test_splits: what `split` may be in training and otherwise; the first if not given.
        aliases: by split, other names that its folder goes by. `.` stands for the root itself.
        places: folders to look in; the first that fits is taken.
        numbers: where a split is no folder, the numbers of its pairs.
    """

    title: str
    description: str
    find: Callable[[Layout, Source, Faults | None], Sequence[Pair]]
    needs: tuple[str, ...] = ('dataroot',)
    may_have: tuple[str, ...] = ('split',)
    train_splits: tuple[str, ...] = ('train',)
    test_splits: tuple[str, ...] = ('test',)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    places: tuple[Place, ...] = ()
    numbers: Mapping[str, range] = field(default_factory=dict)

    def split(self, source: Source) -> str:
        """Return the split that is asked for."""
        return source.split or (self.train_splits if source.phase == 'train' else self.test_splits)[0]

    def names(self, split: str) -> tuple[str, ...]:
        """Return what the folder of a split may be called."""
        return (split, *self.aliases.get(split, ()))


def list_pairs(layout: str | Layout, source: Source, faults: Faults | None = None) -> PairTable:
    """List the pairs of a dataset.

    Args:
        layout: name of a layout, or one of your own.
        source: where the dataset is.
        faults: where given, images without a partner and lines that cannot be used are noted there and left out.
    Raises:
        OptionError: if the layout is unknown, or an option is missing or means nothing to it.
        DataError: if the data is not there or not whole; the message names phase, folder and files.
    """
    if isinstance(layout, str):
        check_source(layout, source)
        layout = LAYOUTS[layout]
    pairs = layout.find(layout, source, faults)
    return pairs if isinstance(pairs, PairTable) else PairTable(pairs)


def check_source(layout: str, source: Source) -> None:
    """Raise OptionError if `source` lacks a key of the layout or has one that means nothing to it."""
    if layout not in LAYOUTS:
        raise OptionError(f'no layout {layout!r}{did_you_mean(layout, LAYOUTS)}; there are {", ".join(LAYOUTS)}')
    row = LAYOUTS[layout]
    given = {key for key, value in vars(source).items() if value is not None and key != 'phase'}
    missing = [key for key in row.needs if key not in given]
    useless = sorted(given - {*row.needs, *row.may_have})
    if missing or useless:
        what = [f'needs {" and ".join(missing)}'] if missing else []
        what += [f'does not use {", ".join(useless)}'] if useless else []
        raise OptionError(f'layout {layout} {", and ".join(what)}; it takes {", ".join(row.needs + row.may_have)}')


def _find_folders(layout: Layout, source: Source, faults: Faults | None) -> Sequence[Pair]:
    """Two folders named one by one."""
    for key, title in (('dataroot_lq', 'The folder of degraded images'), ('dataroot_gt', 'The folder of clean images')):
        folder = Path(getattr(source, key))
        if not folder.is_dir():
            raise _not_there(title, folder, 'there is no such folder', f'datasets.{source.phase}.{key}', layout)
    lq_template, gt_template = source.lq_template or '{}', source.gt_template or '{}'
    return match_folders(source.phase, source.dataroot_lq, source.dataroot_gt, lq_template, gt_template, faults=faults)


def find_places(layout: Layout, source: Source, faults: Faults | None = None) -> Sequence[Pair]:
    """The first of the layout's places that is there, its numbers kept to the split."""
    root, split = Path(source.dataroot), layout.split(source)
    found = choose_place(layout.places, root, layout.names(split))
    if not found:
        raise _root_lacks(layout, source, _missing_folder(layout, root, split))
    return match_place(layout, source, *found, faults)


def match_place(
    layout: Layout, source: Source, place: Place, name: str, faults: Faults | None = None
) -> Sequence[Pair]:
    """The pairs of a place that was found; `name` is what the split's folder is called."""
    folders = place.folders(Path(source.dataroot), name)
    pairs = match_folders(source.phase, *folders, place.lq_template, place.gt_template, deep=place.deep, faults=faults)
    if layout.numbers and not place.has_split:
        return _numbered(layout, source, pairs, faults)
    return pairs


def _missing_folder(layout: Layout, root: Path, split: str) -> str:
    """Name the folder whose partner is there, or else the first that was looked for."""
    missing = layout.places[0].folders(root, split)[0]
    for place in layout.places:
        lonely = [folder for folder in place.folders(root, split) if not folder.is_dir()]
        if len(lonely) == 1:
            missing = lonely[0]
            break
    return f'{missing.relative_to(root).as_posix()}/'


def _numbered(layout: Layout, source: Source, pairs: Sequence[Pair], faults: Faults | None) -> list[Pair]:
    """Keep the pairs whose numbers belong to the split."""
    split = layout.split(source)
    where = f'datasets.{source.phase}'
    if split not in layout.numbers:
        raise OptionError(f'{where}.split: {layout.title} has {", ".join(layout.numbers)}; got {split!r}')
    odd = [pair.lq for pair in pairs if not pair.key.isdecimal()]
    if odd and faults is None:
        raise DataError(f'{where}: pairs of {layout.title} are numbered, not so: {some(odd)}. Rename or move them')
    if faults is not None:
        faults += [
            Fault('no number', name, f'pairs of {layout.title} are numbered; rename it or move it') for name in odd
        ]
    wanted = layout.numbers[split]
    chosen = [pair for pair in pairs if pair.key.isdecimal() and int(pair.key) in wanted]
    if not chosen:
        raise DataError(
            f'{where}: {source.dataroot} has no pair of the split {split!r} of {layout.title}, '
            f'numbers {wanted[0]} to {wanted[-1]}; it has {some(pair.key for pair in pairs)}. Add them, or set split'
        )
    return chosen


SPAD_LISTS = {'train': 'real_world.txt', 'test': 'real_test_1000.txt'}


def _find_listed(layout: Layout, source: Source, faults: Faults | None) -> Sequence[Pair]:
    """The pairs of SPAD's list files, or of another list, or of the folders that it is passed on in without lists."""
    root, split = Path(source.dataroot), layout.split(source)
    name = source.list_file or SPAD_LISTS.get(split)
    if name and (root / name).is_file():
        return read_list(root / name, root, source.phase, faults)
    if not source.list_file and choose_place(layout.places, root, layout.names(split)):
        return find_places(layout, source, faults)
    if name:
        raise _root_lacks(layout, source, name)
    raise OptionError(
        f'datasets.{source.phase}.split: {layout.title} has {", ".join(SPAD_LISTS)}; got {split!r}. '
        f'For another list set list_file'
    )


def _find_in_manifest(layout: Layout, source: Source, faults: Faults | None) -> Sequence[Pair]:
    """The pairs of a manifest."""
    path = Path(source.manifest)
    if not path.is_file():
        raise _not_there('The manifest', path, 'there is no such file', f'datasets.{source.phase}.manifest', layout)
    return read_manifest(path).pairs()


def _root_lacks(layout: Layout, source: Source, what: str) -> DataError:
    """Return the error that `what` is missing below dataroot."""
    root = Path(source.dataroot)
    fault = f'{what} is missing' if root.is_dir() else f'there is no such folder, and so no {what}'
    return _not_there(layout.title, root, fault, f'datasets.{source.phase}.dataroot', layout)


def _not_there(title: str, folder: Path, fault: str, key: str, layout: Layout) -> DataError:
    """Return an error of three lines, each of which stands alone."""
    return DataError(
        f'{title} is not at {folder}: {fault} ({key}).\n'
        f'Put it there ({layout.description}), or set {key} to where it is.\n'
        f'To try without it: basicsr train -opt AST_quickstart'
    )


# Rain streaks come with the names of their authors' Matlab scripts (norain-1x2.png), of PReNet's copies (rain-001.png),
# or equal ones (DRSformer, Restormer).
_RAIN = make_places(
    (
        ('{split}/input', '{split}/target'),
        ('{split}/input', '{split}/gt'),
        ('{split}/input', '{split}/groundtruth'),
        ('{split}/rain/X2', '{split}/norain'),
        ('{split}/rain', '{split}/norain'),
        ('{split}/rainy', '{split}/norain'),
        ('{split}/rainy', '{split}'),
        ('{split}/rainy_image', '{split}/ground_truth'),
        ('{split}/data', '{split}/gt'),
        ('{split}', '{split}'),
    ),
    ('rain-{}', 'norain-{}'),
    ('norain-{}x2', 'norain-{}'),
    ('{}x2', '{}'),
    ('{}', '{}'),
)
_RAIN200_NAMES = {
    'train': ('rain_data_train_Light', 'rain_data_train_Heavy'),
    'test': ('rain_data_test_Light', 'rain_data_test_Heavy'),
}
_RAIN100_NAMES = {
    'train': (*_RAIN200_NAMES['train'], 'RainTrainL', 'RainTrainH'),
    'test': (*_RAIN200_NAMES['test'], 'Rain100L', 'Rain100H', '.'),
}


LAYOUTS = {
    'folders': Layout(
        'A pair of folders',
        'degraded images in dataroot_lq, clean ones of the same names, or as the templates say, in dataroot_gt',
        _find_folders,
        needs=('dataroot_lq', 'dataroot_gt'),
        may_have=('lq_template', 'gt_template'),
    ),
    'manifest': Layout(
        'A manifest',
        'a file that `basicsr data prepare` has written',
        _find_in_manifest,
        needs=('manifest',),
        may_have=(),
    ),
    'spad': Layout(
        'SPAD',
        'real_world.txt for training, real_test_1000.txt for testing, '
        'with lines "/dir/lq.png /dir_gt/gt.png", and the folders that they name; '
        'or train/ and test/, each with input/ and target/ of the same names',
        _find_listed,
        may_have=('split', 'list_file'),
        places=make_places((('{split}/input', '{split}/target'), ('{split}/data', '{split}/gt'))),
    ),
    'agan': Layout(
        'AGAN-Data',
        'train/, test_a/ and test_b/, each with data/12_rain.png and gt/12_clean.png',
        find_places,
        test_splits=('test_a', 'test_b'),
        places=make_places((('{split}/data', '{split}/gt'),), ('{}_rain', '{}_clean')),
    ),
    'densehaze': Layout(
        'Dense-Haze',
        'input/ and gt/ with 01.png to 55.png, or hazy/01_hazy.png and GT/01_GT.png, or all in one folder; '
        '1 to 50 are for training, 51 to 55 for testing',
        find_places,
        places=(
            *make_places((('{split}/input', '{split}/gt'), ('input', 'gt')), ('{}_hazy', '{}_GT'), ('{}', '{}')),
            *make_places((('{split}/hazy', '{split}/GT'), ('hazy', 'GT'), ('.', '.')), ('{}_hazy', '{}_GT')),
        ),
        numbers={'train': range(1, 51), 'test': range(51, 56)},
    ),
    'rain100': Layout(
        'Rain100L or Rain100H',
        'RainTrainL/ or RainTrainH/ with rain-1.png and norain-1.png; rainy/rain-001.png and norain-001.png, '
        'rain/X2/norain-1x2.png and norain/norain-1.png, or input/ and target/ of the same names',
        find_places,
        places=_RAIN,
        aliases=_RAIN100_NAMES,
    ),
    'rain200': Layout(
        'Rain200L or Rain200H',
        'train/ and test/, each with input/ and target/ of the same names, '
        'or rain/ with norain-1x2.png or rain-1.png and norain/ with norain-1.png',
        find_places,
        places=_RAIN,
        aliases=_RAIN200_NAMES,
    ),
    'reside': Layout(
        'RESIDE',
        'ITS/, OTS/, SOTS/indoor/ or SOTS/outdoor/, each with hazy/0001_0.8_0.2.jpg and clear/0001.png or gt/0001.png: '
        'many hazy ones to a clear one; split is ITS, OTS, indoor, outdoor, or train and test',
        find_places,
        train_splits=('train', 'ITS', 'OTS'),
        test_splits=('test', 'indoor', 'outdoor'),
        aliases={
            'OTS': ('OTS_BETA', 'OTS_ALPHA'),
            'indoor': ('SOTS/indoor', 'nyuhaze500'),
            'outdoor': ('SOTS/outdoor',),
        },
        places=make_places(
            tuple(
                (f'{{split}}/{hazy}', f'{{split}}/{clear}')
                for hazy in ('hazy', 'haze', 'ITS_haze')
                for clear in ('clear', 'gt', 'GT', 'ITS_clear')
            ),
            ('{}_*', '{}'),
            ('{}', '{}'),
            deep=True,
        ),
    ),
    'snow100k': Layout(
        'Snow100K',
        'train/ or all/, and test/ or Snow100K-S/, -M/ and -L/, each with synthetic/ and gt/ of the same names; '
        'split names other folders than train and test',
        find_places,
        test_splits=('test', 'Snow100K-S', 'Snow100K-M', 'Snow100K-L'),
        aliases={'train': ('all',)},
        places=make_places((('{split}/synthetic', '{split}/gt'),)),
    ),
    'istd': Layout(
        'ISTD',
        'train/train_A/ with shadows and train/train_C/ without, of the same names, and test/ likewise',
        find_places,
        places=make_places((('{split}/{split}_A', '{split}/{split}_C'), ('{split}_A', '{split}_C'))),
    ),
    'srd': Layout(
        'SRD',
        'train/shadow/1.jpg and train/shadow_free/1_no_shadow.jpg (in test/ 1_free.jpg), or train_A/ and train_C/',
        find_places,
        aliases={'train': ('Train', 'SRD_Train'), 'test': ('Test', 'SRD_Test', 'test_data')},
        places=make_places(
            (
                ('{split}/shadow', '{split}/shadow_free'),
                ('{split}/{split}_A', '{split}/{split}_C'),
                ('{split}_A', '{split}_C'),
            ),
            ('{}', '{}_no_shadow'),
            ('{}', '{}_free'),
            ('{}', '{}'),
        ),
    ),
    'moire': Layout(
        'TIP-2018',
        'trainData/source/1_source.png and trainData/target/1_target.png, and testData/ likewise; '
        'or train/ and test/, or both kinds in one folder',
        find_places,
        aliases={'train': ('Train',), 'test': ('Test',)},
        places=make_places(
            (
                ('{split}Data/source', '{split}Data/target'),
                ('{split}/source', '{split}/target'),
                ('{split}Data', '{split}Data'),
                ('{split}', '{split}'),
            ),
            ('{}_source', '{}_target'),
        ),
    ),
}
"""Every layout by the name that the option `layout` calls it."""
