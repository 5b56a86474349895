"""Small run for tests: four pairs of 40x40 pixels, a network with a thousand weights, four iterations."""

from pathlib import Path

import cv2
import numpy as np

OPTIONS = """\
# A tiny run for tests.
name: tiny
model_type: SRModel
num_gpu: 0
manual_seed: 1
datasets:
  train:
    name: train
    type: PairedImageDataset
    dataroot_lq: data/lq
    dataroot_gt: data/gt
    io_backend: {type: disk}
    gt_size: 32
    use_hflip: true
    use_rot: true
    num_worker_per_gpu: 0
    batch_size_per_gpu: 2
  val:
    name: val
    type: PairedImageDataset
    dataroot_lq: data/lq
    dataroot_gt: data/gt
    io_backend: {type: disk}
network_g: {type: SRVGGNetCompact, num_feat: 8, num_conv: 1, upscale: 1}
path: {strict_load_g: true}
train:
  total_iter: 4
  optim_g: {type: AdamW, lr: 1e-4, betas: [0.9, 0.99]}
  scheduler: {type: MultiStepLR, milestones: [2], gamma: 0.5}
  pixel_opt: {type: L1Loss, loss_weight: 1.0}
val:
  val_freq: !!float 2
  save_img: false
  metrics:
    psnr: {type: calculate_psnr, crop_border: 0, test_y_channel: false}
logger: {print_freq: 1, save_checkpoint_freq: !!float 2, use_tb_logger: false}
"""


def write(folder: Path, num_pairs: int = 4) -> Path:
    """Write the pairs and the option file into `folder` and return the path of the file."""
    generator = np.random.default_rng(0)
    for kind in ('lq', 'gt'):
        (folder / 'data' / kind).mkdir(parents=True)
    for number in range(num_pairs):
        clean = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / 'data' / 'gt' / f'{number}.png'), clean)
        cv2.imwrite(str(folder / 'data' / 'lq' / f'{number}.png'), clean // 2)
    file = folder / 'tiny.yml'
    file.write_text(OPTIONS, encoding='utf-8')
    return file
