"""Networks as CUDA graphs: the capture policy is tested with a simulated device, the results on a GPU."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ast_plugin.errors import OptionError
from ast_plugin.evaluation.tiling import Tiling, evaluating
from ast_plugin.ops import cuda_graphs, use_backend
from ast_plugin.ops.cuda_graphs import Graphs, TrainingGraph

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


def small_network():
    """Build a network that declares `works_as_graph`."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))
    network.works_as_graph = True
    return network


@pytest.fixture
def captured(monkeypatch):
    """Simulate captures; return a list of the captured inputs, to which each replay adds 'replayed'."""
    events = []

    def capture(run, x, pool):
        events.append(tuple(x.shape))

        def replay(x):
            events.append('replayed')
            return run(x)

        return replay

    monkeypatch.setattr(cuda_graphs, 'capture', capture)
    monkeypatch.setattr(torch.cuda, 'graph_pool_handle', lambda: 'pool')
    return events


def test_third_input_of_a_size_is_captured(captured):
    graphs, size, other = Graphs(), torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 9)
    for x in (size, other, size, size, size, other):
        assert torch.equal(graphs(torch.sin, x), x.sin())
    # Each graph is replayed once after its capture, for comparison with the eager result.
    assert captured == [(1, 3, 8, 8), 'replayed', 'replayed']


def test_later_sizes_run_eagerly(captured):
    graphs = Graphs()
    for side in range(8, 14):
        for _ in range(4):
            graphs(torch.sin, torch.rand(1, 3, side, side))
    assert [key[0][-1] for key in graphs.graphs] == [8, 9, 10, 11]
    assert len(captured) == 4 * 3


def test_settings_have_separate_graphs(captured):
    graphs, x = Graphs(), torch.rand(1, 3, 8, 8)
    with torch.inference_mode():
        for name, is_lower in (('auto', False), ('reference', False), ('auto', True)):
            with use_backend(name), torch.autocast('cpu', torch.bfloat16, enabled=is_lower):
                for _ in range(3):
                    graphs(torch.sin, x)
    assert len(graphs.graphs) == 3


def test_out_of_memory_releases_graphs(captured):
    graphs, x = Graphs(), torch.rand(1, 3, 8, 8)
    for _ in range(4):
        graphs(torch.sin, x)
    assert cuda_graphs.release_graphs() and not graphs.graphs
    again = Graphs()
    for _ in range(4):
        graphs(torch.sin, x), again(torch.sin, x)
    assert not graphs.graphs and again.graphs


@pytest.mark.parametrize(('factor', 'message'), [(1.01, 'off by 1e-02'), (None, 'CUDA graph capture failed')])
def test_bad_capture_is_not_used(captured, monkeypatch, caplog, factor, message):
    def capture(run, x, pool):
        captured.append(x)
        if factor is None:
            raise RuntimeError('operation not permitted when stream is capturing')
        return lambda x: run(x) * factor

    monkeypatch.setattr(cuda_graphs, 'capture', capture)
    graphs = Graphs()
    for side in (8, 9):
        x = torch.rand(1, 3, side, 8)
        assert all(torch.equal(graphs(torch.sin, x), x.sin()) for _ in range(4))
    assert len(captured) == 1 and message in caplog.text  # not tried again


def with_checkpoints(network):
    network[0].use_checkpoint = True
    return network


def with_hook(network):
    network.register_forward_hook(lambda *args: None)
    return network


@pytest.mark.parametrize(
    ('train', 'is_parallel', 'change', 'message'),
    [
        ({'accumulate': 2}, False, None, 'train.accumulate'),
        ({'compile': True}, False, None, 'train.compile'),
        ({'gradient_checkpointing': True}, False, None, 'train.gradient_checkpointing'),
        ({}, True, None, 'several processes'),
        ({}, False, with_checkpoints, 'use_checkpoint'),
        ({}, False, with_hook, 'hooks'),
        ({}, False, lambda network: network[0], 'Conv2d is not known to support CUDA graphs, only AST is'),
    ],
)
def test_training_graphs_reject(train, is_parallel, change, message):
    network = small_network()
    TrainingGraph(network, {'accumulate': 1, 'compile': False})
    with pytest.raises(OptionError, match=message):
        TrainingGraph(change(network) if change else network, train, is_parallel)


def test_training_graph_is_eager_on_cpu():
    network = small_network().eval()
    x = torch.rand(1, 3, 8, 8)
    graphed = TrainingGraph(network, {})
    assert all(torch.equal(graphed(x), network(x)) for _ in range(3))


@pytest.mark.parametrize(('scale', 'gradient', 'wrong'), [(1, 1, None), (1.01, 1, 'output'), (1, 1.1, 'gradients')])
def test_training_graph_is_compared_with_eager(monkeypatch, scale, gradient, wrong):
    def make_graphed_callables(network, args, **options):
        def graphed(x):
            y = scale * type(network).forward(network, x)
            return gradient * y + (1 - gradient) * y.detach()

        network(*args), network.__dict__.update(forward=graphed)

    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', make_graphed_callables)
    monkeypatch.setattr(torch.random, 'fork_rng', lambda devices: nullcontext())
    network, x = small_network(), torch.rand(2, 3, 8, 8)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(OptionError, match=f'{wrong} of the graph off by') if wrong else nullcontext():
        assert TrainingGraph(network, {})._capture(x).__name__ == 'graphed'
    assert 'forward' not in vars(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@needs_gpu
def test_tiles_by_graphs(monkeypatch):
    network, image, replays = small_network().cuda().eval(), torch.rand(1, 3, 64, 64), []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, 'replay', lambda self: (replays.append(1), replay(self))[1])
    tiling = Tiling(tile=32, overlap=0)
    with evaluating(network):
        want = network(image.cuda()).cpu()[..., :30, :30]
        got = [tiling.run(network, image) for _ in range(2)]
    assert len(replays) == 1 + 5  # of eight tiles, two run eagerly and one is captured and compared
    assert all((each[..., :30, :30] - want).abs().max() < 1e-5 for each in got)
    assert torch.equal(*got)


@needs_gpu
@pytest.mark.parametrize('precision', [None, torch.bfloat16])
def test_training_by_graphs(precision):
    plain, graphed = small_network().cuda(), small_network().cuda()
    by_graph, losses = TrainingGraph(graphed, {}), ([], [])
    for step in range(6):
        x = torch.rand(2, 3, 16, 16, device='cuda', generator=torch.Generator('cuda').manual_seed(step))
        for network, call, values in ((plain, plain, losses[0]), (graphed, by_graph, losses[1])):
            network.zero_grad()
            with torch.autocast('cuda', precision, enabled=precision is not None):
                loss = (call(x).float() - x).square().mean()
            loss.backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.1 * parameter.grad
            values.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert all(
        torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-5)
        for a, b in zip(plain.state_dict().values(), graphed.state_dict().values(), strict=True)
    )
    other = torch.rand(1, 3, 16, 16, device='cuda')
    assert by_graph(other).shape == other.shape  # a batch of another size runs eagerly
    copy.deepcopy(graphed), graphed.eval()(other)
