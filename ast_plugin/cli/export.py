"""Export a network with its weights for other runtimes. The file is written only if its outputs match PyTorch's.

    basicsr export --task rain -o rain.onnx
    basicsr export --weights net_g_best.safetensors -o network.onnx --half
    basicsr export --weights net_g_best.safetensors -o network.pt --format torchscript --size 480x720

The exported network maps `image`, float32 [batch, channels, height, width] in [0, 1], to `restored`, and includes
padding and cropping. The metadata contains the network options, img_size, recipe and version, each value as JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from ast_plugin.cli import commands
from ast_plugin.cli.info import parse_size
from ast_plugin.errors import OptionError
from ast_plugin.names import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr export`."""
    commands.add_weights_arguments(parser)
    add = parser.add_argument
    add('-o', '--output', required=True, metavar='FILE', help='output file: .onnx, .pt or .pt2, matching the format')
    add(
        '--format',
        choices=('onnx', 'torchscript', 'torch.export'),
        default='onnx',
        help='export format (default: %(default)s)',
    )
    add(
        '--size',
        default='dynamic',
        metavar='HxW',
        help='export for single images of this size; dynamic (default) accepts any size and batch size',
    )
    add('--half', action='store_true', help='compute in float16; inputs and outputs stay float32')


def run(args: argparse.Namespace) -> int:
    """Export the network, and print the images on which it was compared with PyTorch."""
    commands.check_weights_arguments(args)
    size = None if args.size == 'dynamic' else parse_size(args.size)
    from ast_plugin.archs.networks import input_channels, load_file
    from ast_plugin.evaluation.export import check_export, export_network, network_metadata
    from ast_plugin.weights import find_weights, resolve_weights

    output = Path(os.path.expanduser(args.output))
    check_export(output, args.format)
    path = resolve_weights(args.weights) if args.task is None else find_weights(args.task)
    if output.exists() and output.samefile(path):
        raise OptionError(f'--output {output} is the weights file itself: expected another file name')
    loaded = load_file(path, None if args.opt is None else commands.read_network(args.opt), args.param_key)
    for note in loaded.report[1:]:
        say(f'note: {path}: {note}', file=sys.stderr)
    export_network(
        loaded.network,
        output,
        args.format,
        channels=input_channels(loaded.options, loaded.network),
        size=size,
        is_half=args.half,
        metadata=network_metadata(loaded.options, loaded.metadata),
        say=partial(say, file=sys.stderr),
    )
    say(f'{output}: {loaded.options["type"]} as {args.format}, {output.stat().st_size / 1e6:.1f} MB')
    return 0
