"""Training state: collecting it from a model, comparing it with options, and restoring it.

A training state is one self-contained file of tensors and plain values. In addition to BasicSR's keys (`epoch`, `iter`,
`optimizers`, `schedulers`) it holds the weights under `params` and `params_ema`, as in weights files, the best values,
the random states of all processes, the options that training depends on, and the loss scale of `fp16`. The position
within the epoch follows from the iteration, see `data.randomness.epoch_of`.

A resumed run applies its current options: learning rates are those of a run with these options from its beginning.
`misfits` reports incompatible options before training starts.
"""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from basicsr.utils import get_root_logger
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ast_plugin.data import randomness
from ast_plugin.errors import CheckpointError
from ast_plugin.models.optimizers import build_optimizer, restore_rates

_CHANGED_BY_STEPS = ('last_epoch', 'verbose')  # keys of a schedule's state, with those starting with an underscore


def collect(model: Any, epoch: int, iteration: int) -> dict[str, Any]:
    """Return the training state of a RestorationModel after an iteration. All processes must call this together."""
    here = randomness.capture(every_device=not model.opt['dist'])
    return {
        'epoch': epoch,
        'iter': iteration,
        **model.weights(),
        'optimizers': [optimizer.state_dict() for optimizer in model.optimizers],
        'schedulers': [scheduler.state_dict() for scheduler in model.schedulers],
        'best_metric_results': getattr(model, 'best_metric_results', {}),
        'options': model.recorded,
        'parts': {'scaler': model.step.precision.scaler.state_dict()},  # empty unless `fp16`
        'random': model.processes.gather([here]),
    }


def restore(model: Any, state: dict[str, Any], recorded: Mapping[str, Any] | None = None) -> None:
    """Restore a training state except for the weights, which BasicSR loads when it builds the model.

    States written by BasicSR's own models contain less; the log lists what is reset.

    Args:
        model: any BasicSR model.
        state: the training state; its `epoch` is adapted to epochs of another length.
        recorded: result of `record` for the model's options; None uses the options in the state.
    Raises:
        CheckpointError: if the state does not fit the model's optimisers, schedules or network.
    """
    old, logger = state.get('options'), get_root_logger()
    reported = changes(old, recorded)
    options = _optimizer_options(recorded)
    try:
        for number, (optimizer, saved) in enumerate(zip(model.optimizers, state['optimizers'], strict=True)):
            key, given = options[number] if number < len(options) else ('', {})
            before = given if recorded is None else _optimizer_options(old)[number][1] if old else None
            shapes = [parameter.shape for group in optimizer.param_groups for parameter in group['params']]
            if model.opt.get('force_resume') and _optimizer_misfit(given, saved, before, shapes):
                logger.warning(f'train.{key}: reset, because the state does not fit it')
            else:
                reported |= _restore_optimizer(optimizer, saved, f'train.{key}', given, before)
        for schedule, saved in zip(model.schedulers, state['schedulers'], strict=True):
            if not _restore_schedule(schedule, saved) and not old:
                reported['train.scheduler'] = 'learning rates follow the options'
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'the state of iteration {state["iter"]} does not fit the optimiser, schedule or network of the options: '
            f'{error}. Resume with the options it was trained with'
        ) from error
    if state.get('best_metric_results'):
        model.best_metric_results = _best_values(state['best_metric_results'], old, recorded, reported)
    if reported:
        lines = '; '.join(f'{key}: {change}' for key, change in reported.items())
        logger.warning(f'Options that differ from the training state apply from here on: {lines}')
    missing = []
    if hasattr(model, 'processes'):  # a RestorationModel
        scaler, scale = model.step.precision.scaler, state.get('parts', {}).get('scaler')
        if scale:
            scaler.load_state_dict(scale)
        elif scaler.is_enabled():
            missing.append('scaler')
        everyones = state.get('random', [])
        if model.processes.rank < len(everyones):
            randomness.restore(everyones[model.processes.rank])
        else:
            missing.append('random state')
    if missing:
        logger.warning(f'Not in the training state and therefore reset: {", ".join(missing)}')
    if iters_per_epoch := (model.opt.get('train') or {}).get('iters_per_epoch'):
        state['epoch'], _ = randomness.epoch_of(state['iter'], iters_per_epoch)


def record(opt: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that training depends on as plain values; paths of datasets are excluded."""
    train_set = opt.get('datasets', {}).get('train') or {}
    kept = {key: value for key, value in train_set.items() if not isinstance(value, str) and key != 'io_backend'}
    part = {key: opt.get(key) for key in ('model_type', 'network_g', 'train', 'manual_seed', 'num_gpu', 'world_size')}
    val = {key: (opt.get('val') or {}).get(key) for key in ('metrics', 'protocol', 'best_metric')}
    names = [options['name'] for key, options in (opt.get('datasets') or {}).items() if key.startswith('val')]
    record = {**part, 'datasets': {'train': kept}, 'val': val, 'validation_sets': names}
    return json.loads(json.dumps(record, default=repr))


def changes(old: Any, new: Any, where: str = '') -> dict[str, str]:
    """Return `old → new` for each option that differs, by dotted name; empty if either side is None."""
    if (old is None and not where) or (new is None and not where):
        return {}
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*old, *new] if where else [key for key in new if key in old]):
            found |= changes(old.get(key), new.get(key), f'{where}.{key}'.removeprefix('.'))
        return found
    return {} if old == new else {where: f'{_format_value(old)} → {_format_value(new)}'}


def _best_values(
    values: Mapping[str, Any], old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, reported: dict[str, str]
) -> dict[str, Any]:
    """Return the best values of a state that remain comparable.

    Args:
        values: best values of the state, by dataset and metric.
        old, new: results of `record` for the state and for the run, if known.
        reported: changes of options; values that are reset are added.
    """
    # The first dataset decides which weights are the best; the values have none for datasets without clean images.
    before, names = ((each or {}).get('validation_sets') or [*values] for each in (old, new))
    stale = {key.split('.')[2] for key in reported if key.startswith('val.metrics.')}
    if 'val.best_metric' in reported:
        stale.add(new['val']['best_metric'])
    if not reported.keys().isdisjoint(('val.protocol', 'val.metrics')) or names[0] != before[0]:
        stale = {metric for parts in values.values() for metric in parts}
    if stale:
        reported['best values'] = f'of {", ".join(sorted(map(str, stale)))} are reset'
    kept = {name: {k: v for k, v in values[name].items() if k not in stale} for name in names if name in values}
    return {name: parts for name, parts in kept.items() if parts}


def _format_value(value: Any) -> str:
    is_long = isinstance(value, Mapping) and len(str(value)) > 60
    return 'nothing' if value is None else f'{len(value)} options' if is_long else str(value)


def misfits(state: Mapping[str, Any], opt: Mapping[str, Any], parameters: Iterable[Tensor] | None = None) -> list[str]:
    """Return one line, starting with the option's name, for each option that is incompatible with a training state.

    Args:
        state: the training state.
        opt: options prepared for BasicSR.
        parameters: parameters of network_g, on any device; None if not known.
    """
    old, new = state.get('options'), record(opt)
    lines = []
    if new['train']['total_iter'] < state['iter']:
        lines.append(f'train.total_iter: {new["train"]["total_iter"]}, but the state is of iteration {state["iter"]}')
    lines += [f'{key}: {change}' for key, change in changes(old, new).items() if key == 'network_g.type']
    options, saved = _optimizer_options(new), state.get('optimizers') or []
    if len(saved) != len(options):
        lines.append(f'train.optim_*: {len(options)} optimisers, but the state has {len(saved)}')
    shapes = None if parameters is None else [tensor.shape for tensor in parameters if tensor.requires_grad]
    for number, ((key, given), part) in enumerate(zip(options, saved, strict=False)):
        before = _optimizer_options(old)[number][1] if old else None
        if reason := _optimizer_misfit(given, part, before, shapes if key == 'optim_g' else None):
            lines.append(f'train.{key}: {reason}')
    return lines


def _optimizer_options(recorded: Mapping[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """Return keys and options of the optimisers, in the order in which BasicSR's models build them."""
    train = (recorded or {}).get('train') or {}
    keys = sorted((key for key in train if key.startswith('optim_') and train[key]), key=lambda key: key != 'optim_g')
    return [(key, train[key]) for key in keys]


def _optimizer_misfit(
    options: Mapping[str, Any],
    saved: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    shapes: Sequence[Sequence[int]] | None,
) -> str | None:
    """Return why a saved state does not fit an optimiser with these options; None if no misfit is found.

    Args:
        options: with `type` and `lr`.
        saved: the optimiser's state.
        before: the options of the saved optimiser; None if not recorded.
        shapes: of the parameters that the state must fit; None if not known.
    """
    if before is not None and before['type'] != options['type']:
        return f'the type is {options["type"]}, but the state is of {before["type"]}'
    if shapes is not None and (reason := _shape_misfit(saved, shapes)):
        return reason
    if before == options or not saved['state']:
        return None
    trial = torch.zeros(1, requires_grad=True)
    trial.grad = torch.zeros(1)
    optimizer = build_optimizer(options['type'], [trial], **{k: v for k, v in options.items() if k != 'type'})
    optimizer.step()
    known, group = {key for part in saved['state'].values() for key in part}, saved['param_groups'][0]
    lacking = sorted(optimizer.state[trial].keys() - known)
    is_decoupled = optimizer.param_groups[0].get('decoupled_weight_decay')
    if lacking or group.get('decoupled_weight_decay', is_decoupled) != is_decoupled:
        what = f'which has no {", ".join(lacking)}' if lacking else 'whose weight_decay is applied differently'
        return f'{options["type"]} with these options cannot resume from the optimiser of the state, {what}'
    return None


def _shape_misfit(saved: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> str | None:
    """Return why a saved optimiser state does not fit parameters of these shapes; None if it fits."""
    count = sum(len(group['params']) for group in saved['param_groups'])
    if count != len(shapes):
        return f'network_g has {len(shapes)} trainable parameters, but the state has {count}'
    for number, part in saved['state'].items():
        want = shapes[number]
        for name, value in part.items():
            is_alike = isinstance(value, Tensor) and value.ndim == len(want) > 0
            if is_alike and name.startswith('exp_avg') and value.shape != want:
                return f'parameter {number} of network_g is {list(want)}, but {list(value.shape)} in the state'
    return None


def _restore_optimizer(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    where: str,
    options: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Load a state with changed options; return the changes if the state does not record its options."""
    groups, reported = [], {}
    names = ['initial_lr' if name == 'lr' else name for name in {**(before or {}), **options}]
    for group, values in zip(saved['param_groups'], optimizer.param_groups, strict=True):
        changed = {name: (_to_list(group.get(name)), _to_list(values[name])) for name in names if name in values}
        changed = {name: (old, new) for name, (old, new) in changed.items() if old != new}
        groups.append({**group, **{name: values[name] for name in changed}})
        if before is None:
            reported |= {
                f'{where}.{name.removeprefix("initial_")}': f'{old} → {new}' for name, (old, new) in changed.items()
            }
    # Where an optimiser keeps its state, for example on the device if `fused`, depends on the options.
    optimizer.load_state_dict({**saved, 'param_groups': groups})
    return reported


def _restore_schedule(schedule: LRScheduler, saved: Mapping[str, Any]) -> bool:
    """Load the state of a schedule; if its options differ, step to its iteration and return False."""
    if _step_independent(schedule.state_dict()) == _step_independent(saved):
        schedule.load_state_dict(saved)
        return True
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'Detected call of `lr_scheduler.step\(\)` before', UserWarning)
        while schedule.last_epoch < saved['last_epoch']:
            restore_rates(schedule)
            schedule.step()
    restore_rates(schedule)
    return False


def _step_independent(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a schedule's state that does not change from step to step."""
    return {k: _to_list(v) for k, v in state.items() if not k.startswith('_') and k not in _CHANGED_BY_STEPS}


def _to_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
