"""The runs that an option file stands for, and each of them completed for BasicSR's pipelines.

`stages` is a list. An entry holds what differs from the rest of the file, see `ast_plugin.options.reading.merge`, and
may have a `name`; without one the stages are called stage_1, stage_2 … Stage N trains in experiments/RUN/NAME.
In a compare file the list `networks` stands in the place of `network_g`.
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
from ast_plugin.options.reading import STAGES_KEY, find_at, merge
from ast_plugin.options.sections import ComparedFile, whole

AUTO = 'auto'
# Stands for a number of iterations that is found out by measuring, see `compare.minutes`.
UNKNOWN_LENGTH = 10**6
_PHASES = ('train', 'val', 'test')
_OUR_MODEL = 'RestorationModel'
_WHOLE_NUMBERS = ('_iter', '_freq', '_epochs')  # how keys of these end
_IN_EPOCHS = (
    ('train', 'total_epochs', 'total_iter'),
    ('train', 'warmup_epochs', 'warmup_iter'),
    ('val', 'times_per_epoch', 'val_freq'),
    ('logger', 'save_checkpoint_epochs', 'save_checkpoint_freq'),
)


@dataclass(frozen=True)
class Stage:
    """One of the runs that an option file stands for."""

    number: int  # from 1 on
    name: str | None  # of its folder in the experiment's; None for the one run of a file without stages
    opt: dict[str, Any]  # all its options; `name` in them is the whole file's
    own: Mapping[str, Any]  # what the file says of this stage alone

    @property
    def has_own_start(self) -> bool:
        """Whether the file says itself what weights this stage starts from."""
        return bool((self.own.get('path') or {}).get('pretrain_network_g'))


def expand(opt: Mapping[str, Any]) -> list[Stage]:
    """The runs that options as read stand for: one, unless they have `stages`; OptionError if these are not right."""
    if STAGES_KEY not in opt:
        return [Stage(1, None, dict(opt), {})]
    entries = opt[STAGES_KEY]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise OptionError(f'{STAGES_KEY}: expected a list of mappings, each of what differs in a stage')
    names = [stage_name(number, entry) for number, entry in enumerate(entries, 1)]
    if len(set(names)) < len(names):
        raise OptionError(f'{STAGES_KEY}: each stage needs a name of its own, not {", ".join(names)}')
    return [
        Stage(number, name, staged(opt, entry), entry)
        for number, (name, entry) in enumerate(zip(names, entries, strict=True), 1)
    ]


def staged(opt: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the stage that `entry` describes. The run keeps the file's name."""
    base = {key: value for key, value in opt.items() if key != STAGES_KEY}
    return merge(base, {key: value for key, value in entry.items() if key != 'name'})


def stage_name(number: int, entry: Mapping[str, Any]) -> str:
    """The name of a stage, and of its folder."""
    return entry.get('name') or f'stage_{number}'


def is_trained(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `networks` is trained: where it has no weights, or says besides how."""
    return entry.get('weights') is None or entry.get('train') is not None


def expand_network(opt: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The option file that an entry of `networks` stands for: what all share, its network, what its `train` changes."""
    shared = {key: value for key, value in opt.items() if key not in ComparedFile.model_fields}
    own = {key: entry[key] for key in ('name', 'network_g', 'train') if entry.get(key) is not None}
    expanded = merge(shared, own)
    if find_at(opt, ('compare', 'minutes')) and isinstance(expanded.get('train'), dict):
        expanded['train'].setdefault('total_iter', UNKNOWN_LENGTH)
    datasets = opt.get('datasets')
    if isinstance(datasets, Mapping) and 'val' not in map(phase_of, datasets):
        expanded.pop('val', None)  # it says how the test set is measured, after training
    paths = {'pretrain_network_g': entry.get('weights'), 'param_key_g': entry.get('param_key')}
    expanded['path'] = {key: value for key, value in paths.items() if value is not None}
    return expanded


def measured_dataset(opt: Mapping[str, Any]) -> str:
    """The key of the set that networks are compared on: the test set, or where there is none that of validation."""
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
    """Complete options as BasicSR's `parse_options` does after it has read a file. The argument stays as it is.

    Args:
        opt: options that `ast_plugin.options.validation.check` found right.
        root: outputs go to `experiments/`, `results/` and `tb_logger/` under it.
        is_train: False leaves out training data and lays paths for results.
        debug: BasicSR's debug mode: `debug_` before the name, and frequent validation and saving.
        rank, world_size, dist: this process among all, from BasicSR's `get_dist_info`.
        dataset_types: registered datasets by name. Those whose `options_type` has a `seed` get the run's.
        stage: name of the stage that `opt` is of; it trains in a folder of that name inside of the experiment's.
        length_of: counts the samples of a training set, out of its completed options. With it what is given in epochs
            becomes iterations, and `train.iters_per_epoch` is set.
        channels_of: tells of a network's options how many channels it takes; our datasets give gray pairs for one.
    Returns:
        What BasicSR's pipelines expect of `parse_options`. No folder is made, no random state touched.
    Raises:
        OptionError: if something is given in epochs and there is no `length_of`, or `device` is not there.
    """
    opt = copy.deepcopy(dict(opt))
    root = Path(os.path.expanduser(root)).resolve()
    # BasicSR reads these whether they are there or not.
    if opt.get('scale') is None:
        opt['scale'] = 1
    opt['device'], opt['num_gpu'] = _choose_device(opt.get('device') or AUTO, opt.get('num_gpu'))
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = random.SystemRandom().randint(1, 10000)
    opt['name'] = run_name(opt, debug)
    # A state to resume from is put into path.resume_state by us: BasicSR would look for it under the working
    # directory, whatever the root.
    opt.update(is_train=is_train, auto_resume=False, dist=dist, rank=rank, world_size=world_size)
    network = opt.get('network_g')
    is_gray = isinstance(network, dict) and channels_of is not None and channels_of(network) == 1
    opt['datasets'] = _datasets(opt, is_train, dataset_types or {}, is_gray)
    opt['path'] = _paths(opt, root, is_train, stage)
    if stage is not None and is_train:
        opt['name'] = f'{opt["name"]}_{stage}'
    if is_train:
        _count_epochs(opt, length_of)
        opt['logger'].setdefault('use_tb_logger', False)  # which BasicSR reads without asking whether it is there
    if opt.get('val') is not None or not is_train:
        opt['val'] = _validation(opt.get('val') or {}, is_train)
    if is_train and 'debug' in opt['name']:
        opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
        if opt.get('val') is not None:
            opt['val']['val_freq'] = 8
    return opt


def _choose_device(device: str, num_gpu: int | str | None) -> tuple[str, int]:
    """The type of the device that a run computes on, and how many GPUs of CUDA it takes.

    A number of GPUs is taken for a fact here, as BasicSR takes it, and checked with all else that a run needs.
    """
    count = num_gpu if isinstance(num_gpu, int) else None
    if device == AUTO and count is not None:
        return ('cuda', count) if count else ('cpu', 0)
    from ast_plugin.devices import find_device  # torch, which options as data do without

    device = find_device(device).type
    if device != 'cuda':
        return device, 0
    import torch

    return device, count or torch.cuda.device_count()


def _validation(val: Mapping[str, Any], is_train: bool) -> dict[str, Any]:
    """The section `val` for this run: in training with what `during_training` says, in testing without it."""
    val = {'save_img': False, 'suffix': None, **val}
    during = val.pop('during_training', None) or {}
    if is_train and during.get('protocol') is not None:
        val.pop('metrics', None)  # a protocol brings its own: those for another are not measured by it
    return {**val, **during} if is_train else val


def run_name(opt: Mapping[str, Any], debug: bool = False) -> str:
    """What the run, and its folder, is called; the debug mode has runs of its own."""
    return f'debug_{opt["name"]}' if debug and not opt['name'].startswith('debug') else opt['name']


def phase_of(dataset_key: str) -> str:
    """`train`, `val` or `test`, out of a key under `datasets` such as `val_2`; empty when it is none of them."""
    phase = dataset_key.split('_')[0]
    return phase if phase in _PHASES else ''


def _datasets(
    opt: dict[str, Any], is_train: bool, dataset_types: Mapping[str, object], is_gray: bool
) -> dict[str, Any]:
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
    """Let training images stay of 8 bits on their way to a model that makes floats of them on its device."""
    converts = model_type == _OUR_MODEL
    if dataset.get('keep_uint8') and not converts:
        raise OptionError(
            f'datasets.{key}.keep_uint8: {model_type} expects floats; leave it out, or take model_type: '
            f'{_OUR_MODEL}, which converts on its device'
        )
    if dataset.get('keep_uint8') is None and dataset['phase'] == 'train':
        dataset['keep_uint8'] = converts


def _set_bit_depth(key: str, dataset: dict[str, Any], keys: Iterable[str], model_type: str | None) -> None:
    """Tell a dataset that images have 16 bits; refuse it, and models, of which 8 would be left without a word."""
    if 'bit_depth' not in keys:
        raise OptionError(f'datasets.{key}.type: {dataset["type"]} reads 8 bits, bit_depth is 16: take PairsDataset')
    if model_type != _OUR_MODEL:
        raise OptionError(f'model_type: {model_type} measures and writes 8 bits, bit_depth is 16: take {_OUR_MODEL}')
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
    """Put iterations where `opt` says epochs, in place, and the iterations of an epoch in `train.iters_per_epoch`.

    Whole numbers may have been written as `2e3`: BasicSR wants plain ones. A schedule keeps its `warmup_epochs`.
    """
    for section in filter(None, map(opt.get, ('train', 'val', 'logger'))):
        section.update({key: whole(value) for key, value in section.items() if key.endswith(_WHOLE_NUMBERS)})
    given = [
        (opt[section], key, plain_key)
        for section, key, plain_key in _IN_EPOCHS
        if (opt.get(section) or {}).get(key) is not None
    ]
    if length_of is None or 'train' not in opt['datasets']:
        if given:
            keys = ', '.join(key for _, key, _ in given)
            raise OptionError(f'{keys}: epochs cannot be counted without the training set')
        return
    train, dataset = opt['train'], opt['datasets']['train']
    scheduler = train.get('scheduler') if isinstance(train.get('scheduler'), dict) else {}
    warmup, total = scheduler.get('warmup_epochs'), train.get('total_epochs')
    if total is not None and isinstance(warmup, int) and warmup >= total:
        # A run that was cut to a few epochs, to try it, keeps one after its warm-up: there is no schedule otherwise.
        train['scheduler'] = {**scheduler, 'warmup_epochs': int(total) - 1}
    # One process alone feeds all of its GPUs, each a batch of its own; of many processes each feeds one.
    num_devices = opt['world_size'] if opt['dist'] else max(1, opt['num_gpu'])
    num_samples = length_of(dataset) * (dataset.get('dataset_enlarge_ratio') or 1)
    epoch = train['iters_per_epoch'] = max(1, math.ceil(num_samples / (dataset['batch_size_per_gpu'] * num_devices)))
    for section, key, plain_key in given:
        value = int(section.pop(key))
        section[plain_key] = max(1, epoch // value) if key == 'times_per_epoch' else value * epoch
    if train.get('warmup_iter') == 0:
        train['warmup_iter'] = -1
