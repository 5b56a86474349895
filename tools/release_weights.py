"""Add trained weights to the package as the bundled weights of a task, in float16, with a model card and a digest.

    python tools/release_weights.py rain experiments/pretrained_rain/stage_2/models/net_g_best.pth --steps 7500 \\
        --results "synthetic gain"=8.4 "real gain"=9.1

The card records what the options do not, for `basicsr list weights`. See ast_plugin/weights/__init__.py.
"""

import argparse
import datetime
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from ast_plugin import __version__, options, weights
from ast_plugin.archs.networks import build_network
from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.errors import PluginError

PHOTOGRAPHS = [
    {
        'name': 'CID22, training part',
        'number': 188,
        'licence': 'CC BY-SA 4.0, Cloudinary and the photographers it names',
    },
    {'name': 'CLIC 2025, validation part', 'number': 25, 'licence': 'Unsplash License'},
]
MORE_PHOTOGRAPHS = {  # by task; docs/weights.md names the sources
    'metadata-extractor-images by Drew Noakes': ('free for any use', {'raindrop': 166, 'haze': 207}),
    'photographs of Unsplash': ('Unsplash License', {'raindrop': 131, 'haze': 173}),
    'photographs of repositories under the MIT licence': ('MIT', {'raindrop': 132, 'haze': 153}),
    'wallpapers and samples': ('CC0, CC BY, CC BY-SA', {'raindrop': 132, 'haze': 213}),
    'stock photographs of websites': ('Unsplash, Pexels or Pixabay License, by file', {'haze': 580}),
    'credited photographs of websites, most of Wikimedia Commons': (
        'CC BY, CC BY-SA, CC0, GFDL, Free Art, public domain, by file',
        {'haze': 580},
    ),
    'photographs of other repositories': ('public domain, CC0, Apache-2.0, MIT', {'haze': 109}),
}
MAX_BYTES = 8_000_000


def main(argv: list[str] | None = None) -> int:
    """Check that the weights fit the recipe's network, then write them; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', choices=weights.TASKS)
    parser.add_argument('file', type=Path, help='.pth or .safetensors file of a run; averaged weights are preferred')
    parser.add_argument('--steps', type=int, required=True, help='total iterations of all stages')
    parser.add_argument('--results', nargs='+', default=[], metavar='NAME=DB', help='measured results in dB')
    parser.add_argument(
        '--strength',
        type=float,
        default=1.0,
        metavar='FACTOR',
        help="multiply AST's change of the input by this; below 1, clean images are preserved better (default: 1)",
    )
    parser.add_argument(
        '--blend',
        nargs=2,
        action='append',
        default=[],
        metavar=('FILE', 'SHARE'),
        help='average with the weights of another run, of which the average has this share; repeatable, in this order',
    )
    parser.add_argument(
        '--processing-resolution', type=int, metavar='N', help='shorter side to which larger images are downscaled'
    )
    parser.add_argument('--recipe', help='option file of the training (default: pretrained/TASK)')
    parser.add_argument('--date', default=str(datetime.date.today()))
    args = parser.parse_args(argv)
    recipe = args.recipe or f'pretrained/{args.task}'
    try:
        checkpoint = read_checkpoint(args.file)
        options_of_network = options.load(options.find(recipe))['network_g']
        network = build_network(options_of_network)
        load_into(network, checkpoint)
        for file, share in args.blend:
            other = build_network(options_of_network)
            load_into(other, read_checkpoint(Path(file)))
            for parameter, value in zip(network.parameters(), other.parameters(), strict=True):
                parameter.data.lerp_(value.data, float(share))
        if args.strength != 1:
            for parameter in network.output_proj.parameters():
                parameter.data *= args.strength
        card = {
            'recipe': recipe,
            'photographs': PHOTOGRAPHS
            + [
                {'name': name, 'number': numbers[args.task], 'licence': licence}
                for name, (licence, numbers) in MORE_PHOTOGRAPHS.items()
                if args.task in numbers
            ],
            'steps': args.steps,
            'strength': args.strength,
            'blend': [float(share) for _, share in args.blend],
            'date': args.date,
            'results': {name: float(value) for name, _, value in (text.rpartition('=') for text in args.results)},
            'version': __version__,
        }
        if args.processing_resolution:
            card['processing_resolution'] = args.processing_resolution
        path = weights.release(args.task, network.state_dict(), options_of_network, card)
    except (PluginError, ValueError) as error:  # ValueError: a share or a result that is no number
        print(f'release_weights: error: {error}', file=sys.stderr)
        return 2
    size = path.stat().st_size
    print(f'{path}: {size / 1e6:.2f} MB')
    return int(size > MAX_BYTES)


if __name__ == '__main__':
    sys.exit(main())
