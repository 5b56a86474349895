"""The lines of `benchmark.py net` that need a GPU: the network in bfloat16 by each backend and by torch.compile.

Memory is what torch allocates above the weights in a call. Without a GPU there is a line for each that says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ast_plugin.compare.benchmark_backends import Line, add_ratios, take_turns
from ast_plugin.compare.benchmark_network import Way, count
from ast_plugin.errors import first_line

if TYPE_CHECKING:
    import torch

CASES = {  # batch, side, whether gradients are computed
    '512² forward, bf16, CUDA': (1, 512, False),
    '8×256² forward and backward, bf16, CUDA': (8, 256, True),
}
PATHS = {'reference': ('reference', False), 'triton': ('triton', False), 'torch.compile': ('reference', True)}
NO_GPU = 'not run: torch finds no GPU here'


def measure(net: str, turns: int, say: Callable[[str], None]) -> list[Line]:
    """A line for each case and path, as `benchmark_network.measure` has them; without a GPU why there is none."""
    import torch

    if not torch.cuda.is_available():
        return [{'case': case, 'path': path, 'skipped': NO_GPU} for case in CASES for path in PATHS]
    device = torch.device('cuda')
    speed = rates(device, 8192)
    return [line for case in CASES for line in measure_case(net, case, turns, device, speed, say)]


def rates(device: torch.device, side: int) -> dict[str, float]:
    """Operations a second of a matrix product by precision, and bytes a second of a copy; the best of five each."""
    import torch

    single = torch.randn(side, side, device=device)
    half, target = single.bfloat16(), torch.empty_like(single)
    calls = {'fp32': lambda: single @ single, 'bf16': lambda: half @ half, 'copy': lambda: target.copy_(single)}
    taken = take_turns({name: finished(call, device) for name, call in calls.items()}, 6)
    # The first product prepares the library. Clocks have steps.
    fastest = {name: max(min(line['seconds'][1:]), 1e-9) for name, line in taken.items()}
    work = {'fp32': 2 * side**3, 'bf16': 2 * side**3, 'copy': single.nbytes}
    return {name: work[name] / fastest[name] for name in calls}


def measure_case(
    net: str, case: str, turns: int, device: torch.device, speed: dict[str, float], say: Callable[[str], None]
) -> list[Line]:
    """The lines of a case, on a device that there is."""
    batch, side, trains = CASES[case]
    operations, moved = count(Way(case, '', net, 'reference', 'bf16', batch, (side, side), trains))
    floor = operations / speed['bf16'] + moved / speed['copy']
    lines, functions, outputs = {}, {}, {}
    for path, (backend, compiled) in PATHS.items():
        say(f'{case}, {path}')
        lines[path] = {'case': case, 'path': path, 'operations': operations, 'floor': floor}
        try:
            function = prepare(net, batch, side, trains, backend, compiled, device)
            outputs[path] = function().float()  # compiles what is compiled
            lines[path]['peak_bytes'] = _peak(function, device)
        # What does not fit, or has no compiler, leaves the other lines.
        except RuntimeError as error:
            lines[path]['skipped'] = f'failed: {first_line(error)[:120]}'
            continue
        functions[path] = function
    for path, taken in take_turns(functions, turns).items():
        lines[path].update(taken)
        if 'reference' in outputs:
            lines[path]['error'] = float((outputs[path] - outputs['reference']).norm() / outputs['reference'].norm())
    found = list(lines.values())
    add_ratios([line for line in found if 'skipped' not in line])
    return found


def prepare(
    net: str, batch: int, side: int, trains: bool, backend: str, compiled: bool, device: torch.device
) -> Callable[[], torch.Tensor]:
    """Build the network and its input, the same for the same settings; what is returned computes once, and waits."""
    import torch
    from basicsr.utils.registry import ARCH_REGISTRY

    from ast_plugin import ops

    torch.manual_seed(0)
    network = ARCH_REGISTRY.get(net)(drop_path_rate=0.0).train(trains).to(device)
    x = torch.rand(batch, 3, side, side).to(device)
    function = torch.compile(network, dynamic=False) if compiled else network

    def compute() -> torch.Tensor:
        network.zero_grad()
        mode = torch.enable_grad() if trains else torch.inference_mode()
        with ops.use_backend(backend), mode:
            with torch.autocast(device.type, torch.bfloat16):
                output = function(x)
            if trains:
                output.float().square().mean().backward()
            return output.detach().clone()

    return finished(compute, device)


def finished(function: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """The function, which returns when the device is done."""
    import torch

    def call() -> torch.Tensor:
        result = function()
        if device.type == 'cuda':
            torch.cuda.synchronize(device)
        return result

    return call


def _peak(function: Callable[[], torch.Tensor], device: torch.device) -> int | None:
    """Bytes that a call allocates at most, or None where torch does not count them."""
    import torch

    if device.type != 'cuda':
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before
