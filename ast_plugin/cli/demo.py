"""Train a small AST on packaged photographs with synthetic rain, measure it, and show what it does.

  basicsr demo

Nothing is needed beside the extra `photos` (pip install "ast_plugin[photos]"). It does what these two do, and draws
the result:

  basicsr train -opt AST_quickstart
  basicsr test -opt AST_quickstart
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

from ast_plugin import options
from ast_plugin.names import say

OPTION_FILE = 'AST_quickstart'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr demo`."""
    parser.add_argument(
        '--root',
        type=Path,
        default=Path('.'),
        metavar='DIR',
        help='write experiments/ and results/ under DIR instead of the working directory',
    )
    parser.add_argument('--device', default='auto', metavar='NAME', help='auto, cpu, cuda or mps (default: auto)')


def run(args: argparse.Namespace) -> int:
    """Train, test, draw, and print the gain."""
    root = args.root.expanduser().resolve()
    start = time.monotonic()
    where = ['-opt', OPTION_FILE, '--root', str(root), '--device', args.device]
    for command in (['train'], ['test', '--force_yml', 'val:save_img=true']):
        status = subprocess.run([sys.executable, '-m', 'ast_plugin', *command, *where], check=False).returncode
        if status:
            return status
        if command[0] == 'train':
            say(f'Training took {(time.monotonic() - start) / 60:.1f} minutes')
    return _show(root)


def _show(root: Path) -> int:
    """Draw each validation image rainy, restored and clean, and print the mean gain."""
    from ast_plugin.data.contact_sheet import Cell, draw_contact_sheet, save_sheet
    from ast_plugin.data.image_files import read_rgb
    from ast_plugin.models.preflight import load_registered

    datasets = load_registered().by_kind['dataset']
    opt = options.prepare(options.load(options.find(OPTION_FILE)), root=root, is_train=False, dataset_types=datasets)
    validation = opt['datasets']['val']
    results = Path(opt['path']['results_root'])
    with (results / f'{validation["name"]}.csv').open(encoding='utf-8', newline='') as file:
        measured = {row['image']: row for row in csv.DictReader(file)}
    rows = []
    for sample in datasets[validation['type']](validation):
        name = Path(sample['lq_path']).stem
        before, after = (
            f'{float(measured[name][f"{prefix}psnr"]):.2f} dB, SSIM {float(measured[name][f"{prefix}ssim"]):.3f}'
            for prefix in ('input ', '')
        )
        restored = read_rgb(results / 'visualization' / validation['name'] / f'{name}_{opt["name"]}.png')
        rows.append(
            [
                Cell(_to_uint8(sample['lq']), f'{name}: {before}'),
                Cell(restored, after),
                Cell(_to_uint8(sample['gt']), 'never seen in training'),
            ]
        )
    path = results / 'rain_restored_clean.png'
    save_sheet(draw_contact_sheet(['rainy', 'restored', 'clean'], rows), path)
    mean = measured['mean']
    gain = float(mean['psnr']) - float(mean['input psnr'])
    say(f'Rainy, restored and clean, side by side: {path}', f'PSNR gain over input: {gain:+.2f} dB')
    return 0


def _to_uint8(image):
    """A tensor [3, H, W] in [0, 1] as uint8 RGB, [H, W, 3]."""
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
