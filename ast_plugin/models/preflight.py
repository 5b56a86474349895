"""Checks of data, networks, weights, devices and disk before BasicSR renames or creates any folder."""

from __future__ import annotations

import copy
import gc
import importlib.util
import io
import itertools
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.error import URLError

import numpy as np
import torch
from basicsr.archs.vgg_arch import VGG_PRETRAIN_PATH
from basicsr.metrics import calculate_metric
from basicsr.models.sr_model import SRModel
from basicsr.utils import logger as basicsr_logger
from basicsr.utils import registry, tensor2img
from torch import Tensor, nn
from torch.utils.data import default_collate

from ast_plugin.archs.networks import required_multiple
from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import Checkpoint, read_checkpoint, read_state
from ast_plugin.data import randomness
from ast_plugin.data.lmdb.reader import check_shared, holds_pixels
from ast_plugin.errors import CheckpointError, DataError, OptionError, PluginError, first_line, one_line
from ast_plugin.evaluation.protocols import PROTOCOLS, read_protocol
from ast_plugin.evaluation.validator import name_of
from ast_plugin.models import run_state
from ast_plugin.models.optimizers import BASICSR_SCHEDULERS, SCHEDULERS, build_schedule, find_optimizer
from ast_plugin.models.restoration_model import RestorationModel
from ast_plugin.models.run_log import RunLog, TrainingProgress
from ast_plugin.models.training_step import batch_size, check_switches, compute_losses
from ast_plugin.ops import use_backend
from ast_plugin.options.runs import phase_of
from ast_plugin.options.sections import Registered
from ast_plugin.plugins import load_plugins

KINDS = ('arch', 'dataset', 'loss', 'metric', 'model')
_FOLDERS = {'experiments_root', 'results_root', 'models', 'training_states', 'log', 'visualization'}  # keys of `path`
_WANDB_OFFLINE = ('offline', 'dryrun', 'disabled')
_METRIC_IMAGE_SIDE = 192  # NIQE needs two blocks of 96
_LARGEST_METRIC_IMAGE = 512  # side of the centre crop of a validation image that is measured
_VALIDATED_SIDE = 64  # side of the corner of a validation image that is restored, see `any_size`
# Multiplications that take a CPU some seconds; larger networks are not run if no run follows the check.
_AFFORDABLE = 2e11
_HALF_ON_CPU = 20  # slowdown of half precision on a CPU relative to fp32


def load_registered() -> Registered:
    """Load the plugins and return everything that is registered."""
    failed = load_plugins()
    return Registered(
        by_kind={kind: dict(iter(getattr(registry, f'{kind.upper()}_REGISTRY'))) for kind in KINDS},
        schedulers=BASICSR_SCHEDULERS,
        own_schedulers=SCHEDULERS,
        protocols={name: tuple(protocol.metrics) for name, protocol in PROTOCOLS.items()},
        failed_plugins=failed,
        find_optimizer=find_optimizer,
    )


def check(
    opt: Mapping[str, Any], source: str, is_run: bool = True, samples: dict[str, Any] | None = None
) -> dict[str, Checkpoint]:
    """Check everything that a run needs, without writing anything.

    Finally, one sample of each dataset is passed through the model, see `_try_model`.

    Args:
        opt: options prepared for BasicSR.
        source: the option file's name in messages.
        is_run: whether a run follows; otherwise only shapes are passed through networks too large for this CPU.
        samples: first samples of datasets by key if already read; missing ones are added.
    Returns:
        The pretrained weights by the network's key.
    Raises:
        PluginError: for the first error found.
    """
    samples = {} if samples is None else samples
    _check_disk(opt)
    _check_device(opt, source)
    _check_logger(opt, source)
    state, losses = None, {}
    with _logger_untouched():
        if opt['is_train']:
            state = _check_resume(opt)
            losses = _check_training(opt['train'], source)
        if opt.get('val') is not None:
            _check_metrics(opt['val'], source)
        sharing = {key for key, options in opt['datasets'].items() if _knows_lmdbs(options['type'])}
        check_shared(f'{source}: datasets', opt['datasets'], sharing)
        for key, options in opt['datasets'].items():
            if key not in samples:
                samples[key] = _read_sample(f'{source}: datasets.{key}', options)
        networks = {key: _build_network(f'{source}: {key}', opt[key]) for key in opt if key.startswith('network_')}
        is_large = 'network_g' in networks and _is_large(networks['network_g'], opt, samples)
        if is_large:
            _try_shapes(networks['network_g'], losses, opt, source, samples['train'])
        if opt['is_train'] and 'network_g' in networks:
            if is_model_of(opt, RestorationModel):
                with _explain_errors(source, 'train'):
                    check_switches(opt, networks['network_g'], losses)
            if state is not None:
                _check_state(state, opt, networks['network_g'], source)
        checkpoints = _check_weights(opt, networks)
        samples = {key: samples[key] for key in opt['datasets']}
        if samples and (is_run or not is_large):
            if 'network_g' in checkpoints and opt['path'].get('param_key_g') is None:  # SRModel's default is params
                opt = {**opt, 'path': {**opt['path'], 'param_key_g': checkpoints['network_g'].param_key}}
            _try_model(opt, source, samples)
        return checkpoints


def _logger_untouched() -> AbstractContextManager:
    """Prevent BasicSR from configuring its logger, which is done on first use, before the log file exists."""
    return patch.dict(basicsr_logger.initialized_logger, basicsr=True)


@contextmanager
def _explain_errors(
    where: str, what: str, failure: str = 'cannot be built from these options', kind: type[PluginError] = OptionError
) -> Iterator[None]:
    """Convert any exception raised while building from options into a message that names the option section."""
    try:
        yield
    except PluginError as error:
        message = str(error)
        key = where.rpartition(' ')[2]  # some messages already begin with the key
        message = message if where in message else f'{where}: {message.removeprefix(f"{key}: ")}'
        raise type(error)(message) from error
    except KeyError as error:
        raise kind(f'{where}: {what} needs the key {error}, which is missing') from error
    except URLError as error:
        raise kind(
            f'{where}: {what} cannot download its weights: {error.reason}. The weights of a perceptual loss can be '
            f'placed in {VGG_PRETRAIN_PATH} of the working directory'
        ) from error
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
        raise OptionError(f'{folder}: cannot be created: {error.strerror} ({existing}); change --root') from None


def _check_device(opt: Mapping[str, Any], source: str) -> None:
    """Reject a number of GPUs that is not available: BasicSR does not check it, and multiplies the batch by it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    is_one_of_many = count and not {'WORLD_SIZE', 'SLURM_PROCID'}.isdisjoint(os.environ)  # each process uses one
    if opt['num_gpu'] > count and not is_one_of_many:
        have = str(count) if count else 'no GPU that this torch can use (CUDA)'
        raise OptionError(
            f'{source}: num_gpu: {opt["num_gpu"]}, but this machine has {have}: set num_gpu to auto for all GPUs, '
            'or to 0 for the CPU'
        )
    if opt.get('device') == 'mps' and opt['dist']:
        raise OptionError(f'{source}: device: mps supports one process only; remove --launcher, or set device to cpu')


def _check_logger(opt: Mapping[str, Any], source: str) -> None:
    """Check logger options that BasicSR would assert or import only after the run has started."""
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
        raise OptionError(f'{source}: logger.wandb requires TensorBoard logs: set logger.use_tb_logger to true')
    try:
        import wandb
    except ImportError:
        raise OptionError(
            f'{source}: logger.wandb needs the package wandb, which is not installed: '
            'pip install "ast_plugin[wandb]", or remove logger.wandb'
        ) from None
    if os.environ.get('WANDB_MODE') in _WANDB_OFFLINE or os.environ.get('RANK', '0') != '0':
        return
    try:  # would otherwise prompt for the API key later
        is_logged_in, reason = wandb.login() or wandb.setup().settings.mode in _WANDB_OFFLINE, ''
    except Exception as error:  # the types of exceptions differ between versions
        is_logged_in, reason = False, f' ({first_line(error)})'
    if not is_logged_in:
        raise OptionError(
            f'{source}: logger.wandb: this machine is not logged in to Weights & Biases{reason}: run `wandb login`, '
            'set WANDB_API_KEY, log locally with WANDB_MODE=offline, or remove logger.wandb'
        )


def _check_resume(opt: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the training state that the run resumes from, or None."""
    state = opt['path'].get('resume_state')
    if state is None:
        return None
    if not Path(state).is_file():
        what = 'expected a .state file, got the folder' if Path(state).is_dir() else 'no such file:'
        raise CheckpointError(f'path.resume_state: {what} {state}; --auto_resume finds the state of the run itself')
    content = read_state(state)
    # BasicSR's states need weights files in the experiment's folder; the plugin's states contain the weights.
    for key in [key for key in opt if key.startswith('network_')]:
        if key in (opt['path'].get('ignore_resume_networks') or ()) or (key == 'network_g' and 'params' in content):
            continue
        weights = Path(opt['path']['models'], f'net_{key.removeprefix("network_")}_{content["iter"]}.pth')
        if not weights.is_file():
            hint = 'use the same experiment name'
            raise CheckpointError(f'path.resume_state: {state} needs {weights}, which does not exist; {hint}')
    kinds = {'epoch': int, 'optimizers': list, 'schedulers': list}
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise CheckpointError(f'path.resume_state: {state} lacks {", ".join(wrong)}: expected a full training state')
    return content


def _check_training(train: Mapping[str, Any], source: str) -> dict[str, nn.Module]:
    """Build optimisers, schedules and losses to detect wrong values; return the losses.

    The perceptual loss is excluded, because it reads or downloads the weights of a VGG network.
    """
    for key, options in train.items():
        if not key.startswith('optim_') or not options:
            continue
        parameters = [torch.zeros(1, requires_grad=True)]
        optimizer = _build(f'{source}: train.{key}', find_optimizer(options['type']), options, params=parameters)
        name = (train.get('scheduler') or {}).get('type')
        if name in {*SCHEDULERS, *BASICSR_SCHEDULERS}:  # third-party models may have others
            with _explain_errors(f'{source}: train.scheduler', name):
                build_schedule(optimizer, train)
    return {
        key: _build(f'{source}: train.{key}', registry.LOSS_REGISTRY.get(options['type']), options)
        for key, options in train.items()
        if key.endswith('_opt') and key != 'perceptual_opt' and options
    }


def _build(where: str, target: Callable, options: Mapping[str, Any], **given: Any) -> Any:
    with _explain_errors(where, options['type']):
        return target(**given, **_arguments(options))


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({key: value for key, value in options.items() if key != 'type'})


def _check_metrics(val: Mapping[str, Any], source: str) -> None:
    """Measure a noise image with each metric, as wrong options would otherwise fail only at the first validation."""
    with _explain_errors(f'{source}: val.protocol', 'protocol'):
        protocol = read_protocol(val.get('protocol'))
    metrics = val.get('metrics') or {}
    if not metrics and (val.get('metrics') is not None or not protocol.metrics):
        other = '' if protocol.metrics else f', and protocol {protocol.type} defines none'
        logging.getLogger('basicsr').warning(f'{source}: nothing is measured: val.metrics has no metric{other}')
    side = _metric_image_side(metrics)
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    for key, options in metrics.items():
        target = registry.METRIC_REGISTRY.get(options['type'])
        # Third-party metrics may require data from their own models.
        if target.__module__.split('.')[0] in ('basicsr', 'ast_plugin'):
            with _explain_errors(f'{source}: val.metrics.{key}', options['type'], 'cannot measure with these options'):
                target(img=image, img2=image, **_arguments(options))


def _metric_image_side(metrics: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the side of an image that is large enough for all metrics after cropping their borders."""
    borders = [options.get('crop_border') for options in metrics.values()]
    return _METRIC_IMAGE_SIDE + 2 * max([0, *(border for border in borders if isinstance(border, int))])


def _knows_lmdbs(dataset_type: str) -> bool:
    """Return whether a dataset is one of the plugin's, which share LMDBs and read pixels."""
    options_type = getattr(registry.DATASET_REGISTRY.get(dataset_type), 'options_type', None)
    return 'io_backend' in getattr(options_type, 'model_fields', ())


def _read_sample(where: str, options: Mapping[str, Any]) -> Any:
    """Open the dataset and read its first sample."""
    dataset = _open_dataset(where, options)
    with _explain_errors(where, options['type'], f'cannot read the sample of {name_of(dataset, 0)}', DataError):
        return dataset[(0, 0) if getattr(dataset, 'index_carries_epoch', False) else 0]


def _open_dataset(where: str, options: Mapping[str, Any]) -> Any:
    """Build a dataset and check that it is not empty.

    LMDBs that hold pixels are rejected for datasets that decode images.
    """
    dataset_type = registry.DATASET_REGISTRY.get(options['type'])
    with _explain_errors(where, options['type'], 'cannot read its data', DataError):
        if (options.get('io_backend') or {}).get('type') == 'lmdb' and not _knows_lmdbs(options['type']):
            for key, folder in options.items():
                if key.startswith('dataroot') and isinstance(folder, str) and holds_pixels(folder):
                    raise DataError(
                        f'{options["type"]} reads LMDBs of PNG files, but {key}, {folder}, holds pixels. Set type: '
                        f'PairsDataset, or create the LMDB with `basicsr data lmdb --encoding png`'
                    )
        dataset = dataset_type(copy.deepcopy(options))
        if len(dataset) == 0:
            raise DataError(f'{where}: {options["type"]} finds no data')
    return dataset


def count_samples(where: str, options: Mapping[str, Any]) -> int:
    """Return the number of samples of a dataset; raise PluginError, starting with `where`, if it cannot be used."""
    with _logger_untouched():
        return len(_open_dataset(where, options))


def check_handover(before: Mapping[str, Any], after: Mapping[str, Any], source: str) -> None:
    """Raise PluginError if the stage with options `after` cannot load the weights of the stage with `before`."""
    if 'network_g' not in before or 'network_g' not in after or not after['path'].get('strict_load_g', True):
        return
    with _logger_untouched():
        old, new = (_build_network(f'{source}: network_g', opt['network_g']) for opt in (before, after))
    weights = Checkpoint(Path(f'{source}: network_g, which starts from the stage before'), old.state_dict(), None, None)
    load_into(new, weights, assign=True)


def _check_state(state: Mapping[str, Any], opt: Mapping[str, Any], network: nn.Module, source: str) -> None:
    """Reject options incompatible with a training state: another network or optimiser, or an end already passed."""
    path = opt['path']['resume_state']
    if 'params' in state and 'network_g' not in (opt['path'].get('ignore_resume_networks') or ()):
        try:
            load_into(network, Checkpoint(Path(path), state['params']), assign=True)
        except CheckpointError as error:
            others = run_state.changes(state.get('options'), run_state.record(opt)).items()
            others = [f'{key}: {change}' for key, change in others if key.startswith('network_g')]
            raise OptionError(
                f'{source}: network_g differs from that of the state: {"; ".join([*others, str(error)])}. Use the '
                "state's options, or start with path.pretrain_network_g and strict_load_g: false"
            ) from error
    lines = run_state.misfits(state, opt, network.parameters())
    if lines and not opt.get('force_resume'):
        raise OptionError(
            f'{source}: the run cannot resume from {path} with these options:\n  '
            + '\n  '.join(lines)
            + "\nUse the state's options, name another run, or resume anyway with --force_resume, which resets the "
            'parts that do not fit'
        )


def _build_network(where: str, options: Mapping[str, Any]) -> nn.Module:
    """Build a network on the meta device, or on the CPU if its constructor does not support that."""
    network_type = registry.ARCH_REGISTRY.get(options['type'])
    with _explain_errors(where, options['type']):
        try:
            with torch.device('meta'):
                return network_type(**_arguments(options))
        except (NotImplementedError, RuntimeError):
            # Some constructors compute with tensors; the second attempt also reports errors of the options.
            return network_type(**_arguments(options))


def _check_weights(opt: Mapping[str, Any], networks: Mapping[str, nn.Module]) -> dict[str, Checkpoint]:
    """Load the pretrained weights of the networks unless a training state replaces them."""
    path, checkpoints = opt['path'], {}
    for key, network in networks.items():
        letter = key.removeprefix('network_')
        weights = path.get(f'pretrain_{key}')
        if weights and not path.get('resume_state'):
            checkpoints[key] = read_checkpoint(weights, path.get(f'param_key_{letter}'))
            load_into(network, checkpoints[key], strict=path.get(f'strict_load_{letter}', True), assign=True)
    return checkpoints


def is_model_of(opt: Mapping[str, Any], kind: type) -> bool:
    """Return whether the model of a run is a subclass of `kind`."""
    model = registry.MODEL_REGISTRY.get(opt['model_type'])
    return isinstance(model, type) and issubclass(model, kind)


def _is_large(network: nn.Module, opt: Mapping[str, Any], samples: Mapping[str, Any]) -> bool:
    """Return whether a step would take a CPU more than some seconds, estimated from parameters and pixels."""
    sample = samples.get('train')
    if _is_on_gpu(opt) or not isinstance(sample, dict) or 'lq' not in sample:
        return False
    work = 6 * sum(parameter.numel() for parameter in network.parameters()) * sample['lq'][..., 0, :, :].numel()
    is_half = (opt['train'].get('precision') or 'fp32') != 'fp32'
    return work * _num_tried(opt) * (_HALF_ON_CPU if is_half else 1) > _AFFORDABLE


def _is_on_gpu(opt: Mapping[str, Any]) -> bool:
    return bool(opt['num_gpu']) or opt.get('device') == 'mps'


def _num_tried(opt: Mapping[str, Any]) -> int:
    """Return the batch size of the trial: the full batch on a GPU, to check its memory, else at most two images."""
    batch = batch_size(opt) or 1
    return batch if _is_on_gpu(opt) else min(2, max(1, batch // (opt['train'].get('accumulate') or 1)))


def _try_shapes(
    network: nn.Module, losses: Mapping[str, nn.Module], opt: Mapping[str, Any], source: str, sample: Mapping[str, Any]
) -> None:
    """Pass a tensor with the shape of a training sample through network and losses, on meta if supported."""
    if not is_model_of(opt, SRModel) or 'gt' not in sample:
        return
    device = next((parameter.device for parameter in network.parameters()), torch.device('cpu'))
    lq, gt = (torch.zeros(_num_tried(opt), *sample[key].shape, device=device) for key in ('lq', 'gt'))
    losses = {key: copy.deepcopy(loss).to(device) for key, loss in losses.items()}
    try:
        with _explain_sample(source, 'train', network, lq), torch.no_grad(), use_backend('reference'):
            compute_losses(losses, network(lq), gt)
    except OptionError as error:
        if 'meta' not in str(error):  # unsupported on meta tensors, not an error of the sample
            raise


def _try_model(opt: Mapping[str, Any], source: str, samples: Mapping[str, Any]) -> None:
    """Pass a sample of each dataset through the model as in a run: one training step, and one validation each.

    The step uses the whole batch on a GPU and one or two images on a CPU, at the configured patch size. The validation
    restores a corner of its image and measures the centre. Nothing is logged; output goes to a temporary folder.
    """
    opt = copy.deepcopy(dict(opt))
    count = _num_tried(opt) if opt['is_train'] else 0
    with tempfile.TemporaryDirectory() as folder, randomness.preserved(), use_backend(opt.get('backend')), _silenced():
        opt['path'] |= dict.fromkeys(_FOLDERS & opt['path'].keys(), folder)
        if opt['path'].get('resume_state'):  # contains the weights
            opt['path'] |= {key: None for key in opt['path'] if key.startswith('pretrain_network_')}
        if opt['is_train']:
            train = opt['train']
            train.pop('compile', None)  # would take longer than everything else
            if not _is_on_gpu(opt):
                train['accumulate'] = None
            if train.get('mixing'):
                train['mixing'] |= {'start_epoch': 1, 'probability': 1.0}
        if opt['num_gpu']:
            torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count())
        with _explain_errors(source, opt['model_type']):
            model = registry.MODEL_REGISTRY.get(opt['model_type'])(opt)
        if isinstance(model, RestorationModel):
            model.run_log = RunLog(None)
            model.progress = TrainingProgress(1, 0, logging.getLogger('basicsr'), is_shown=False)
        network = getattr(model, 'net_g', None)
        if isinstance(model, SRModel) and opt.get('val'):
            for key, sample in samples.items():
                if phase_of(key) != 'train' and isinstance(sample, dict) and isinstance(sample.get('lq'), Tensor):
                    with _explain_sample(source, key, network, sample['lq'][None]):
                        _try_validation(model, opt, sample, _iterate_later_samples(source, key, opt))
        if 'train' in samples and count:
            batch = default_collate([samples['train']] * count)
            with _explain_sample(source, 'train', network, batch.get('lq')):
                model.update_learning_rate(1, warmup_iter=opt['train'].get('warmup_iter', -1))
                model.feed_data(batch)
                model.optimize_parameters(1)
        del model, network
    gc.collect()
    if opt['num_gpu']:
        torch.cuda.empty_cache()


def _iterate_later_samples(source: str, key: str, opt: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the samples of a validation set after the first, skipping unreadable ones, which are reported later."""
    dataset = _open_dataset(f'{source}: datasets.{key}', opt['datasets'][key])
    for number in range(1, len(dataset)):
        with suppress(Exception):
            yield dataset[number]


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress output and warnings, which the run itself would repeat."""
    logger = logging.getLogger('basicsr')
    with patch.object(logger, 'disabled', True), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


@contextmanager
def _explain_sample(source: str, key: str, network: nn.Module | None, lq: Tensor | None) -> Iterator[None]:
    """Convert errors into messages that name the dataset, its sample and a fitting size."""
    shown = '' if lq is None else f' {list(lq.shape)}'
    what = 'network, losses and optimiser' if key == 'train' else 'network and metrics'
    try:
        with _explain_errors(f'{source}: datasets.{key}', f'its first sample{shown}', f'does not pass through {what}'):
            yield
    except DataError as error:  # the data was read, so an option does not fit it
        raise OptionError(str(error)) from error
    except PluginError as error:
        hint = _size_hint(network, lq) if key == 'train' else ''
        raise type(error)(f'{error}{hint}') from error


def _size_hint(network: nn.Module | None, lq: Tensor | None) -> str:
    if network is None or lq is None or lq.ndim != 4:
        return ''
    bare = getattr(network, 'module', network)
    with suppress(OptionError):
        multiple = required_multiple(bare, lq.shape[1])
        if any(side % multiple for side in lq.shape[-2:]):
            return f'; {type(bare).__name__} is trained on multiples of {multiple} pixels: set gt_size to a multiple'
    return ''


def _try_validation(
    model: SRModel, opt: Mapping[str, Any], sample: Mapping[str, Any], later: Iterable[Mapping[str, Any]]
) -> None:
    """Restore a corner of the first validation image and measure; see `_try_metrics` for later images."""
    height, width = sample['lq'].shape[-2:]
    corner = sample['lq'][..., :_VALIDATED_SIDE, :_VALIDATED_SIDE]
    with patch.object(model, 'is_train', False):
        model.feed_data(default_collate([{**sample, 'lq': corner}]))
        model.test()
        result = model.get_current_visuals()['result']
    is_ours = isinstance(model, RestorationModel)
    metrics = model.validator.metrics if is_ours else opt['val'].get('metrics')
    has_clean = isinstance(sample.get('gt'), Tensor)
    if result.ndim != 4 or not metrics or (is_ours and not has_clean):
        return
    if not has_clean:
        for options in metrics.values():
            calculate_metric({'img': tensor2img(result)}, options)
        return
    scale = result.shape[-1] // corner.shape[-1]
    size, clean = (scale * height, scale * width), tuple(sample['gt'].shape[-2:])
    if size != clean:
        raise DataError(
            f'the network restores an image of {width}x{height} to {size[1]}x{size[0]}, but its clean image has '
            f'{clean[1]}x{clean[0]}: they cannot be compared (scale is {opt["scale"]})'
        )
    _try_metrics(model, metrics, result.shape[1], itertools.chain([sample], later))


def _try_metrics(
    model: SRModel, metrics: Mapping[str, Mapping[str, Any]], channels: int, samples: Iterable[Mapping[str, Any]]
) -> None:
    """Measure the centre of clean images against themselves, until each metric has measured one.

    RestorationModel skips an image that is too small for a metric, so later images are tried in that case.
    """
    enough, waiting, failures = _metric_image_side(metrics), dict(metrics), {}
    most = max(_LARGEST_METRIC_IMAGE, enough)
    for sample in samples:
        top, left = (max(0, side - most) // 2 for side in sample['gt'].shape[-2:])
        clean = sample['gt'][..., top : top + most, left : left + most].float()
        restored = clean if len(clean) == channels else clean.mean(0, True).expand(channels, -1, -1)
        pair = restored[None], clean[None]
        for name, options in list(waiting.items()):
            try:
                if isinstance(model, RestorationModel):
                    value = model.validator.protocol.measure(*pair, {name: options})[name]
                else:
                    value = calculate_metric(dict(zip(('img', 'img2'), map(tensor2img, pair), strict=True)), options)
                if math.isnan(value):
                    raise DataError(f'{name} is NaN for an image of {clean.shape[-1]}x{clean.shape[-2]}')
                del waiting[name]
            except Exception as error:  # any metric
                if not isinstance(model, RestorationModel) or min(clean.shape[-2:]) >= enough:
                    raise
                failures.setdefault(name, error)
        if not waiting:
            return
    name = next(iter(waiting))
    raise DataError(f'no image is large enough for {name}: {one_line(failures[name])}')
