"""The runs described by an option file, and their completion for BasicSR's pipelines.

`stages` is a list. Each entry contains the options that differ from the rest of the file (see
`ast_plugin.options.reading.merge`) and optionally a `name` (default: stage_1, stage_2 …). A stage trains in
experiments/RUN/NAME. A compare file has a list `networks` instead of `network_g`.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ast_plugin.errors import OptionError
from ast_plugin.options.reading import EXCLUSIVE_KEYS, STAGES_KEY, find_at, merge
from ast_plugin.options.sections import ComparedFile, to_whole_number

AUTO = 'auto'
# Placeholder for a number of iterations that is determined by measuring, see `compare.minutes`.
UNKNOWN_LENGTH = 10**6
_PHASES = ('train', 'val', 'test')
_PLUGIN_MODEL = 'RestorationModel'


@dataclass(frozen=True)
class Stage:
    """One of the runs described by an option file."""

    number: int  # starting at 1
    name: str | None  # also its folder in the experiment; None for a file without stages
    opt: dict[str, Any]  # all options of the stage; `name` is that of the file
    own: Mapping[str, Any]  # the entry of this stage in the file

    @property
    def has_own_start(self) -> bool:
        """Return whether the entry of this stage sets its initial weights."""
        return bool((self.own.get('path') or {}).get('pretrain_network_g'))


def expand(opt: Mapping[str, Any]) -> list[Stage]:
    """Return the runs described by options: one, or one per stage; raise OptionError if `stages` is invalid."""
    if STAGES_KEY not in opt:
        return [Stage(1, None, dict(opt), {})]
    entries = opt[STAGES_KEY]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise OptionError(f'{STAGES_KEY}: expected a list of mappings, one per stage')
    names = [stage_name(number, entry) for number, entry in enumerate(entries, 1)]
    if len(set(names)) < len(names):
        raise OptionError(f'{STAGES_KEY}: expected unique names, got {", ".join(names)}')
    return [
        Stage(number, name, staged(opt, entry), entry)
        for number, (name, entry) in enumerate(zip(names, entries, strict=True), 1)
    ]


def staged(opt: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of the stage described by `entry`; `name` remains that of the file."""
    base = {key: value for key, value in opt.items() if key != STAGES_KEY}
    return merge(base, {key: value for key, value in entry.items() if key != 'name'})


def stage_name(number: int, entry: Mapping[str, Any]) -> str:
    """Return the name of a stage and its folder."""
    return entry.get('name') or f'stage_{number}'


def is_trained(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of `networks` is trained: if it has no weights, or has a section `train`."""
    return entry.get('weights') is None or entry.get('train') is not None


def expand_network(opt: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an entry of `networks`: the shared options, its network and the changes of its `train`."""
    shared = {key: value for key, value in opt.items() if key not in ComparedFile.model_fields}
    own = {key: entry[key] for key in ('name', 'network_g', 'train') if entry.get(key) is not None}
    expanded = merge(shared, own)
    if find_at(opt, ('compare', 'minutes')) and isinstance(expanded.get('train'), dict):
        expanded['train'].setdefault('total_iter', UNKNOWN_LENGTH)
    datasets = opt.get('datasets')
    if isinstance(datasets, Mapping) and 'val' not in map(phase_of, datasets):
        expanded.pop('val', None)  # it applies to the test set, which is measured after training
    paths = {'pretrain_network_g': entry.get('weights'), 'param_key_g': entry.get('param_key')}
    expanded['path'] = {key: value for key, value in paths.items() if value is not None}
    return expanded


def measured_dataset(opt: Mapping[str, Any]) -> str:
    """Return the key of the dataset on which networks are compared: the test set, or else the validation set."""
    return next(key for phase in ('test', 'val') for key in opt['datasets'] if phase_of(key) == phase)


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
    channels_of: Callable[[Mapping[str, Any]], int] | None = None,
) -> dict[str, Any]:
    """Complete options as BasicSR's `parse_options` does after reading a file. `opt` is not modified.

    Args:
        opt: options that have passed `ast_plugin.options.validation.check`.
        root: folder for `experiments/`, `results/` and `tb_logger/`.
        is_train: False omits training data and sets the paths for results.
        debug: BasicSR's debug mode: prefix `debug_` of the name, and frequent validation and saving.
        rank, world_size, dist: values of BasicSR's `get_dist_info`.
        dataset_types: registered datasets by name. Datasets whose `options_type` has a `seed` get the seed of the run.
        stage: name of the stage of `opt`; it is trained in a subfolder of that name.
        length_of: returns the number of samples of a training set for its completed options. Used to convert epochs to
            iterations and to set `train.iters_per_epoch`.
        channels_of: returns the number of input channels for network options; for 1, the datasets yield gray pairs.
    Returns:
        The options as BasicSR's pipelines expect them. No folder is created, and no random state is changed.
    Raises:
        OptionError: if epochs are given without `length_of`, or `device` is not available.
    """
    opt = copy.deepcopy(dict(opt))
    root = Path(os.path.expanduser(root)).resolve()
    # BasicSR requires int for counts, which may be written as 2e3.
    for section in (opt, *opt['datasets'].values(), *filter(None, map(opt.get, ('train', 'val', 'logger')))):
        section.update({key: to_whole_number(value) for key, value in section.items()})
    # BasicSR requires these keys.
    if opt.get('scale') is None:
        opt['scale'] = 1
    opt['device'], opt['num_gpu'] = _choose_device(opt.get('device') or AUTO, opt.get('num_gpu'))
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = random.SystemRandom().randint(1, 10000)
    opt['name'] = run_name(opt, debug)
    # The plugin sets path.resume_state itself: BasicSR would search under the working directory instead of the root.
    opt.update(is_train=is_train, auto_resume=False, dist=dist, rank=rank, world_size=world_size)
    network = opt.get('network_g')
    is_gray = isinstance(network, dict) and channels_of is not None and channels_of(network) == 1
    opt['datasets'] = _datasets(opt, is_train, dataset_types or {}, is_gray)
    opt['path'] = _paths(opt, root, is_train, stage)
    if stage is not None and is_train:
        opt['name'] = f'{opt["name"]}_{stage}'
    if is_train:
        _count_epochs(opt, length_of)
        opt['logger'].setdefault('use_tb_logger', False)  # required by BasicSR
    if opt.get('val') is not None or not is_train:
        opt['val'] = _validation(opt.get('val') or {}, is_train)
    if is_train and 'debug' in opt['name']:
        opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
        if opt.get('val') is not None:
            opt['val']['val_freq'] = 8
    return opt


def _choose_device(device: str, num_gpu: int | str | None) -> tuple[str, int]:
    """Return the device type of a run and its number of CUDA GPUs.

    The number of GPUs is not checked here, but with the other requirements of a run.
    """
    count = num_gpu if isinstance(num_gpu, int) else None
    if device == AUTO and count is not None:
        return ('cuda', count) if count else ('cpu', 0)
    from ast_plugin.devices import find_device  # imports torch, which reading options does not need

    device = find_device(device).type
    if device != 'cuda':
        return device, 0
    import torch

    return device, count or torch.cuda.device_count()


def _validation(val: Mapping[str, Any], is_train: bool) -> dict[str, Any]:
    """Return the section `val` of this run, with `during_training` applied in training and removed in testing."""
    val = {'save_img': False, 'suffix': None, **val}
    during = val.pop('during_training', None) or {}
    if is_train and during.get('protocol') is not None:
        val.pop('metrics', None)  # the protocol of during_training has its own metrics
    return {**val, **during} if is_train else val


def run_name(opt: Mapping[str, Any], debug: bool = False) -> str:
    """Return the name of the run and its folder, with the prefix `debug_` in debug mode."""
    return f'debug_{opt["name"]}' if debug and not opt['name'].startswith('debug') else opt['name']


def phase_of(dataset_key: str) -> str:
    """Return `train`, `val` or `test` for a key under `datasets` such as `val_2`, or an empty string."""
    phase = dataset_key.split('_')[0]
    return phase if phase in _PHASES else ''


def _datasets(
    opt: dict[str, Any], is_train: bool, dataset_types: Mapping[str, object], is_gray: bool
) -> dict[str, Any]:
    """Return the datasets of this run. BasicSR's training fails on test sets, and its testing would use train sets."""
    phases = ('train', 'val') if is_train else ('val', 'test')
    datasets = {}
    for key, dataset in opt['datasets'].items():
        phase = phase_of(key)
        if phase not in phases:
            continue
        dataset.update(phase=phase, scale=opt['scale'])
        if phase == 'val' and not is_train:
            dataset.pop('center_crop', None)  # it only speeds up validation during training
        for name in [name for name in dataset if name.startswith('dataroot')]:
            if isinstance(dataset[name], str):
                dataset[name] = os.path.expanduser(dataset[name])
        options_type = getattr(dataset_types.get(dataset['type']), 'options_type', None)
        keys = options_type.model_fields if options_type is not None else ()
        if 'seed' in keys and dataset.get('seed') is None:
            dataset['seed'] = opt['manual_seed']
        if 'in_chans' in keys and is_gray:
            dataset.setdefault('in_chans', 1)
        if opt.get('bit_depth') == 16:
            _set_bit_depth(key, dataset, keys, opt.get('model_type'))
        if 'keep_uint8' in keys:
            _keep_uint8(key, dataset, opt.get('model_type'))
        datasets[key] = dataset
    return datasets


def _keep_uint8(key: str, dataset: dict[str, Any], model_type: str | None) -> None:
    """Enable `keep_uint8` for training if the model converts images to float on its device."""
    converts = model_type == _PLUGIN_MODEL
    if dataset.get('keep_uint8') and not converts:
        raise OptionError(
            f'datasets.{key}.keep_uint8: {model_type} expects floats; remove it, or use model_type: '
            f'{_PLUGIN_MODEL}, which converts on its device'
        )
    if dataset.get('keep_uint8') is None and dataset['phase'] == 'train':
        dataset['keep_uint8'] = converts


def _set_bit_depth(key: str, dataset: dict[str, Any], keys: Iterable[str], model_type: str | None) -> None:
    """Set the bit depth of a dataset to 16; raise OptionError if dataset or model would silently reduce it to 8."""
    if 'bit_depth' not in keys:
        raise OptionError(f'datasets.{key}.type: {dataset["type"]} reads 8 bits, bit_depth is 16: use PairsDataset')
    if model_type != _PLUGIN_MODEL:
        raise OptionError(f'model_type: {model_type} measures and writes 8 bits, bit_depth is 16: use {_PLUGIN_MODEL}')
    dataset.setdefault('bit_depth', 16)


def _paths(opt: dict[str, Any], root: Path, is_train: bool, stage: str | None) -> dict[str, Any]:
    paths = dict(opt.get('path') or {})
    for key, value in paths.items():
        if isinstance(value, str) and ('resume_state' in key or 'pretrain_network' in key):
            paths[key] = os.path.expanduser(value)
    if is_train:
        experiment = root / 'experiments' / opt['name'] / (stage or '')
        folders = {name: experiment / name for name in ('models', 'training_states', 'visualization')}
        folders |= {'experiments_root': experiment, 'log': experiment}
    else:
        results = root / 'results' / opt['name']
        folders = {'results_root': results, 'log': results, 'visualization': results / 'visualization'}
    return {**paths, **{key: str(folder) for key, folder in folders.items()}}


def _count_epochs(opt: dict[str, Any], length_of: Callable[[Mapping[str, Any]], int] | None) -> None:
    """Convert epochs to iterations in place, and set `train.iters_per_epoch`; a scheduler keeps its `warmup_epochs`."""
    given = [
        (opt[section], key, plain_key)
        for (section, *inner), plain_key, key in EXCLUSIVE_KEYS
        if not inner and (opt.get(section) or {}).get(key) is not None
    ]
    if length_of is None or 'train' not in opt['datasets']:
        if given:
            keys = ', '.join(key for _, key, _ in given)
            raise OptionError(f'{keys}: converting epochs to iterations requires the training set')
        return
    train, dataset = opt['train'], opt['datasets']['train']
    scheduler = train.get('scheduler') if isinstance(train.get('scheduler'), dict) else {}
    warmup, total = scheduler.get('warmup_epochs'), train.get('total_epochs')
    if total is not None and isinstance(warmup, int) and warmup >= total:
        # A run shortened to a few epochs keeps one epoch after the warm-up; otherwise there is no valid schedule.
        train['scheduler'] = {**scheduler, 'warmup_epochs': int(total) - 1}
    # A single process feeds all its GPUs with one batch each; in distributed runs each process feeds one GPU.
    num_devices = opt['world_size'] if opt['dist'] else max(1, opt['num_gpu'])
    num_samples = length_of(dataset) * (dataset.get('dataset_enlarge_ratio') or 1)
    epoch = train['iters_per_epoch'] = max(1, math.ceil(num_samples / (dataset['batch_size_per_gpu'] * num_devices)))
    for section, key, plain_key in given:
        value = int(section.pop(key))
        section[plain_key] = max(1, epoch // value) if key == 'times_per_epoch' else value * epoch
    if train.get('warmup_iter') == 0:
        train['warmup_iter'] = -1
