"""Directory layouts of datasets, one entry of `LAYOUTS` each, and the errors that report missing data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ast_plugin.data.manifest import read_manifest
from ast_plugin.data.matching import (
    DataFault,
    Pair,
    PairTable,
    Template,
    is_image,
    list_images,
    match_folders,
    raise_faults,
    shorten_list,
)
from ast_plugin.errors import DataError, OptionError, did_you_mean

SPAD_LISTS = {'train': 'real_world.txt', 'test': 'real_test_1000.txt'}
# Common names of the two folders of a dataset, each as "degraded clean".
_PLAIN = 'lq gt, LQ GT, input target, input gt, input groundtruth, degraded clean, noisy clean, rainy clean, '
_PLAIN += 'rain norain, rain clean, hazy clear, hazy gt, hazy GT, data gt, low high, blur sharp, source target'

MatchResult = tuple[Sequence[Pair], list[DataFault]]
"""Pairs of a dataset, and the faults of files that belong to no pair."""


@dataclass(frozen=True)
class Source:
    """Location of a dataset; the keys of PairsDataset."""

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
class Place:
    """Two folders below a root, with `{split}` for the split, and templates of their file names, see `Template`."""

    lq_dir: str
    gt_dir: str
    lq_template: str = '{}'
    gt_template: str = '{}'
    deep: bool = False  # whether images may also be one folder level deeper

    @property
    def has_split(self) -> bool:
        """Whether each split has its own folders."""
        return '{split}' in self.lq_dir

    def folders(self, root: Path, split: str) -> tuple[Path, Path]:
        """Return the folders of `split` below `root`."""
        return root / self.lq_dir.replace('{split}', split), root / self.gt_dir.replace('{split}', split)

    def rank(self, root: Path, split: str) -> int:
        """Return 0 if a folder is missing, 2 if an image has its partner, 1 otherwise.

        Where both are the same folder, it must also contain a degraded image, otherwise any folder would match.
        """
        lq_dir, gt_dir = self.folders(root, split)
        if not (os.path.isdir(lq_dir) and os.path.isdir(gt_dir)):
            return 0
        lq_keys = _find_keys(lq_dir, self.lq_template, self.deep)
        if lq_dir == gt_dir and (not lq_keys or self.lq_template == self.gt_template):
            return int(bool(lq_keys))  # with equal templates, each image would be its own partner
        return 2 if lq_keys and not lq_keys.isdisjoint(_find_keys(gt_dir, self.gt_template, self.deep)) else 1


def list_pairs(layout: str, source: Source) -> PairTable:
    """List the pairs of a dataset in a layout of `LAYOUTS`.

    Raises:
        OptionError: if the layout is unknown, or an option is missing or not used by it.
        DataError: if data is missing or incomplete; the message names phase, folder and files.
    """
    check_source(layout, source)
    pairs, faults = LAYOUTS[layout].find(LAYOUTS[layout], source)
    raise_faults(source.phase, faults)
    return pairs if isinstance(pairs, PairTable) else PairTable(pairs)


def check_source(layout: str, source: Source) -> None:
    """Raise OptionError if `source` lacks a key of the layout or has one that the layout does not use."""
    if layout not in LAYOUTS:
        raise OptionError(f'unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)} (available: {", ".join(LAYOUTS)})')
    row = LAYOUTS[layout]
    given = {key for key, value in vars(source).items() if value is not None and key != 'phase'}
    missing = [key for key in row.needs if key not in given]
    useless = sorted(given - {*row.needs, *row.may_have})
    if missing or useless:
        what = [f'requires {" and ".join(missing)}'] if missing else []
        what += [f'does not use {", ".join(useless)}'] if useless else []
        raise OptionError(f'layout {layout} {", and ".join(what)}; valid keys: {", ".join(row.needs + row.may_have)}')


def preparable() -> list[str]:
    """Return the names of the layouts that `basicsr data prepare` accepts."""
    return [name for name in LAYOUTS if name != 'manifest']


def plain_layout(
    lq: str | None = None, gt: str | None = None, lq_template: str | None = None, gt_template: str | None = None
) -> Layout:
    """Return the layout of two folders below a root; common folder names are tried where none are given.

    Args:
        lq, gt: the folders, both or none of them containing `{split}` for the split.
        lq_template, gt_template: templates of the file names in them.
    Raises:
        OptionError: if only one folder is given, or only one contains `{split}`.
    """
    if (lq is None) != (gt is None) or ('{split}' in (lq or '')) != ('{split}' in (gt or '')):
        raise OptionError('--lq and --gt go together, and either both or none contain {split}')
    names = ((lq, gt),) if lq and gt else _below_split(*_PLAIN.split(', '))
    description = 'input/ and target/, lq/ and gt/ or similar, in train/ and test/ or directly; or set --lq and --gt'
    if lq:
        description = f'{lq}/ and {gt}/, with equal file names or those set by --lq-template and --gt-template'
    return Layout(
        'A dataset of plain folders',
        description,
        _make_places(names, (lq_template or '{}', gt_template or '{}')),
        test_splits=('test', 'val'),
        aliases={'train': ('Train', 'training', '.'), 'test': ('Test', 'testing'), 'val': ('valid', 'validation')},
        has_scenes=True,
    )


def _below_split(*pairs: str) -> tuple[tuple[str, str], ...]:
    """Return pairs of folders below the split's folder: `input target` gives `{split}/input`, `{split}/target`."""
    return tuple(tuple(f'{{split}}/{name}'.removesuffix('/.') for name in pair.split()) for pair in pairs)


def _make_places(
    names: Sequence[tuple[str, str]], *templates: tuple[str, str], deep: bool = False
) -> tuple[Place, ...]:
    """Return the combinations of folder pairs and template pairs; the default template pair means equal names."""
    return tuple(Place(*folders, *template, deep) for folders in names for template in templates or (('{}', '{}'),))


def _choose_place(places: Sequence[Place], root: Path, splits: Sequence[str]) -> tuple[Place, str] | None:
    """Return the first place and split name with a pair below `root`; if none has one, the last that exists."""
    present = None
    for split in splits:
        for place in places:
            rank = place.rank(root, split)
            if rank == 2:
                return place, split
            present = (place, split) if rank else present
    return present


def _find_places(layout: Layout, source: Source) -> MatchResult:
    root, split = Path(source.dataroot), layout.split(source)
    chosen = _choose_place(layout.places, root, layout.names(split))
    if not chosen:
        raise _root_lacks(layout, source, _name_missing_folder(layout, root, split))
    return match_place(layout, source, *chosen)


def match_place(layout: Layout, source: Source, place: Place, name: str) -> MatchResult:
    """List the pairs of a place, restricted to the numbers of the split; `name` is the folder name of the split."""
    folders = place.folders(Path(source.dataroot), name)
    pairs, faults = match_folders(source.phase, *folders, place.lq_template, place.gt_template, place.deep)
    return _keep_numbers(layout, source, pairs, faults) if layout.numbers and not place.has_split else (pairs, faults)


def read_list(list_path: Path, root: Path, phase: str) -> MatchResult:
    """Read a list of pairs in order, tolerating blank lines, a byte order mark and any line ending.

    Names are compared by 8-byte hashes; a list of a million names has a collision with probability 1e-7.

    Args:
        list_path: the list, with lines `/dir/lq.png /dir_gt/gt.png`; a tab separates names with spaces unambiguously.
        root: folder that the names are relative to, despite their leading slash.
        phase: phase of the dataset, for messages.
    Returns:
        The pairs, and a fault for each line that is not two images, each missing file, and each degraded image with
        several partners.
    Raises:
        DataError: if the list or a folder in it cannot be read, or the list is empty.
    """
    faults: list[DataFault] = []
    pairs = PairTable(_read_lines(list_path, root, faults), f'{root}/')
    if not pairs and not faults:
        raise DataError(f'datasets.{phase}: {list_path} is empty; each line names a pair: /dir/lq.png /dir_gt/gt.png')
    # Checking SPAD's million names one by one, instead of against folder listings, takes minutes.
    folders = {os.path.dirname(path) for pair in pairs for path in (pair.lq, pair.gt)}
    present = set()
    for folder in folders:
        try:
            present.update(hash(f'{folder}/{name}') for name in os.listdir(folder))
        except (FileNotFoundError, NotADirectoryError):
            pass  # reported for each of its images
        except OSError as error:
            raise DataError(f'{folder}: this folder, named in the list, cannot be read: {error.strerror}') from error
    partners: dict[int, int] = {}
    bad: dict[str, DataFault] = {}
    for pair in pairs:
        for path in (pair.lq, pair.gt):
            if hash(path) not in present:
                bad[path] = DataFault('missing', path, f'named in {list_path}')
        if partners.setdefault(hash(pair.lq), hash(pair.gt)) != hash(pair.gt):
            text = f'{list_path} lists several clean partners for it'
            bad.setdefault(pair.lq, DataFault('several partners', pair.lq, text))
    if bad:
        faults += sorted(bad.values(), key=lambda fault: fault.kind)
        pairs = PairTable((pair for pair in pairs if pair.lq not in bad and pair.gt not in bad), f'{root}/')
    return pairs, faults


def _find_keys(folder: Path, template: str, deep: bool) -> set[str]:
    try:
        return set(Template(template).keys(list_images(folder, '', deep)))
    except DataError:
        return set()


def _find_folders(layout: Layout, source: Source) -> MatchResult:
    for kind, key in (('degraded', 'dataroot_lq'), ('clean', 'dataroot_gt')):
        if not os.path.isdir(folder := getattr(source, key)):
            title, where = f'The folder of {kind} images', f'datasets.{source.phase}.{key}'
            raise _not_there(title, folder, 'no such folder', where, layout)
    templates = source.lq_template or '{}', source.gt_template or '{}'
    return match_folders(source.phase, source.dataroot_lq, source.dataroot_gt, *templates)


def _find_listed(layout: Layout, source: Source) -> MatchResult:
    """List the pairs of SPAD's list files, of another list, or of copies in folders without lists."""
    root, split = Path(source.dataroot), layout.split(source)
    name = source.list_file or SPAD_LISTS.get(split)
    if name and (root / name).is_file():
        return read_list(root / name, root, source.phase)
    if not source.list_file and (chosen := _choose_place(layout.places, root, layout.names(split))):
        return match_place(layout, source, *chosen)
    if name:
        raise _root_lacks(layout, source, name)
    raise OptionError(
        f'datasets.{source.phase}.split: {layout.title} has {", ".join(SPAD_LISTS)}; got {split!r}. '
        f'To use another list, set list_file'
    )


def _find_in_manifest(layout: Layout, source: Source) -> MatchResult:
    if not os.path.isfile(source.manifest):
        where = f'datasets.{source.phase}.manifest'
        raise _not_there('The manifest', source.manifest, 'no such file', where, layout)
    return read_manifest(source.manifest).pairs(), []


def _keep_numbers(layout: Layout, source: Source, pairs: list[Pair], faults: list[DataFault]) -> MatchResult:
    """Keep the pairs whose numbers belong to the split."""
    split = layout.split(source)
    where = f'datasets.{source.phase}'
    if split not in layout.numbers:
        raise OptionError(f'{where}.split: {layout.title} has {", ".join(layout.numbers)}; got {split!r}')
    text = f'pairs of {layout.title} are numbered; rename it or move it'
    faults += [DataFault('no number', pair.lq, text) for pair in pairs if not pair.key.isdecimal()]
    numbers = layout.numbers[split]
    chosen = [pair for pair in pairs if pair.key.isdecimal() and int(pair.key) in numbers]
    if not chosen and not faults:
        raise DataError(
            f'{where}: {source.dataroot} has no pair of the split {split!r} of {layout.title}, numbers {numbers[0]} to '
            f'{numbers[-1]}; it has {shorten_list(pair.key for pair in pairs)}. Add them, or set split'
        )
    return chosen, faults


def _name_missing_folder(layout: Layout, root: Path, split: str) -> str:
    """Name the missing folder of the first place that lacks only one, or else the first folder searched for."""
    missing = [[folder for folder in place.folders(root, split) if not folder.is_dir()] for place in layout.places]
    folder = next((folders[0] for folders in missing if len(folders) == 1), layout.places[0].folders(root, split)[0])
    return f'{folder.relative_to(root).as_posix()}/'


def _root_lacks(layout: Layout, source: Source, what: str) -> DataError:
    is_there = os.path.isdir(source.dataroot)
    fault = f'{what} is missing' if is_there else f'no such folder, hence no {what}'
    return _not_there(layout.title, source.dataroot, fault, f'datasets.{source.phase}.dataroot', layout)


def _not_there(title: str, folder: str, fault: str, key: str, layout: Layout) -> DataError:
    """Return an error of three lines: what is missing, the remedy, and how to train without the data."""
    return DataError(
        f'{title} was not found at {folder}: {fault} ({key}).\n'
        f'Put it there ({layout.description}), or set {key} to its location.\n'
        f'To try without it: basicsr train -opt AST_quickstart'
    )


def _read_lines(list_path: Path, root: Path, faults: list[DataFault]) -> Iterator[Pair]:
    """Yield pairs line by line, as SPAD's list has 640,000."""
    try:
        # File names need not be valid UTF-8.
        file = open(list_path, encoding='utf-8-sig', errors='surrogateescape')  # noqa: SIM115
    except OSError as error:
        raise DataError(f'{list_path}: cannot be read: {error.strerror}') from error
    with file:
        for number, line in enumerate(map(str.strip, file), 1):
            cuts = _cut_line(line, root) if line else []
            if len(cuts) == 1:
                lq, gt = (name.replace('//', '/').lstrip('/') for name in cuts[0])
                yield Pair(lq, f'{root}/{lq}', f'{root}/{gt}')
            elif line:
                text = f'{list_path}: expected two image files, for example /dir/lq.png /dir_gt/gt.png'
                faults.append(DataFault('line not understood', f'line {number}, {line!r}', text))


def _cut_line(line: str, root: Path) -> list[tuple[str, str]]:
    """Return the ways to split a line into two image files; if there are several, those whose files exist."""
    fields = line.split('\t') if '\t' in line else line.split()
    if len(fields) == 2:
        return [(fields[0].strip(), fields[1].strip())] if all(map(is_image, fields)) else []
    spaces = [place for place, letter in enumerate(line) if letter == ' ']
    cuts = {(line[:place].strip(), line[place:].strip()) for place in spaces}
    cuts = [cut for cut in cuts if all(map(is_image, cut)) and cut[0].startswith('/') == cut[1].startswith('/')]
    if len(cuts) > 1:
        cuts = [cut for cut in cuts if all((root / name.lstrip('/')).is_file() for name in cut)]
    return cuts


@dataclass(frozen=True)
class Layout:
    """Directory layout of a dataset."""

    title: str
    description: str  # expected files below `dataroot`, as one line
    places: tuple[Place, ...] = ()  # searched in order; the first match is used
    train_splits: tuple[str, ...] = ('train',)  # values of `split` in training; the first is the default
    test_splits: tuple[str, ...] = ('test',)  # values of `split` in other phases; the first is the default
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # further folder names of a split; `.`: root
    numbers: Mapping[str, range] = field(default_factory=dict)  # pair numbers of each split, if it has no folder
    has_scenes: bool = False  # whether a split may contain one such place per scene of a video
    needs: tuple[str, ...] = ('dataroot',)  # required keys of `Source`
    may_have: tuple[str, ...] = ('split',)  # optional keys of `Source`
    find: Callable[[Layout, Source], MatchResult] = _find_places

    @property
    def splits(self) -> tuple[str, ...]:
        """All splits of the dataset."""
        return self.train_splits + self.test_splits

    def phase(self, split: str) -> str:
        """Return the phase of a split, `train` or `test`."""
        return 'train' if split in self.train_splits else 'test'

    def split(self, source: Source) -> str:
        """Return the split set in `source`, or the default split of its phase."""
        return source.split or (self.train_splits if source.phase == 'train' else self.test_splits)[0]

    def names(self, split: str) -> tuple[str, ...]:
        """Return the possible folder names of a split."""
        return (split, *self.aliases.get(split, ()))


# Names of rain images follow the authors' Matlab scripts (norain-1x2.png) or PReNet's copies (rain-001.png), or are
# equal (DRSformer, Restormer).
_RAIN = _make_places(
    _below_split(
        *('input target', 'input gt', 'input groundtruth', 'rain/X2 norain', 'rain norain', 'rainy norain'),
        *('rainy .', 'rainy_image ground_truth', 'data gt', '. .'),
    ),
    *(('rain-{}', 'norain-{}'), ('norain-{}x2', 'norain-{}'), ('{}x2', '{}'), ('{}', '{}')),
)
_RAIN200_NAMES = {
    'train': ('rain_data_train_Light', 'rain_data_train_Heavy'),
    'test': ('rain_data_test_Light', 'rain_data_test_Heavy'),
}
_RAIN100_NAMES = {
    'train': (*_RAIN200_NAMES['train'], 'RainTrainL', 'RainTrainH'),
    'test': (*_RAIN200_NAMES['test'], 'Rain100L', 'Rain100H', '.'),
}

_HAZY, _CLEAR = ('hazy', 'haze', 'ITS_haze'), ('clear', 'gt', 'GT', 'ITS_clear')

LAYOUTS = {
    'folders': Layout(
        'A pair of folders',
        'degraded images in dataroot_lq, clean images of the same names, or as set by the templates, in dataroot_gt',
        needs=('dataroot_lq', 'dataroot_gt'),
        may_have=('lq_template', 'gt_template'),
        find=_find_folders,
    ),
    'manifest': Layout(
        'A manifest',
        'a file written by `basicsr data prepare`',
        needs=('manifest',),
        may_have=(),
        find=_find_in_manifest,
    ),
    'spad': Layout(
        'SPAD',
        'real_world.txt for training, real_test_1000.txt for testing, '
        'with lines "/dir/lq.png /dir_gt/gt.png", and the folders named in them; '
        'or train/ and test/, each with input/ and target/ of the same names',
        _make_places(_below_split('input target', 'data gt')),
        may_have=('split', 'list_file'),
        find=_find_listed,
    ),
    'agan': Layout(
        'AGAN-Data',
        'train/, test_a/ and test_b/, each with data/12_rain.png and gt/12_clean.png',
        _make_places(_below_split('data gt'), ('{}_rain', '{}_clean')),
        test_splits=('test_a', 'test_b'),
    ),
    'densehaze': Layout(
        'Dense-Haze',
        'input/ and gt/ with 01.png to 55.png, or hazy/01_hazy.png and GT/01_GT.png, or all in one folder; '
        '1 to 50 are for training, 51 to 55 for testing',
        _make_places((*_below_split('input gt'), ('input', 'gt')), ('{}_hazy', '{}_GT'), ('{}', '{}'))
        + _make_places((*_below_split('hazy GT'), ('hazy', 'GT'), ('.', '.')), ('{}_hazy', '{}_GT')),
        numbers={'train': range(1, 51), 'test': range(51, 56)},
    ),
    'rain100': Layout(
        'Rain100L or Rain100H',
        'RainTrainL/ or RainTrainH/ with rain-1.png and norain-1.png; rainy/rain-001.png and norain-001.png, '
        'rain/X2/norain-1x2.png and norain/norain-1.png, or input/ and target/ of the same names',
        _RAIN,
        aliases=_RAIN100_NAMES,
    ),
    'rain200': Layout(
        'Rain200L or Rain200H',
        'train/ and test/, each with input/ and target/ of the same names, '
        'or rain/ with norain-1x2.png or rain-1.png and norain/ with norain-1.png',
        _RAIN,
        aliases=_RAIN200_NAMES,
    ),
    'reside': Layout(
        'RESIDE',
        'ITS/, OTS/, SOTS/indoor/ or SOTS/outdoor/, each with hazy/0001_0.8_0.2.jpg and clear/0001.png or gt/0001.png: '
        'several hazy images per clear one; split is ITS, OTS, indoor, outdoor, or train and test',
        _make_places(
            _below_split(*(f'{hazy} {clear}' for hazy in _HAZY for clear in _CLEAR)),
            ('{}_*', '{}'),
            ('{}', '{}'),
            deep=True,
        ),
        train_splits=('train', 'ITS', 'OTS'),
        test_splits=('test', 'indoor', 'outdoor'),
        aliases={
            'OTS': ('OTS_BETA', 'OTS_ALPHA'),
            'indoor': ('SOTS/indoor', 'nyuhaze500'),
            'outdoor': ('SOTS/outdoor',),
        },
    ),
    'snow100k': Layout(
        'Snow100K',
        'train/ or all/, and test/ or Snow100K-S/, -M/ and -L/, each with synthetic/ and gt/ of the same names; '
        'set split to use folders other than train and test',
        _make_places(_below_split('synthetic gt')),
        test_splits=('test', 'Snow100K-S', 'Snow100K-M', 'Snow100K-L'),
        aliases={'train': ('all',)},
    ),
    'istd': Layout(
        'ISTD',
        'train/train_A/ with shadows and train/train_C/ without, of the same names, and test/ likewise',
        _make_places((*_below_split('{split}_A {split}_C'), ('{split}_A', '{split}_C'))),
    ),
    'srd': Layout(
        'SRD',
        'train/shadow/1.jpg and train/shadow_free/1_no_shadow.jpg (in test/ 1_free.jpg), or train_A/ and train_C/',
        _make_places(
            (*_below_split('shadow shadow_free', '{split}_A {split}_C'), ('{split}_A', '{split}_C')),
            *(('{}', '{}_no_shadow'), ('{}', '{}_free'), ('{}', '{}')),
        ),
        aliases={'train': ('Train', 'SRD_Train'), 'test': ('Test', 'SRD_Test', 'test_data')},
    ),
    'moire': Layout(
        'TIP-2018',
        'trainData/source/1_source.png and trainData/target/1_target.png, and testData/ likewise; '
        'or train/ and test/, or degraded and clean images in one folder',
        _make_places(
            (
                ('{split}Data/source', '{split}Data/target'),
                *_below_split('source target'),
                ('{split}Data', '{split}Data'),
                *_below_split('. .'),
            ),
            ('{}_source', '{}_target'),
        ),
        aliases={'train': ('Train',), 'test': ('Test',)},
    ),
}
"""All layouts by their name in the option `layout`."""
