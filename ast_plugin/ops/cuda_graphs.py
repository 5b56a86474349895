"""CUDA graphs: what a network launches, some thousand kernels, started as one, where starting them takes the time.

Measured on an H100 in bfloat16: AST-B on 256² takes 35 ms called and 6 ms as a graph (benchmarks/net_gpu.json).
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.errors import OptionError, first_line
from ast_plugin.ops.backend import make_once

Run = Callable[[Tensor], Tensor]

# Above it kernels take longer than their start, and a graph would only hold memory.
_MOST_PIXELS = 640**2
_MOST_GRAPHS = 4  # such as two sizes upright and lying
_NEAR = 1e-3  # of ‖graph − call‖ / ‖call‖: kernels with atomic sums differ a little from call to call
_WARM_UPS = 3  # calls before a capture, as PyTorch asks for
_logger = logging.getLogger(__name__)


class Graphs:
    """Graphs of a network without gradients by size of its input; weights must not change while it lives."""

    def __init__(self) -> None:
        self.graphs: dict[tuple, Run] = {}
        self.seen: set[tuple] = set()
        self.pool: Any = None  # shared: one graph runs at a time

    def __call__(self, run: Run, x: Tensor) -> Tensor:
        """`run(x)`: called for the first input of a size, captured for the second, and replayed from then on."""
        key = tuple(x.shape), x.dtype
        if key in self.graphs:
            return self.graphs[key](x)
        result = run(x)
        if key not in self.seen:
            self.seen.add(key)
            return result
        self.graphs[key] = self._checked(run, x, result)
        while len(self.graphs) > _MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
        return result

    def _checked(self, run: Run, x: Tensor, result: Tensor) -> Run:
        """The graph, or `run` itself where it cannot be captured or gives something else."""
        try:
            if self.pool is None:
                self.pool = torch.cuda.graph_pool_handle()
            graph = capture(run, x, self.pool)
            off = _off(graph(x).float(), result.float())
        except RuntimeError as error:  # networks of others may read values, which no graph can
            _logger.info('no CUDA graph of this network: %s', first_line(error))
            return run
        if off <= _NEAR:
            return graph
        _logger.warning('the CUDA graph of this network is off by %.0e from its call: it is called', off)
        return run


def capture(run: Run, x: Tensor, pool: Any) -> Run:
    """Capture `run(x)`; what comes back copies its input in, replays the kernels, and copies the result out."""
    taken, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.device(x.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run(taken)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, pool=pool):
            given = run(taken)

    def replay(x: Tensor) -> Tensor:
        with torch.cuda.device(x.device):
            taken.copy_(x)
            graph.replay()
            return given.clone()

    return replay


def run_graphed(network: object, run: Run, x: Tensor) -> Tensor:
    """`run(x)`, within `frozen_weights` on CUDA by a graph of its size, see `Graphs`.

    Args:
        network: whose graphs these are.
        run: computes with the network.
        x: [N, C, H, W]; of more than 640² pixels in all, it is called.
    """
    pixels = len(x) * x.shape[-2] * x.shape[-1]
    if x.device.type != 'cuda' or pixels > _MOST_PIXELS or torch.is_grad_enabled():
        return run(x)
    return make_once(Graphs, (), 'CUDA graphs', network)(run, x)


class TrainingGraph:
    """Calls a network in training by graphs of its forward and its backward pass, from the third batch on.

    Batches of another shape than the first are called as they are. What the graphs allocate stays theirs: memory as
    without them, held between steps.

    Args:
        network: whose parameters keep their places, as optimisers leave them.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network, self.shape, self.graphed = network, None, None

    @staticmethod
    def check(train: Mapping[str, Any], is_distributed: bool) -> None:
        """Raise OptionError where another switch of `train` needs the network to be called."""
        # Gradients of a graph lie in one place: a second micro-batch would overwrite those that it is added to.
        rivals = [key for key in ('gradient_checkpointing', 'compile') if train.get(key)]
        rivals += ['accumulate'] if (train.get('accumulate') or 1) > 1 else []
        if rivals or is_distributed:
            other = f'train.{rivals[0]}' if rivals else 'several processes or GPUs'
            raise OptionError(f'train.cuda_graph does not go together with {other}: leave one of them out')

    def __call__(self, x: Tensor) -> Tensor:
        key = x.shape, x.dtype, x.device
        if self.shape is None and x.device.type == 'cuda':
            self.shape = key  # the first call prepares libraries and compares kernels
        elif self.graphed is None and key == self.shape:
            self.graphed = self._capture(x)
        elif key == self.shape and self.network.training:
            return self.graphed(x)
        return self.network(x)

    def _capture(self, x: Tensor) -> Run:
        kind, buffers = x.device.type, list(self.network.buffers())
        before = [buffer.clone() for buffer in buffers]
        # The cache of autocast holds casts from outside of the graph, of weights as they were.
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with (
            torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False),
            torch.random.fork_rng([x.device]),
        ):
            calls = [self._results(self.network, x) for _ in range(2)]
            torch.cuda.make_graphed_callables(
                self.network, (x.clone(),), num_warmup_iters=_WARM_UPS, allow_unused_input=True
            )
            # It replaces the module's own method, with one that does not look at shapes.
            graphed = self.network.__dict__.pop('forward')
            replayed = self._results(graphed, x)
        for buffer, value in zip(buffers, before, strict=True):  # which all that may have changed
            buffer.copy_(value)
        off, usual = (_off(results, calls[0]) for results in (replayed, calls[1]))
        # With stochastic depth two calls differ, too.
        if off <= max(_NEAR if dtype is None or not enabled else 10 * _NEAR, 3 * usual):
            return graphed
        _logger.warning('the CUDA graph of this network is off by %.0e from its call: it is called', off)
        return self.network

    def _results(self, run: Run, x: Tensor) -> Tensor:
        """The output and the gradients of its mean square, as one vector."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        output = run(x)
        gradients = torch.autograd.grad(output.float().square().mean(), parameters, allow_unused=True)
        return torch.cat([each.detach().float().flatten() for each in (output, *gradients) if each is not None])


def _off(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got - want).norm() / want.norm().clamp_min(1e-12))
