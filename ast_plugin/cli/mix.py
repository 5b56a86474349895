"""List the modules that a Mixed network replaces, compare its cost with the base network, and run it once.

  basicsr mix -opt mix/SwinIR_ASSA_FRFN
  basicsr mix -opt my.yml --size 63 97

The network is built as for training, including base_weights, and run forward and backward once on noise of an odd size.
No file is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ast_plugin.cli import commands
from ast_plugin.errors import OptionError, PluginError, ShapeError, first_line, tell_place
from ast_plugin.names import say, to_columns

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ast_plugin.archs.mixed.mixed_arch import Mixed
    from ast_plugin.archs.mixed.rules import Exchange

_ODD = (61, 75)
_MACS_SIDE = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr mix`."""
    commands.add_file_arguments(parser)
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=_ODD,
        metavar=('H', 'W'),
        help=f'height and width of the noise image in pixels (default: {_ODD[0]} {_ODD[1]})',
    )


def run(args: argparse.Namespace) -> int:
    """Print the exchanges and costs, and run the network once."""
    if min(args.size) < 1:
        raise OptionError(f'--size {args.size[0]} {args.size[1]}: expected sides of 1 or more')
    loaded = commands.read_run(args, is_train=None)
    stage = loaded.stages[0]  # all stages share one network
    options = stage.opt.get('network_g') or {}
    if options.get('type') != 'Mixed':
        raise OptionError(f'{loaded.source(stage)}: network_g.type: expected Mixed, got {options.get("type")}')
    from ast_plugin.archs.mixed.mixed_arch import Mixed, build_base
    from ast_plugin.devices import find_device

    device = find_device(stage.opt.get('device'))
    with tell_place(f'{loaded.source(stage)}: network_g'):
        mixed = Mixed(**{key: value for key, value in options.items() if key != 'type'})
        base = build_base(options['base'])
    say(*_exchange_table(mixed.exchanges), '')
    say(*_cost_table(base, mixed), '')
    say(_trial(mixed, tuple(args.size), device))
    return 0


def _exchange_table(exchanges: Sequence[Exchange]) -> list[str]:
    rows = [('rule', 'module', 'was', 'op', 'block', 'input', 'parameters', 'sizes')]
    rows += [
        (
            exchange.rule.where,
            exchange.site.name,
            exchange.was,
            exchange.rule.op,
            exchange.rule.declaration.name,
            f'{exchange.site.kind} {"x".join(map(str, exchange.site.shape))}',
            f'{exchange.parameters_before:,d} -> {exchange.parameters_after:,d}',
            ', '.join(f'{key}={value}' for key, value in exchange.options.items()),
        )
        for exchange in exchanges
    ]
    return to_columns(rows)


def _cost_table(base: nn.Module, mixed: Mixed) -> list[str]:
    """Return a table of parameters and MACs before and after, and a note on operators that are not counted."""
    import torch

    from ast_plugin.evaluation.cost import count_macs

    multiple = mixed.size_multiple
    side = -(-_MACS_SIDE // multiple) * multiple
    rows = [('', 'before', 'after', 'change')]
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (base, mixed)]
    rows.append(('parameters', *(f'{count:,d}' for count in counts), _change(*counts)))
    measured = [count_macs(network, torch.zeros(1, mixed.in_channels, side, side)) for network in (base, mixed)]
    macs = [total for total, _ in measured]
    rows.append((f'MACs at {side}x{side}', *(f'{count / 1e9:.3f} G' for count in macs), _change(*macs)))
    left_out = sorted({name.partition('::')[2].strip('_') for _, names in measured for name in names})
    return [
        *to_columns(rows),
        'MACs are counted by mmengine for convolutions, linear layers, matrix products, norms and resizing. '
        f'Not counted: {"".join(f"{name}, " for name in left_out)}sums, shifts and copies.',
    ]


def _trial(mixed: Mixed, size: tuple[int, int], device: torch.device) -> str:
    """Run forward and backward once on noise; raise ShapeError if that fails or a value is not finite."""
    import torch

    from ast_plugin.devices import describe_device, wait_for

    image = torch.rand(1, mixed.in_channels, *size, generator=torch.Generator().manual_seed(0)).to(device)
    mixed.to(device).train()
    start = time.perf_counter()
    try:
        output = mixed(image)
        wait_for(device)
        middle = time.perf_counter()
        output.square().mean().backward()
        wait_for(device)
    except PluginError:
        raise
    except Exception as error:  # a third-party network may raise anything
        raise ShapeError(
            f'{type(mixed.base).__name__} does not train on one {size[0]}x{size[1]} image: '
            f'{type(error).__name__}: {first_line(error)}'
        ) from error
    end = time.perf_counter()
    named = list(mixed.named_parameters())
    bad = [name for name, parameter in named if parameter.grad is not None and not parameter.grad.isfinite().all()]
    if not output.isfinite().all() or bad:
        where = f'gradient of {bad[0]}' if bad else 'output'
        raise ShapeError(f'{where} is not finite for a {size[0]}x{size[1]} image')
    idle = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    if idle:
        more = f' and {len(idle) - 3} more' if len(idle) > 3 else ''
        say(f'basicsr: warning: no gradient for {", ".join(idle[:3])}{more}', file=sys.stderr)
    return (
        f'{size[0]}x{size[1]} -> {output.shape[-2]}x{output.shape[-1]}: forward {middle - start:.2f} s, backward '
        f'{end - middle:.2f} s on {describe_device(device)}, '
        f'gradients of {len(named) - len(idle)} of {len(named)} parameters, all finite'
    )


def _change(before: int, after: int) -> str:
    return f'{100 * (after / before - 1):+.1f} %' if before else ''
