"""Train a small AST on packaged photos with synthetic rain, evaluate it, and plot the results.

  basicsr demo

Requires only the extra `photos` (pip install "ast_plugin[photos]"). Equivalent to the following commands, with the gain
in PSNR printed at the end:

  basicsr train -opt AST_quickstart
  basicsr test -opt AST_quickstart
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from pathlib import Path

from ast_plugin.names import say

OPTION_FILE = 'AST_quickstart'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr demo`."""
    parser.add_argument(
        '--root',
        type=Path,
        default=Path('.'),
        metavar='DIR',
        help='write experiments/ and results/ under DIR (default: working directory)',
    )
    parser.add_argument('--device', default='auto', metavar='NAME', help='auto, cpu, cuda or mps (default: auto)')


def run(args: argparse.Namespace) -> int:
    """Train, test and print the gain in PSNR."""
    root = Path(os.path.expanduser(args.root)).resolve()
    start = time.monotonic()
    where = ['-opt', OPTION_FILE, '--root', str(root), '--device', args.device]
    for command in (['train'], ['test', '--force_yml', 'val:save_img=true']):
        status = subprocess.run([sys.executable, '-m', 'ast_plugin', *command, *where], check=False).returncode
        if status:
            return status
        if command[0] == 'train':
            say(f'Training took {(time.monotonic() - start) / 60:.1f} minutes')
    (table,) = (root / 'results' / OPTION_FILE).glob('*.csv')
    with table.open(encoding='utf-8', newline='') as file:
        *_, mean = csv.DictReader(file)
    gain = float(mean['psnr']) - float(mean['input psnr'])
    sheet = table.with_name(f'{table.stem}_worst_and_best.png')
    say(f'Degraded, restored and clean images side by side: {sheet}', f'PSNR gain over input: {gain:+.2f} dB')
    return 0
