"""Run by test_same_batches.py in a process of its own: the batches that training gets from files and from LMDBs.

  python trained_batches.py FOLDER NUM_PAIRS NUM_ITERATIONS

Cuts photographs into pairs, packs them, and runs `basicsr train` on the files, on their LMDB of PNG files and on that
of pixels, the last with workers. Prints, as JSON, by source: a digest of what the model has on its device in each
iteration, and the losses.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from ast_plugin.cli.main import main as basicsr
from ast_plugin.models.restoration_model import RestorationModel
from benchmarks.data import write_pairs

OPTIONS = """\
name: {name}
model_type: RestorationModel
num_gpu: 0
manual_seed: 11
datasets:
  train:
    name: train
    type: PairsDataset
    dataroot_lq: {lq}
    dataroot_gt: {gt}
    io_backend: {{type: {backend}}}
    gt_size: 32
    batch_size_per_gpu: 4
    num_worker_per_gpu: {workers}
network_g:
  type: AST
  img_size: 32
  embed_dim: 4
  depths: [1, 1, 1, 1, 1, 1, 1, 1, 1]
  num_heads: [1, 1, 1, 1, 1, 1, 1, 1, 1]
path: {{}}
train:
  total_iter: {iterations}
  optim_g: {{type: AdamW, lr: 1e-3}}
  scheduler: {{type: MultiStepLR, milestones: [1000]}}
  pixel_opt: {{type: ASTCharbonnierLoss}}
logger: {{print_freq: 1, save_checkpoint_freq: 1000, use_tb_logger: false}}
"""


def main() -> None:
    """Write, pack, train three times, and tell."""
    root, num_pairs, iterations = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    write_pairs(root / 'files', num_pairs, size=64)
    for encoding in ('png', 'raw'):
        command = ['data', 'lmdb', str(root / 'files'), str(root / encoding), '--encoding', encoding]
        assert basicsr(command) == 0
    runs = {
        'files': (root / 'files/lq', root / 'files/gt', 'disk', 0),
        'png': (root / 'png/lq.lmdb', root / 'png/gt.lmdb', 'lmdb', 0),
        'raw': (root / 'raw/lq.lmdb', root / 'raw/gt.lmdb', 'lmdb', 2),
    }
    report = {}
    for name, (lq, gt, backend, workers) in runs.items():
        options = root / f'{name}.yml'
        text = OPTIONS.format(name=name, lq=lq, gt=gt, backend=backend, workers=workers, iterations=iterations)
        options.write_text(text)
        process = os.fork()
        if process == 0:
            os._exit(train(options, root))
        assert os.waitpid(process, 0)[1] == 0, f'training from {name} failed'
        report[name] = json.loads((root / f'{name}.json').read_text())
    print(json.dumps(report))


def train(options: Path, root: Path) -> int:
    """Train, and write down what came in."""
    seen = {'dtypes': [], 'batches': [], 'images': [], 'losses': []}
    feed_data, optimize = RestorationModel.feed_data, RestorationModel.optimize_parameters

    def watched_feed(self, data):
        feed_data(self, data)
        seen['dtypes'].append(str(data['lq'].dtype))
        numbers = self.lq.numpy().tobytes() + self.gt.numpy().tobytes()
        seen['batches'].append(hashlib.sha256(numbers).hexdigest())
        seen['images'].append([Path(path).name for path in data['lq_path']])

    def watched_step(self, iteration):
        optimize(self, iteration)
        seen['losses'].append(self.log_dict['l_pix'])

    RestorationModel.feed_data, RestorationModel.optimize_parameters = watched_feed, watched_step
    sys.stdout = sys.stderr
    status = basicsr(['train', '-opt', str(options), '--root', str(root)])
    (root / f'{options.stem}.json').write_text(json.dumps(seen))
    return status


if __name__ == '__main__':
    main()
