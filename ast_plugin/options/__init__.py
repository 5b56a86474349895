"""Option files: found by name, read safely, and completed for BasicSR's pipelines."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ast_plugin.errors import OptionError, did_you_mean
from ast_plugin.options import inheritance, lengths
from ast_plugin.options.overrides import override
from ast_plugin.plugins import option_folders

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the shipped files lie inside the package, in a checkout beside it.
_SHIPPED_FOLDERS = (_PACKAGE / 'option_files', _PACKAGE.parent / 'options')
_SUFFIXES = ('.yml', '.yaml')
_PHASES = ('train', 'val', 'test')
_CONVERTS_UINT8 = ('RestorationModel',)
# The file's own value wins; these stand where BasicSR reads a key that need not be there.
_NEUTRAL = {'num_gpu': 'auto', 'scale': 1}
_NEUTRAL_VAL = {'save_img': False, 'suffix': None}


def shipped_folder() -> Path:
    """The folder with the option files that come with this package."""
    for folder in _SHIPPED_FOLDERS:
        if folder.is_dir():
            return folder
    raise OptionError(f'this installation has no option files: {_SHIPPED_FOLDERS[0]} is missing, install it again')


def shipped_files() -> dict[str, Path]:
    """The shipped option files by the name `find` knows them by; parts that others inherit from are left out."""
    return _files_in(shipped_folder())


def known_files() -> dict[str, Path]:
    """The shipped option files and those of installed plugins, which are known as `PLUGIN/FILE`."""
    files = shipped_files()
    for plugin, folder in option_folders().items():
        files |= {f'{plugin}/{name}': path for name, path in _files_in(folder).items()}
    return files


def _files_in(folder: Path) -> dict[str, Path]:
    names = {}
    for path in sorted(folder.rglob('*.yml')):
        relative = path.relative_to(folder)
        if not any(part.startswith(('_', '.')) for part in relative.parts):
            names[relative.with_suffix('').as_posix()] = path
    return names


def find(name_or_path: str | Path) -> Path:
    """The option file meant by a path (`options/AST_derain.yml`) or by the name of a file of `known_files`.

    Raises:
        OptionError: if there is no such file; it names the nearest one that is known.
    """
    path = Path(os.path.expanduser(name_or_path))
    if path.is_file():
        return path
    known = known_files()
    name = path.as_posix()
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    if name in known:
        return known[name]
    if path.is_dir():
        raise OptionError(f'{name_or_path}: expected an option file, this is a folder')
    raise OptionError(
        f'{name_or_path}: no such option file{did_you_mean(name, known) or did_you_mean(path.stem, known)} '
        '(`basicsr options` lists those that come along)'
    )


def load(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read an option file with all that it inherits from, running nothing that any of them holds.

    Args:
        path: the file; see `find` for names.
        overrides: as given to `--force_yml`; see `ast_plugin.options.overrides`. Those of one stage are done last.
    Returns:
        The options, variables of the environment filled in. With `stages`, see `ast_plugin.options.stages.expand`.
    Raises:
        OptionError: with the file and the line or key.
    """
    path = Path(path)
    opt = inheritance.read(path)
    for text in sorted(overrides, key=lambda text: text.lstrip().startswith('stages:')):
        override(opt, text)
    return inheritance.fill_in(opt, str(path))


def prepare(
    opt: Mapping[str, Any],
    *,
    root: str | Path = '.',
    is_train: bool = True,
    debug: bool = False,
    rank: int = 0,
    world_size: int = 1,
    dist: bool = False,
    dataset_types: Mapping[str, object] | None = None,
    stage: str | None = None,
    length_of: Callable[[Mapping[str, Any]], int] | None = None,
) -> dict[str, Any]:
    """Complete options as BasicSR's `parse_options` does after it has read a file. The argument stays as it is.

    Args:
        opt: options that `ast_plugin.schema.check` found right.
        root: outputs go to `experiments/`, `results/` and `tb_logger/` under it.
        is_train: False leaves out training data and lays paths for results.
        debug: BasicSR's debug mode: `debug_` before the name, and frequent validation and saving.
        rank, world_size, dist: this process among all, from BasicSR's `get_dist_info`.
        dataset_types: registered datasets by name. Those whose `options_type` has a `seed` get the run's.
        stage: name of the stage that `opt` is of; it trains in a folder of that name inside of the experiment's.
        length_of: counts the samples of a training set, out of its completed options. With it what is given in epochs
            becomes iterations, and `train.iters_per_epoch` is set.
    Returns:
        What BasicSR's pipelines expect of `parse_options`. No folder is made, no random state touched.
    Raises:
        OptionError: if something is given in epochs and there is no `length_of`.
    """
    opt = copy.deepcopy(dict(opt))
    root = Path(os.path.expanduser(root)).resolve()
    for key, value in _NEUTRAL.items():
        if opt.get(key) is None:
            opt[key] = value
    if opt['num_gpu'] == 'auto':
        opt['num_gpu'] = _num_gpus()
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = random.SystemRandom().randint(1, 10000)
    opt['name'] = run_name(opt, debug)
    # A state to resume from is put into path.resume_state by us: BasicSR would look for it under the working
    # directory, whatever the root.
    opt.update(is_train=is_train, auto_resume=False, dist=dist, rank=rank, world_size=world_size)
    opt['datasets'] = _datasets(opt, is_train, dataset_types or {})
    opt['path'] = _paths(opt, root, is_train, stage)
    if stage is not None and is_train:
        opt['name'] = f'{opt["name"]}_{stage}'
    if is_train:
        lengths.resolve(opt, length_of)
        opt['logger'].setdefault('use_tb_logger', False)  # which BasicSR reads without asking whether it is there
    if opt.get('val') is not None or not is_train:
        opt['val'] = {**_NEUTRAL_VAL, **_validation(opt.get('val') or {}, is_train)}
    if is_train and 'debug' in opt['name']:
        opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
        if opt.get('val') is not None:
            opt['val']['val_freq'] = 8
    return opt


def _validation(val: Mapping[str, Any], is_train: bool) -> dict[str, Any]:
    """The section `val` for this run: in training with what `during_training` says, in testing without it."""
    val = dict(val)
    during = val.pop('during_training', None) or {}
    if not is_train or not during:
        return val
    # A protocol brings its own metrics: those that were written for another are not measured by it.
    if during.get('protocol') is not None:
        val.pop('metrics', None)
    return {**val, **during}


def run_name(opt: Mapping[str, Any], debug: bool = False) -> str:
    """What the run, and its folder, is called; the debug mode has runs of its own."""
    return f'debug_{opt["name"]}' if debug and not opt['name'].startswith('debug') else opt['name']


def phase_of(dataset_key: str) -> str:
    """`train`, `val` or `test`, out of a key under `datasets` such as `val_2`; empty when it is none of them."""
    phase = dataset_key.split('_')[0]
    return phase if phase in _PHASES else ''


def _datasets(opt: dict[str, Any], is_train: bool, dataset_types: Mapping[str, object]) -> dict[str, Any]:
    """The datasets of this run. BasicSR's training stumbles over test sets, its testing would test on train."""
    phases = ('train', 'val') if is_train else ('val', 'test')
    datasets = {}
    for key, dataset in opt['datasets'].items():
        phase = phase_of(key)
        if phase not in phases:
            continue
        dataset.update(phase=phase, scale=opt['scale'])
        if phase == 'val' and not is_train:
            dataset.pop('center_crop', None)  # what makes validations quick while training goes on is no test
        for name in [name for name in dataset if name.startswith('dataroot')]:
            if isinstance(dataset[name], str):
                dataset[name] = os.path.expanduser(dataset[name])
        options_type = getattr(dataset_types.get(dataset['type']), 'options_type', None)
        if options_type is not None and 'seed' in options_type.model_fields and dataset.get('seed') is None:
            dataset['seed'] = opt['manual_seed']
        if options_type is not None and 'keep_uint8' in options_type.model_fields:
            _keep_uint8(key, dataset, opt.get('model_type'))
        datasets[key] = dataset
    return datasets


def _keep_uint8(key: str, dataset: dict[str, Any], model_type: str | None) -> None:
    """Let training images stay of 8 bits on their way to a model that makes floats of them on its device."""
    converts = model_type in _CONVERTS_UINT8
    if dataset.get('keep_uint8') and not converts:
        raise OptionError(
            f'datasets.{key}.keep_uint8: {model_type} expects floats; leave it out, or take model_type: '
            f'{_CONVERTS_UINT8[0]}, which converts on its device'
        )
    if dataset.get('keep_uint8') is None and dataset['phase'] == 'train':
        dataset['keep_uint8'] = converts


def _paths(opt: dict[str, Any], root: Path, is_train: bool, stage: str | None) -> dict[str, Any]:
    paths = dict(opt.get('path') or {})
    for key, value in paths.items():
        if isinstance(value, str) and ('resume_state' in key or 'pretrain_network' in key):
            paths[key] = os.path.expanduser(value)
    if is_train:
        experiment = root / 'experiments' / opt['name'] / (stage or '')
        folders = {
            'experiments_root': experiment,
            'models': experiment / 'models',
            'training_states': experiment / 'training_states',
            'log': experiment,
            'visualization': experiment / 'visualization',
        }
    else:
        results = root / 'results' / opt['name']
        folders = {'results_root': results, 'log': results, 'visualization': results / 'visualization'}
    return {**paths, **{key: str(folder) for key, folder in folders.items()}}


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
