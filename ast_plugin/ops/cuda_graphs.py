"""CUDA graphs, which launch the thousands of kernels of a network at once where launch overhead dominates.

Measured on an H200 in bfloat16: AST-B on 512² takes 59 ms eagerly and 13 ms as a graph (docs/speed.md). A graph reads
and writes fixed memory addresses, so every tensor that it reads must stay in place. A network declares that it meets
this requirement by a true attribute `works_as_graph`.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import OptionError, first_line
from ast_plugin.ops.backend import make_once
from ast_plugin.ops.dispatch import requested_backend

Run = Callable[[Tensor], Tensor]

# Above this size kernels take longer than their launch, and a graph would only hold memory.
_MAX_PIXELS = 640**2
_MAX_GRAPHS = 4  # for example two sizes in portrait and landscape; further sizes run eagerly
_EAGER_CALLS = 2  # eager calls per input size before a capture, which would not pay off for an image of two tiles
_TOLERANCE = 1e-3  # for ‖graph − eager‖ / ‖eager‖: kernels with atomic sums differ slightly between calls
_WARMUP_CALLS = 3  # calls before a capture, as PyTorch recommends
_logger = logging.getLogger(__name__)
_living: weakref.WeakSet['Graphs'] = weakref.WeakSet()


class Graphs:
    """Inference graphs of a network, one per input size; weights must not change while they are in use."""

    def __init__(self) -> None:
        self.graphs: dict[tuple, Run] = {}
        self.calls: Counter[tuple] = Counter()
        self.pool: Any = None  # memory pool shared by all graphs, as only one runs at a time
        self.is_closed = False  # whether no further graphs are captured
        _living.add(self)

    def __call__(self, run: Run, x: Tensor) -> Tensor:
        """Return `run(x)`, computed eagerly for the first inputs of a size, then captured and replayed."""
        key = tuple(x.shape), x.dtype, x.device, requested_backend(), torch.is_inference_mode_enabled(), _autocast(x)
        if key in self.graphs:
            return self.graphs[key](x)
        result = run(x)
        self.calls[key] += 1
        if self.calls[key] > _EAGER_CALLS and not self.is_closed:
            graph = self._capture(run, x, result)
            if graph is not None:
                self.graphs[key] = graph
            self.is_closed = graph is None or len(self.graphs) == _MAX_GRAPHS
        return result

    def _capture(self, run: Run, x: Tensor, result: Tensor) -> Run | None:
        """Return the graph, or None if the capture fails or its result differs from the eager one."""
        try:
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = capture(run, x, self.pool)
            off = _relative_error(graph(x), result)
        except RuntimeError as error:
            _logger.warning('CUDA graph capture failed, running eagerly: %s', first_line(error))
            return None
        if off <= _TOLERANCE:
            return graph
        _logger.warning('CUDA graph result off by %.0e from eager execution, running eagerly', off)
        return None

    def close(self) -> bool:
        """Release all graphs and their memory permanently; return whether there were any."""
        had_some, self.graphs, self.pool, self.is_closed = bool(self.graphs), {}, None, True
        return had_some


def release_graphs() -> bool:
    """Release all inference graphs when memory runs out; return whether there were any."""
    had_some = [graphs.close() for graphs in list(_living)]
    if any(had_some):
        torch.cuda.empty_cache()
    return any(had_some)


def capture(run: Run, x: Tensor, pool: Any) -> Run:
    """Capture `run` for inputs like x; return a function that copies in its input, replays and copies out the result.

    The capture uses an image of zeros, so that a correct result for x proves that the graph reads its input.
    """
    static_input, graph, device = torch.zeros_like(x), torch.cuda.CUDAGraph(), x.device
    # A failed capture would otherwise leave its stream as the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run(static_input)
        torch.cuda.current_stream(device).wait_stream(stream)
        # The default mode fails if another thread pins memory; the default stream is on the first device used.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode='thread_local'):
            static_output = run(static_input)

    def replay(x: Tensor) -> Tensor:
        with torch.cuda.device(device):
            static_input.copy_(x)
            graph.replay()
            return static_output.clone()

    return replay


def run_graphed(network: object, run: Run, x: Tensor) -> Tensor:
    """Return `run(x)`; within `frozen_weights` on CUDA, use a graph for the size of x, see `Graphs`.

    Args:
        network: owner of the graphs; runs eagerly if it has no `works_as_graph`.
        run: function that computes with the network.
        x: [N, C, H, W]; runs eagerly for more than 640² pixels in total.
    """
    pixels = len(x) * x.shape[-2] * x.shape[-1]
    is_fit = getattr(network, 'works_as_graph', False) and pixels <= _MAX_PIXELS
    if x.device.type != 'cuda' or not is_fit or torch.is_grad_enabled():
        return run(x)
    return make_once(Graphs, (), 'CUDA graphs', network)(run, x)


class TrainingGraph:
    """Training forward and backward passes of a network as CUDA graphs, from the third batch on.

    Batches whose shape differs from the first run eagerly. Memory use is that of eager training, but it stays allocated
    between steps.

    Args:
        network: network whose parameters are updated in place, as optimisers do.
        train: section `train` of the option file.
        is_parallel: whether several processes or devices train the network.
    Raises:
        OptionError: if the network or another key of `train` is incompatible with CUDA graphs.
    """

    def __init__(self, network: nn.Module, train: Mapping[str, Any], is_parallel: bool = False) -> None:
        # Graph gradients have fixed addresses: a second micro-batch would overwrite the accumulated gradients.
        conflicts = {
            'train.gradient_checkpointing': train.get('gradient_checkpointing'),
            'train.compile': train.get('compile'),
            'train.accumulate': (train.get('accumulate') or 1) > 1,
            'several processes or GPUs': is_parallel,
            'use_checkpoint': any(getattr(module, 'use_checkpoint', False) for module in network.modules()),
            'hooks of the network': network._forward_hooks or network._forward_pre_hooks,
        }
        for name, is_given in conflicts.items():
            if is_given:
                raise OptionError(f'train.cuda_graph cannot be combined with {name}: remove one of them')
        if not getattr(network, 'works_as_graph', False):
            raise OptionError(
                f'train.cuda_graph: {type(network).__name__} is not known to support CUDA graphs, only AST is: '
                'remove the key'
            )
        self.network, self.key, self.graphed = network, None, None

    def __call__(self, x: Tensor) -> Tensor:
        key = x.shape, x.dtype, x.device
        if self.key is None and x.device.type == 'cuda':
            self.key = key  # the first call initialises libraries and checks kernels
        elif self.graphed is None and key == self.key:
            self.graphed = self._capture(x)
        elif key == self.key and self.network.training:
            return self.graphed(x)
        return self.network(x)

    def _capture(self, x: Tensor) -> Run:
        kind, buffers = x.device.type, list(self.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        (is_lower, dtype), sample = _autocast(x), torch.zeros_like(x)
        # The autocast cache would make the graph read casts of outdated weights.
        with torch.autocast(kind, dtype, enabled=is_lower, cache_enabled=False), torch.random.fork_rng([x.device]):
            calls = [self._results(self.network, x) for _ in range(2)]
            try:
                with _capturing_in_this_thread():
                    torch.cuda.make_graphed_callables(
                        self.network, (sample,), num_warmup_iters=_WARMUP_CALLS, allow_unused_input=True
                    )
            except (RuntimeError, AssertionError) as error:
                raise OptionError(f'train.cuda_graph: the network cannot be captured ({first_line(error)})') from error
            # make_graphed_callables replaces the module's `forward` by one that does not check shapes.
            graphed = self.network.__dict__.pop('forward')
            replayed = self._results(graphed, x)
        for buffer, value in zip(buffers, before, strict=True):  # the calls above may have changed them
            buffer.copy_(value)
        for name, got, want, again in zip(('output', 'gradients'), replayed, *calls, strict=True):
            # With stochastic depth, two eager calls differ as well.
            off, usual = _relative_error(got, want), _relative_error(again, want)
            if not off <= max(10 * _TOLERANCE if is_lower else _TOLERANCE, 3 * usual):
                raise OptionError(
                    f'train.cuda_graph: {name} of the graph off by {off:.0e} from eager execution: remove the key'
                )
        return graphed

    def _results(self, run: Run, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the gradients of its mean square as one vector."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        output = run(x)
        gradients = torch.autograd.grad(output.float().square().mean(), parameters, allow_unused=True)
        return output.detach(), torch.cat([each.float().flatten() for each in gradients if each is not None])


@contextmanager
def _capturing_in_this_thread() -> Iterator[None]:
    """Allow other threads to pin memory during a capture; `make_graphed_callables` has no argument for this."""
    original = torch.cuda.graph
    torch.cuda.graph = partial(original, capture_error_mode='thread_local')
    try:
        yield
    finally:
        torch.cuda.graph = original


def _autocast(x: Tensor) -> tuple[bool, torch.dtype]:
    """Return whether autocast is enabled for the device of x, and its dtype."""
    return torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)


def _relative_error(got: Tensor, want: Tensor) -> float:
    """Relative error ‖got − want‖ / ‖want‖."""
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
