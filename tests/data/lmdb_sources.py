"""Pairs for LMDB tests: small noisy images, all different."""

from pathlib import Path

from ast_plugin.data.layouts import Source, list_pairs
from ast_plugin.data.lmdb.writer import Outcome, make_plan, write_lmdbs
from tests.data.images import write_noise


def write_folders(root: Path, count: int, size: tuple[int, int] = (9, 11), seed: int = 0) -> Path:
    """Write `count` pairs of PNG files to root/lq and root/gt."""
    for number in range(count):
        for kind in ('lq', 'gt'):
            write_noise(root / kind / f'{number:03d}.png', [seed, number, kind == 'gt'], size)
    return root


def pack(root: Path, destination: Path, encoding: str = 'png', level: int | None = None, **options) -> Outcome:
    """Pack the pairs of root/lq and root/gt."""
    pairs = list_pairs('folders', Source(dataroot_lq=str(root / 'lq'), dataroot_gt=str(root / 'gt')))
    return write_lmdbs(make_plan(pairs, encoding, level), destination, **options)


def options(lq: Path, gt: Path, **more) -> dict:
    """Return the dataset section for pairs in LMDBs or, by `io_backend`, in folders."""
    return {
        'name': 'test',
        'phase': 'train',
        'scale': 1,
        'gt_size': 6,
        'use_hflip': True,
        'use_rot': True,
        'dataroot_lq': str(lq),
        'dataroot_gt': str(gt),
        'io_backend': {'type': 'lmdb'},
        **more,
    }
