"""CUDA graphs: what a network launches, some thousand kernels, started as one, where starting them takes the time.

Measured on an H100 in bfloat16: AST-B on 256² takes 35 ms called and 6 ms as a graph (docs/speed.md). A graph reads and
writes where its tensors lay when it was captured: whatever it reads has to stay there, which networks say that they
keep to by a true attribute `works_as_graph`.
"""

import logging
import weakref
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

# Above it kernels take longer than their start, and a graph would only hold memory.
_MOST_PIXELS = 640**2
_MOST_GRAPHS = 4  # such as two sizes upright and lying; what comes later is called
_CALLS = 2  # of a size before it is captured: an image of two tiles would not gain by it
_NEAR = 1e-3  # of ‖graph − call‖ / ‖call‖: kernels with atomic sums differ a little from call to call
_WARM_UPS = 3  # calls before a capture, as PyTorch asks for
_logger = logging.getLogger(__name__)
_living: weakref.WeakSet['Graphs'] = weakref.WeakSet()


class Graphs:
    """Graphs of a network without gradients by size of its input; weights must not change while it lives."""

    def __init__(self) -> None:
        self.graphs: dict[tuple, Run] = {}
        self.calls: dict[tuple, int] = {}
        self.pool: Any = None  # shared: one graph runs at a time
        self.is_closed = False  # to further graphs
        _living.add(self)

    def __call__(self, run: Run, x: Tensor) -> Tensor:
        """`run(x)`: called for the first inputs of a size, then captured, and replayed from then on."""
        key = tuple(x.shape), x.dtype, x.device, requested_backend(), torch.is_inference_mode_enabled(), _autocast(x)
        if key in self.graphs:
            return self.graphs[key](x)
        result = run(x)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] > _CALLS and not self.is_closed:
            graph = self._capture(run, x, result)
            if graph is None:
                self.is_closed = True
            else:
                self.graphs[key] = graph
                self.is_closed = len(self.graphs) == _MOST_GRAPHS
        return result

    def _capture(self, run: Run, x: Tensor, result: Tensor) -> Run | None:
        """The graph, or None where it cannot be captured or gives something else than the call."""
        try:
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = capture(run, x, self.pool)
            off = _off(graph(x), result)
        except RuntimeError as error:
            _logger.warning('no CUDA graph of this network: %s', first_line(error))
            return None
        if off <= _NEAR:
            return graph
        _logger.warning('the CUDA graph of this network is off by %.0e from its call: it is called', off)
        return None

    def close(self) -> bool:
        """Give the graphs and their memory up, for good; whether there were any."""
        had_some, self.graphs, self.pool, self.is_closed = bool(self.graphs), {}, None, True
        return had_some


def release_graphs() -> bool:
    """Give up all graphs without gradients, where memory runs out; whether there were any."""
    had_some = [graphs.close() for graphs in list(_living)]
    if any(had_some):
        torch.cuda.empty_cache()
    return any(had_some)


def capture(run: Run, x: Tensor, pool: Any) -> Run:
    """Capture `run` for inputs like x; what comes back copies its input in, replays, and copies the result out.

    It is captured for an image of zeros: that it gives the result for x shows that it reads x.
    """
    taken, graph, device = torch.zeros_like(x), torch.cuda.CUDAGraph(), x.device
    # A capture that fails would leave its stream the current one.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            run(taken)
        torch.cuda.current_stream(device).wait_stream(side)
        # By itself it forbids what a thread that pins memory does; its own stream would be of the first device used.
        with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode='thread_local'):
            given = run(taken)

    def replay(x: Tensor) -> Tensor:
        with torch.cuda.device(device):
            taken.copy_(x)
            graph.replay()
            return given.clone()

    return replay


def run_graphed(network: object, run: Run, x: Tensor) -> Tensor:
    """`run(x)`, within `frozen_weights` on CUDA by a graph of its size, see `Graphs`.

    Args:
        network: whose graphs these are; without `works_as_graph` it is called.
        run: computes with the network.
        x: [N, C, H, W]; of more than 640² pixels in all, it is called.
    """
    pixels = len(x) * x.shape[-2] * x.shape[-1]
    is_fit = getattr(network, 'works_as_graph', False) and pixels <= _MOST_PIXELS
    if x.device.type != 'cuda' or not is_fit or torch.is_grad_enabled():
        return run(x)
    return make_once(Graphs, (), 'CUDA graphs', network)(run, x)


class TrainingGraph:
    """Calls a network in training by graphs of its forward and its backward pass, from the third batch on.

    Batches of another shape than the first are called as they are. What the graphs allocate stays theirs: memory as
    without them, held between steps.

    Args:
        network: whose parameters keep their places, as optimisers leave them.
        train: the section of the option file.
        is_parallel: whether other processes or devices train the same network.
    Raises:
        OptionError: if the network or another switch of `train` does not go together with graphs.
    """

    def __init__(self, network: nn.Module, train: Mapping[str, Any], is_parallel: bool = False) -> None:
        # Gradients of a graph lie in one place: a second micro-batch would overwrite those that it is added to.
        rivals = [f'train.{key}' for key in ('gradient_checkpointing', 'compile') if train.get(key)]
        rivals += ['train.accumulate'] if (train.get('accumulate') or 1) > 1 else []
        rivals += ['several processes or GPUs'] if is_parallel else []
        rivals += ['use_checkpoint'] * any(getattr(module, 'use_checkpoint', False) for module in network.modules())
        rivals += ['hooks of the network'] if network._forward_hooks or network._forward_pre_hooks else []
        if rivals:
            raise OptionError(f'train.cuda_graph does not go together with {rivals[0]}: leave one of them out')
        if not getattr(network, 'works_as_graph', False):
            raise OptionError(
                f'train.cuda_graph: {type(network).__name__} is not known to work as one, only AST is: leave it out'
            )
        self.network, self.key, self.graphed = network, None, None

    def __call__(self, x: Tensor) -> Tensor:
        key = x.shape, x.dtype, x.device
        if self.key is None and x.device.type == 'cuda':
            self.key = key  # the first call prepares libraries and compares kernels
        elif self.graphed is None and key == self.key:
            self.graphed = self._capture(x)
        elif key == self.key and self.network.training:
            return self.graphed(x)
        return self.network(x)

    def _capture(self, x: Tensor) -> Run:
        kind, buffers = x.device.type, list(self.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        (is_lower, dtype), sample = _autocast(x), torch.zeros_like(x)
        # The cache of autocast holds casts from outside of the graph, of weights as they were.
        with torch.autocast(kind, dtype, enabled=is_lower, cache_enabled=False), torch.random.fork_rng([x.device]):
            calls = [self._results(self.network, x) for _ in range(2)]
            try:
                with _capturing_in_this_thread():
                    torch.cuda.make_graphed_callables(
                        self.network, (sample,), num_warmup_iters=_WARM_UPS, allow_unused_input=True
                    )
            except (RuntimeError, AssertionError) as error:
                raise OptionError(f'train.cuda_graph: this network cannot be one ({first_line(error)})') from error
            # It replaces the module's own method, with one that does not look at shapes.
            graphed = self.network.__dict__.pop('forward')
            replayed = self._results(graphed, x)
        for buffer, value in zip(buffers, before, strict=True):  # which all that may have changed
            buffer.copy_(value)
        for name, got, want, again in zip(('output', 'gradients'), replayed, *calls, strict=True):
            # With stochastic depth two calls differ, too.
            off, usual = _off(got, want), _off(again, want)
            if not off <= max(10 * _NEAR if is_lower else _NEAR, 3 * usual):
                raise OptionError(f'train.cuda_graph: {name} off by {off:.0e} from those of a call; leave it out')
        return graphed

    def _results(self, run: Run, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output, and the gradients of its mean square as one vector."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        output = run(x)
        gradients = torch.autograd.grad(output.float().square().mean(), parameters, allow_unused=True)
        return output.detach(), torch.cat([each.float().flatten() for each in gradients if each is not None])


@contextmanager
def _capturing_in_this_thread() -> Iterator[None]:
    """Let other threads pin memory during a capture, which `make_graphed_callables` has no argument for."""
    original = torch.cuda.graph
    torch.cuda.graph = partial(original, capture_error_mode='thread_local')
    try:
        yield
    finally:
        torch.cuda.graph = original


def _autocast(x: Tensor) -> tuple[bool, torch.dtype]:
    """Whether autocast is on for a tensor's device, and its type."""
    return torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)


def _off(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    got, want = got.detach().float(), want.detach().float()
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
