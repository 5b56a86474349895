"""What can be found wrong before BasicSR renames old folders and makes new ones: data, networks, weights, disk."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basicsr.utils import logger as basicsr_logger
from torch import nn

from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import Checkpoint, read_checkpoint, read_state
from ast_plugin.data.lmdb.reader import holds_pixels
from ast_plugin.errors import CheckpointError, DataError, OptionError, PluginError, first_line
from ast_plugin.evaluation.protocols import read_protocol
from ast_plugin.models import run_state
from ast_plugin.models.restoration_model import RestorationModel
from ast_plugin.models.training_step import check_switches
from ast_plugin.options.validation import Registered

_WANDB_OFFLINE = ('offline', 'dryrun', 'disabled')
_METRIC_IMAGE_SIDE = 192  # NIQE needs two blocks of 96


def check(opt: Mapping[str, Any], registered: Registered, source: str) -> dict[str, Checkpoint]:
    """Try everything that a run of prepared options will need, and write nothing.

    Args:
        opt: options prepared for BasicSR.
        registered: what the names in them mean.
        source: the option file's name in messages.
    Returns:
        The weights that networks start from, by the network's key.
    Raises:
        PluginError: naming the first thing found wrong.
    """
    _check_disk(opt)
    _check_logger(opt, source)
    state = None
    with _logger_untouched():
        if opt['is_train']:
            state = _check_resume(opt)
            _check_training(opt['train'], registered, source)
        _check_metrics(opt.get('val') or {}, registered, source)
        for key, options in opt['datasets'].items():
            _check_dataset(f'{source}: datasets.{key}', options, registered)
        return _check_networks(opt, registered, source, state)


@contextmanager
def _logger_untouched() -> Iterator[None]:
    """BasicSR gives its logger handlers when it is first asked for: now would be too early for the log file."""
    known = basicsr_logger.initialized_logger
    present = dict(known)
    known['basicsr'] = True
    try:
        yield
    finally:
        known.clear()
        known.update(present)


@contextmanager
def _explained(
    where: str, what: str, failure: str = 'cannot be made of these options', kind: type[PluginError] = OptionError
) -> Iterator[None]:
    """Whatever somebody's code raises about the options it got becomes a message that says which they are."""
    try:
        yield
    except PluginError as error:
        message = str(error)
        key = where.rpartition(' ')[2]  # some messages begin with it, as they are used without a file, too
        message = message if where in message else f'{where}: {message.removeprefix(f"{key}: ")}'
        raise type(error)(message) from error
    except KeyError as error:
        raise kind(f'{where}: {what} needs the key {error}, which is not there') from error
    except OSError as error:
        raise kind(f'{where}: {what}: {error.strerror or error}: {error.filename or ""}'.rstrip(': ')) from error
    except Exception as error:
        raise kind(f'{where}: {what} {failure}: {type(error).__name__}: {first_line(error)}') from error


def _check_disk(opt: Mapping[str, Any]) -> None:
    folder = Path(opt['path']['experiments_root' if opt['is_train'] else 'results_root'])
    existing = next(parent for parent in folder.parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OptionError(f'{folder}: cannot be made: {error.strerror} ({existing}); choose another --root') from None


def _check_logger(opt: Mapping[str, Any], source: str) -> None:
    """BasicSR asserts or imports too late for a clear word."""
    logger = opt.get('logger') or {}
    if not opt['is_train'] or 'debug' in opt['name']:
        return
    if logger.get('use_tb_logger') and importlib.util.find_spec('tensorboard') is None:
        raise OptionError(
            f'{source}: logger.use_tb_logger needs the package tensorboard, which is not installed: '
            'pip install tensorboard, or set it to false'
        )
    if not (logger.get('wandb') or {}).get('project'):
        return
    if not logger.get('use_tb_logger'):
        raise OptionError(f'{source}: logger.wandb takes over what TensorBoard gets: set logger.use_tb_logger to true')
    try:
        import wandb
    except ImportError:
        raise OptionError(
            f'{source}: logger.wandb needs the package wandb, which is not installed: '
            'pip install "ast_plugin[wandb]", or leave logger.wandb out'
        ) from None
    if os.environ.get('WANDB_MODE') in _WANDB_OFFLINE or os.environ.get('RANK', '0') != '0':
        return
    try:  # what would ask for the key later does so now
        is_logged_in = wandb.login() or wandb.setup().settings.mode in _WANDB_OFFLINE
    except Exception:  # of many kinds, some of which only some versions have
        is_logged_in = False
    if not is_logged_in:
        raise OptionError(
            f'{source}: logger.wandb: this machine is not logged in to Weights & Biases: give `wandb login`, set '
            'WANDB_API_KEY, keep the run here with WANDB_MODE=offline, or leave logger.wandb out'
        )


def _check_resume(opt: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state that the run goes on from, None for none."""
    state = opt['path'].get('resume_state')
    if state is None:
        return None
    if not Path(state).is_file():
        raise CheckpointError(f'path.resume_state: no such file: {state}')
    content = read_state(state)
    # BasicSR's own states have the weights that belong to them in the experiment of the run's name, ours in themselves.
    for key in [key for key in opt if key.startswith('network_')]:
        if key in (opt['path'].get('ignore_resume_networks') or ()) or (key == 'network_g' and 'params' in content):
            continue
        weights = Path(opt['path']['models'], f'net_{key.removeprefix("network_")}_{content["iter"]}.pth')
        if not weights.is_file():
            hint = 'is the name of the experiment the same?'
            raise CheckpointError(f'path.resume_state: {state} needs {weights}, which is not there; {hint}')
    return content


def _check_training(train: Mapping[str, Any], registered: Registered, source: str) -> None:
    """Build losses, optimisers and schedules: wrong values show only then."""
    _build_losses(train, registered, source)
    for key, options in train.items():
        if not key.startswith('optim_') or not options:
            continue
        parameters = [torch.zeros(1, requires_grad=True)]
        target = registered.find_optimizer(options['type'])
        optimizer = _call(f'{source}: train.{key}', target, options, params=parameters)
        schedule = train.get('scheduler') or {}
        target = {**registered.own_schedulers, **registered.schedulers}.get(schedule.get('type'))
        if target is not None:
            given = {name: train[name] for name in ('total_iter', 'iters_per_epoch') if train.get(name) is not None}
            own = {name: given[name] for name in given if name in inspect.signature(target).parameters} | schedule
            _call(f'{source}: train.scheduler', target, own, optimizer=optimizer)


def _build_losses(train: Mapping[str, Any], registered: Registered, source: str) -> dict[str, nn.Module]:
    """The losses by their keys, but for the perceptual one, which reads, or even fetches, the weights of a VGG."""
    return {
        key: _call(f'{source}: train.{key}', registered.get('loss', options['type']), options)
        for key, options in train.items()
        if key.endswith('_opt') and key != 'perceptual_opt' and options
    }


def _call(where: str, target: Callable, options: Mapping[str, Any], **given: Any) -> Any:
    with _explained(where, options['type']):
        return target(**given, **_arguments(options))


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in options.items() if key != 'type'})


def _check_metrics(val: Mapping[str, Any], registered: Registered, source: str) -> None:
    """Measure noise: a metric that stumbles over its options would do so hours later."""
    with _explained(f'{source}: val.protocol', 'protocol'):
        read_protocol(val.get('protocol'))
    image = np.random.default_rng(0).integers(0, 256, (_METRIC_IMAGE_SIDE, _METRIC_IMAGE_SIDE, 3), dtype=np.uint8)
    for key, options in (val.get('metrics') or {}).items():
        target = registered.get('metric', options['type'])
        # Others' metrics may want other data of their own models.
        if target.__module__.split('.')[0] in ('basicsr', 'ast_plugin'):
            with _explained(f'{source}: val.metrics.{key}', options['type'], 'cannot measure with these options'):
                target(img=image, img2=image, **_arguments(options))


def _check_dataset(where: str, options: Mapping[str, Any], registered: Registered) -> None:
    """Find the data, and read the first sample."""
    dataset_type = registered.get('dataset', options['type'])
    with _explained(where, options['type'], 'cannot read its data', DataError):
        _refuse_pixels(dataset_type, options)
        dataset = _open_dataset(where, options, registered)
        dataset[(0, 0) if getattr(dataset_type, 'index_carries_epoch', False) else 0]


def _open_dataset(where: str, options: Mapping[str, Any], registered: Registered) -> Any:
    """Build a dataset, and see that there is something in it."""
    with _explained(where, options['type'], 'cannot read its data', DataError):
        dataset = registered.get('dataset', options['type'])(copy.deepcopy(options))
        if len(dataset) == 0:
            raise DataError(f'{where}: {options["type"]} finds no data')
    return dataset


def _refuse_pixels(dataset_type: type, options: Mapping[str, Any]) -> None:
    """Raise DataError if a dataset of others, which decodes images, is given an LMDB of pixels."""
    is_lmdb = (options.get('io_backend') or {}).get('type') == 'lmdb'
    if not is_lmdb or 'io_backend' in getattr(getattr(dataset_type, 'options_type', None), 'model_fields', ()):
        return
    for key, folder in options.items():
        if key.startswith('dataroot') and isinstance(folder, str) and holds_pixels(folder):
            raise DataError(
                f'{options["type"]} reads LMDBs of PNG files, and {key}, {folder}, holds pixels. Set type: '
                f'PairsDataset, or write the LMDB with `basicsr data lmdb --encoding png`'
            )


def count_samples(where: str, options: Mapping[str, Any], registered: Registered) -> int:
    """How many samples a dataset has, as it counts them; PluginError, beginning with `where`, if it cannot be used."""
    with _logger_untouched():
        return len(_open_dataset(where, options, registered))


def check_handover(before: Mapping[str, Any], after: Mapping[str, Any], registered: Registered, source: str) -> None:
    """Raise PluginError if a stage of options `after` cannot start from the weights of the one with `before`."""
    if 'network_g' not in before or 'network_g' not in after or not after['path'].get('strict_load_g', True):
        return
    with _logger_untouched():
        old, new = (_build_network(registered, opt['network_g']) for opt in (before, after))
    weights = Checkpoint(Path(f'{source}: network_g, which starts from the stage before'), old.state_dict(), None, None)
    load_into(new, weights, assign=True)


def _check_state(state: Mapping[str, Any], opt: Mapping[str, Any], network: nn.Module, source: str) -> None:
    """Refuse what a resumed run could not follow: another network, another optimiser, an end that lies behind it."""
    path = opt['path']['resume_state']
    if 'params' in state and 'network_g' not in (opt['path'].get('ignore_resume_networks') or ()):
        try:
            load_into(network, Checkpoint(Path(path), state['params']), assign=True)
        except CheckpointError as error:
            others = run_state.changes(state.get('options'), run_state.record(opt)).items()
            others = [f'{key}: {change}' for key, change in others if key.startswith('network_g')]
            raise OptionError(
                f'{source}: network_g is another one than that of the state: {"; ".join([*others, str(error)])}. Give '
                "the state's, or begin with path.pretrain_network_g and strict_load_g: false"
            ) from error
    lines = run_state.misfits(state, opt, network.parameters())
    if lines and not opt.get('force_resume'):
        raise OptionError(
            f'{source}: the run cannot go on from {path} with these options:\n  '
            + '\n  '.join(lines)
            + '\nGive those of the state, name another run, or go on all the same with --force_resume: what does not '
            'fit starts afresh'
        )


def _check_networks(
    opt: Mapping[str, Any], registered: Registered, source: str, state: Mapping[str, Any] | None
) -> dict[str, Checkpoint]:
    checkpoints = {}
    model = registered.get('model', opt['model_type'])
    for key in [key for key in opt if key.startswith('network_')]:
        with _explained(f'{source}: {key}', opt[key]['type']):
            network = _build_network(registered, opt[key])
        if key == 'network_g' and opt['is_train'] and isinstance(model, type) and issubclass(model, RestorationModel):
            losses = _build_losses(opt['train'], registered, source)
            with _explained(source, 'train'):
                check_switches(opt, network, losses)
        if key == 'network_g' and state is not None:
            _check_state(state, opt, network, source)
        letter = key.removeprefix('network_')
        weights = opt['path'].get(f'pretrain_{key}')
        # When a run is resumed, BasicSR puts the weights of the state in the place of these.
        if not weights or opt['path'].get('resume_state'):
            continue
        param_key = opt['path'].get(f'param_key_{letter}')
        checkpoints[key] = read_checkpoint(weights, param_key)
        load_into(network, checkpoints[key], strict=opt['path'].get(f'strict_load_{letter}', True), assign=True)
    return checkpoints


def _build_network(registered: Registered, options: Mapping[str, Any]) -> nn.Module:
    """Build a network without memory for its weights, where its constructor can do that."""
    network_type = registered.get('arch', options['type'])
    try:
        with torch.device('meta'):
            return network_type(**_arguments(options))
    except (NotImplementedError, RuntimeError):
        # Some constructors compute with tensors; on the second try a fault of the options shows as what it is.
        return network_type(**_arguments(options))
