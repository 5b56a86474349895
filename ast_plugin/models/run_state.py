"""All that a run is, as one file that needs no other: collected from a model, and put back.

Beside BasicSR's keys (`epoch`, `iter`, `optimizers`, `schedulers`) a state holds the weights under `params` and
`params_ema`, where readers of weights files find them, the best values, each process's random generators, and the
states of the parts in the model's `stateful`: tensors and plain values. The place in the epoch's order follows from the
iteration, see `data.sampler.epoch_of`.
"""

from collections.abc import Mapping
from typing import Any

from basicsr.utils import get_root_logger

from ast_plugin.data import random_states
from ast_plugin.errors import CheckpointError


def collect(model: Any, epoch: int, iteration: int) -> dict[str, Any]:
    """Return the state of a RestorationModel after an iteration. All processes of a run must call this together."""
    here = random_states.capture(every_device=not model.opt['dist'])
    return {
        'epoch': epoch,
        'iter': iteration,
        **model.weights(),
        'optimizers': [optimizer.state_dict() for optimizer in model.optimizers],
        'schedulers': [scheduler.state_dict() for scheduler in model.schedulers],
        'best_metric_results': getattr(model, 'best_metric_results', {}),
        'parts': {name: part.state_dict() for name, part in model.stateful.items()},
        'random': model.processes.gather([here]),
    }


def restore(model: Any, state: Mapping[str, Any]) -> None:
    """Put back all but the weights, which BasicSR has loaded when it built the model.

    States that BasicSR's own models wrote have less in them; then a line in the log says what starts afresh.

    Raises:
        CheckpointError: if the state is of another optimiser or network than the model has.
    """
    try:
        for kind in ('optimizers', 'schedulers'):
            for part, saved in zip(getattr(model, kind), state[kind], strict=True):
                part.load_state_dict(saved)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f'the state of iteration {state["iter"]} does not fit the optimiser, schedule or network of the options: '
            f'{error}. Resume with the options it was trained with'
        ) from error
    if state.get('best_metric_results'):
        model.best_metric_results = state['best_metric_results']
    missing = []
    for name, part in model.stateful.items():
        if name in state.get('parts', {}):
            part.load_state_dict(state['parts'][name])
        else:
            missing.append(name)
    everyones = state.get('random', [])
    if model.processes.rank < len(everyones):
        random_states.restore(everyones[model.processes.rank])
    else:
        missing.append('random numbers')
    if missing:
        get_root_logger().warning(f'The state says nothing of these, they start afresh: {", ".join(missing)}')
