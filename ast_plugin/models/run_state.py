"""All that a run is, as one file that needs no other: collected from a model, compared with options, and put back.

Beside BasicSR's keys (`epoch`, `iter`, `optimizers`, `schedulers`) a state holds the weights under `params` and
`params_ema`, where readers of weights files find them, the best values, each process's random generators, the options
that training depends on, and the states of the parts in the model's `stateful`: tensors and plain values. The place in
the epoch's order follows from the iteration, see `data.randomness.epoch_of`.

A run that is resumed follows its options: rates are those of a run that had them from its beginning. What cannot be
followed is found by `misfits` before anything starts.
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

_CHANGED_BY_STEPS = ('last_epoch', 'verbose')  # of a schedule, as all names that begin with an underscore


def collect(model: Any, epoch: int, iteration: int) -> dict[str, Any]:
    """Return the state of a RestorationModel after an iteration. All processes of a run must call this together."""
    here = randomness.capture(every_device=not model.opt['dist'])
    return {
        'epoch': epoch,
        'iter': iteration,
        **model.weights(),
        'optimizers': [optimizer.state_dict() for optimizer in model.optimizers],
        'schedulers': [scheduler.state_dict() for scheduler in model.schedulers],
        'best_metric_results': getattr(model, 'best_metric_results', {}),
        'options': model.recorded,
        'parts': {name: part.state_dict() for name, part in model.stateful.items()},
        'random': model.processes.gather([here]),
    }


def restore(model: Any, state: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> None:
    """Put back all but the weights, which BasicSR has loaded when it built the model.

    States that BasicSR's own models wrote have less in them; then a line in the log says what starts afresh.

    Args:
        model: any of BasicSR's.
        state: of a run.
        recorded: what `record` says of the options that the model is built by; None takes the state's.
    Raises:
        CheckpointError: if the state is of another optimiser or network than the model has.
    """
    old, logger = state.get('options'), get_root_logger()
    told = changes(old, recorded)
    options = _optimizer_options(recorded)
    try:
        for number, (optimizer, saved) in enumerate(zip(model.optimizers, state['optimizers'], strict=True)):
            key, given = options[number] if number < len(options) else ('', {})
            before = given if recorded is None else _optimizer_options(old)[number][1] if old else None
            if model.opt.get('force_resume') and _optimizer_misfit(given, saved, before, optimizer):
                logger.warning(f'train.{key}: starts afresh, the state does not fit it')
            else:
                told |= _restore_optimizer(optimizer, saved, f'train.{key}', given, before)
        for schedule, saved in zip(model.schedulers, state['schedulers'], strict=True):
            if not _restore_schedule(schedule, saved) and not old:
                told['train.scheduler'] = 'rates are those of the options'
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'the state of iteration {state["iter"]} does not fit the optimiser, schedule or network of the options: '
            f'{error}. Resume with the options it was trained with'
        ) from error
    if state.get('best_metric_results'):
        model.best_metric_results = _best_values(model.opt, state['best_metric_results'], told)
    if told:
        lines = '; '.join(f'{key}: {change}' for key, change in told.items())
        logger.warning(f'Options that differ from the state are followed from here on: {lines}')
    missing = []
    for name, part in getattr(model, 'stateful', {}).items():
        if name in state.get('parts', {}):
            part.load_state_dict(state['parts'][name])
        else:
            missing.append(name)
    if hasattr(model, 'processes'):
        everyones = state.get('random', [])
        if model.processes.rank < len(everyones):
            randomness.restore(everyones[model.processes.rank])
        else:
            missing.append('random numbers')
    if missing:
        logger.warning(f'The state says nothing of these, they start afresh: {", ".join(missing)}')


def record(opt: Mapping[str, Any]) -> dict[str, Any]:
    """What training depends on in options prepared for BasicSR, as plain values; where data lie is left out."""
    train_set = opt.get('datasets', {}).get('train') or {}
    numbers = {key: value for key, value in train_set.items() if isinstance(value, (bool, int, float))}
    part = {key: opt.get(key) for key in ('model_type', 'network_g', 'train', 'manual_seed', 'num_gpu', 'world_size')}
    val = {key: (opt.get('val') or {}).get(key) for key in ('metrics', 'protocol', 'best_metric')}
    return json.loads(json.dumps({**part, 'datasets': {'train': numbers}, 'val': val}, default=repr))


def changes(old: Any, new: Any, where: str = '') -> dict[str, str]:
    """`old → new` of each option that differs, by its dotted name; nothing where a side is not known."""
    if (old is None and not where) or (new is None and not where):
        return {}
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, str] = {}
        for key in dict.fromkeys([*old, *new] if where else [key for key in new if key in old]):
            found |= changes(old.get(key), new.get(key), f'{where}.{key}'.removeprefix('.'))
        return found
    return {} if old == new else {where: f'{_said(old)} → {_said(new)}'}


def _best_values(opt: Mapping[str, Any], values: Mapping[str, Any], told: dict[str, str]) -> dict[str, Any]:
    """The best values of a state that can be compared with those to come; adds to `told` where others start afresh."""
    names = [part['name'] for key, part in (opt.get('datasets') or {}).items() if key.startswith('val')] or [*values]
    stale = {key.split('.')[2] for key in told if key.startswith('val.metrics.')}
    if 'val.best_metric' in told:
        stale.add(opt['val'].get('best_metric'))
    if (
        not told.keys().isdisjoint(('val.protocol', 'val.metrics')) or names[0] not in values
    ):  # the first dataset decides which weights are the best
        stale = {metric for parts in values.values() for metric in parts}
    if stale:
        told['best values'] = f'of {", ".join(sorted(map(str, stale)))} start afresh'
    kept = {name: {k: v for k, v in values[name].items() if k not in stale} for name in names if name in values}
    return {name: parts for name, parts in kept.items() if parts}


def _said(value: Any) -> str:
    return 'nothing' if value is None else f'{len(value)} options' if isinstance(value, Mapping) else str(value)


def misfits(state: Mapping[str, Any], opt: Mapping[str, Any], parameters: Iterable[Tensor] | None = None) -> list[str]:
    """Say what of the options a state cannot go on with, a line each that begins with the option's name.

    Args:
        state: of a run.
        opt: options prepared for BasicSR.
        parameters: of network_g, on any device; None where they are not known.
    """
    old, new = state.get('options'), record(opt)
    lines = []
    if new['train']['total_iter'] < state['iter']:
        lines.append(f'train.total_iter: {new["train"]["total_iter"]}, and the state is of iteration {state["iter"]}')
    lines += [f'{key}: {change}' for key, change in changes(old, new).items() if key == 'network_g.type']
    options, saved = _optimizer_options(new), state.get('optimizers') or []
    if len(saved) != len(options):
        lines.append(f'train.optim_*: {len(options)} optimisers, and the state has {len(saved)}')
    for number, ((key, given), part) in enumerate(zip(options, saved, strict=False)):
        reason = _optimizer_misfit(given, part, _optimizer_options(old)[number][1] if old else None)
        if reason is None and key == 'optim_g' and parameters is not None:
            reason = _shape_misfit(part, [tensor.shape for tensor in parameters if tensor.requires_grad])
        if reason:
            lines.append(f'train.{key}: {reason}')
    return lines


def _optimizer_options(recorded: Mapping[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """Keys and options of the optimisers, in the order in which BasicSR's models build them."""
    train = (recorded or {}).get('train') or {}
    keys = sorted((key for key in train if key.startswith('optim_') and train[key]), key=lambda key: key != 'optim_g')
    return [(key, train[key]) for key in keys]


def _optimizer_misfit(
    options: Mapping[str, Any],
    saved: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    optimizer: Optimizer | None = None,
) -> str | None:
    """Why a saved state is not of an optimiser of these options; None where it is, as far as can be told.

    Args:
        options: with `type` and `lr`.
        saved: its state.
        before: the options of the state; None if it does not tell.
        optimizer: whose parameters the state is for; None where they are not known.
    """
    if before is not None and before['type'] != options['type']:
        return f'the type is {options["type"]}, and the state is of {before["type"]}'
    if optimizer is not None:
        reason = _shape_misfit(saved, [p.shape for group in optimizer.param_groups for p in group['params']])
        if reason:
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
        what = f'which has no {", ".join(lacking)}' if lacking else 'whose weight_decay works otherwise'
        return f'{options["type"]} with these options does not go on from the optimiser of the state, {what}'
    return None


def _shape_misfit(saved: Mapping[str, Any], shapes: Sequence[Sequence[int]]) -> str | None:
    """Why a saved state is not of parameters of these shapes; None where it is."""
    count = sum(len(group['params']) for group in saved['param_groups'])
    if count != len(shapes):
        return f'network_g has {len(shapes)} parameters to train, and the state is of {count}'
    for number, part in saved['state'].items():
        for name, value in part.items():
            is_alike = isinstance(value, Tensor) and value.ndim == len(shapes[number]) > 0
            if is_alike and name.startswith('exp_avg') and value.shape != shapes[number]:
                return (
                    f'parameter {number} of network_g is {list(shapes[number])}, and {list(value.shape)} in the state'
                )
    return None


def _restore_optimizer(
    optimizer: Optimizer,
    saved: Mapping[str, Any],
    where: str,
    options: Mapping[str, Any],
    before: Mapping[str, Any] | None,
) -> dict[str, str]:
    """Load a state, but keep of `options` what differs; tell of those that differ from a state that records none."""
    given = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    told = {}
    for group, values in zip(optimizer.param_groups, given, strict=True):
        if before is None:
            keys = [k for k in ('initial_lr', *options) if k != 'lr' and _plain(group.get(k)) != _plain(values.get(k))]
        else:
            keys = [k for k in {**before, **options} if before.get(k) != options.get(k)]
        for key in ['initial_lr' if key == 'lr' else key for key in keys]:
            if key in values:
                if before is None:
                    told[f'{where}.{key.removeprefix("initial_")}'] = (
                        f'{_plain(group.get(key))} → {_plain(values[key])}'
                    )
                group[key] = values[key]
    return told


def _restore_schedule(schedule: LRScheduler, saved: Mapping[str, Any]) -> bool:
    """Load a state of these options; of others, step up to its iteration, and return False."""
    if _fixed(schedule.state_dict()) == _fixed(saved):
        schedule.load_state_dict(saved)
        return True
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'Detected call of `lr_scheduler.step\(\)` before', UserWarning)
        while schedule.last_epoch < saved['last_epoch']:
            restore_rates(schedule)
            schedule.step()
    restore_rates(schedule)
    return False


def _fixed(state: Mapping[str, Any]) -> dict[str, Any]:
    """What steps do not change of a schedule's state."""
    return {k: _plain(v) for k, v in state.items() if not k.startswith('_') and k not in _CHANGED_BY_STEPS}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
