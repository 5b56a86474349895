"""Train the classifier that selects the weights for an image, on synthetic degradations of clean photos.

    python tools/train_classifier.py PHOTOS samples.npz                 synthesise views of degraded and clean images
    python tools/train_classifier.py PHOTOS samples.npz -o NEW.safetensors --val OTHER_PHOTOS

The samples are synthesised if the file does not exist, otherwise they are read from it. A photo is cropped to a square,
resized to 300 to 700 pixels and colour-graded, then degraded by rain, raindrops, haze or nothing. Noise and compression
are added at random, independently of the class. Each image gives two views: the whole image, downscaled, and a crop.
See docs/weights.md for results.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).parents[1]))

from ast_plugin import __version__, weights
from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import read_checkpoint, save_weights
from ast_plugin.data.image_files import read_rgb
from ast_plugin.degradations import DEGRADATIONS
from ast_plugin.evaluation.classifier import CLASSES, VIEW, DegradationClassifier, classify

HEIGHTS = (300, 700)  # pixels; degradations are designed for images about 500 pixels high
FAINT = 34.0  # dB; weaker degradations are sampled again
BATCH = 32
NETWORK = {'type': 'DegradationClassifier'}


def find_photos(folder: Path) -> list[Path]:
    """Return the sorted image files of a folder."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in ('.webp', '.png', '.jpg', '.jpeg'))


def psnr(image: np.ndarray, reference: np.ndarray) -> float:
    """Return the PSNR in dB of images in [0, 1]."""
    return float(-10 * np.log10(np.mean((image - reference) ** 2) + 1e-12))


def grade(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Darken, tint, fade or blur an image at random: variations that are not degradations of any class."""
    if generator.random() < 0.5:
        image = image ** np.float32(np.exp(generator.uniform(np.log(0.75), np.log(3))))
    if generator.random() < 0.3:
        image = np.clip(image * generator.uniform(0.82, 1.15, 3).astype(np.float32), 0, 1)
    if generator.random() < 0.25:
        fade = np.float32(generator.uniform(0, 0.14))
        image = (1 - fade) * image + fade * np.float32(generator.uniform(0, 0.8))
    if generator.random() < 0.2:
        image = cv2.GaussianBlur(image, (0, 0), generator.uniform(0.5, 2.0))
    return image


def record(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Add camera noise and JPEG compression at random; return [H, W, 3] uint8."""
    if generator.random() < 0.35:
        image = image + generator.normal(0, generator.uniform(0.002, 0.03), image.shape).astype(np.float32)
    image = (255 * image).round().clip(0, 255).astype(np.uint8)
    if generator.random() < 0.6:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(generator.uniform(40, 97))]
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        bgr = cv2.imdecode(cv2.imencode('.jpg', bgr, quality)[1], cv2.IMREAD_COLOR)
        image = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    return image


def degrade(image: np.ndarray, kind: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    """Degrade an image according to its class; a quarter of the clean images are degraded imperceptibly."""
    if kind == 0 and generator.random() < 0.75:
        return image, None
    row = DEGRADATIONS[CLASSES[kind or generator.integers(1, len(CLASSES))]]
    for _ in range(4):
        degraded, mask = row.apply(image, generator, row.parameters())
        if psnr(degraded, image) < FAINT:
            break
    return (degraded, mask) if kind else (image + np.float32(0.07) * (degraded - image), None)


def make_views(photo: np.ndarray, kind: int, generator: np.random.Generator) -> list[np.ndarray]:
    """Degrade a photo; return the whole image, downscaled, and a crop that shows the degradation."""
    height, width = photo.shape[:2]
    side = min(height, width)
    top, left = generator.integers(height - side + 1), generator.integers(width - side + 1)
    goal = int(generator.uniform(*HEIGHTS))
    image = cv2.resize(
        photo[top : top + side, left : left + side],
        (goal, goal),
        interpolation=cv2.INTER_AREA if goal < side else cv2.INTER_CUBIC,
    )
    image = grade(image.astype(np.float32) / 255, generator)
    degraded, mask = degrade(image, kind, generator)
    seen = record(degraded, generator)
    for _ in range(8):
        y, x = generator.integers(goal - VIEW + 1, size=2)
        if mask is None or mask[y : y + VIEW, x : x + VIEW].mean() > mask.mean() / 2:
            break
    views = [cv2.resize(seen, (VIEW, VIEW), interpolation=cv2.INTER_AREA), seen[y : y + VIEW, x : x + VIEW]]
    return [view[:, ::-1] if generator.random() < 0.5 else view for view in views]


def make_samples(folder: Path, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return views [2 count, VIEW, VIEW, 3] uint8 and their classes [2 count]."""
    photos = [read_rgb(path) for path in find_photos(folder)]
    views = np.empty((2 * count, VIEW, VIEW, 3), np.uint8)
    for number in range(count):
        generator = np.random.default_rng([seed, number])
        photo = photos[generator.integers(len(photos))]
        views[2 * number : 2 * number + 2] = make_views(photo, number % len(CLASSES), generator)
        if (number + 1) % 200 == 0:
            print(f'{number + 1} of {count} images', flush=True)
    return views, np.repeat(np.arange(count) % len(CLASSES), 2)


def train(
    views: np.ndarray, kinds: np.ndarray, epochs: int, seed: int, rate: float, init: Path | None
) -> DegradationClassifier:
    """Train the network with cross-entropy and a one-cycle schedule; return the averaged network.

    Args:
        views, kinds: samples of `make_samples`.
        epochs: passes over the samples.
        seed: seed of initialisation and order.
        rate: maximum learning rate.
        init: file of weights to start from, or None.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    network = DegradationClassifier()
    if init:
        load_into(network, read_checkpoint(init))
    network = network.to(memory_format=torch.channels_last)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=True)
    steps = epochs * (len(views) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        order, losses, right, start = generator.permutation(len(views)), [], [], time.process_time()
        for first in range(0, len(views) - BATCH + 1, BATCH):
            chosen = order[first : first + BATCH]
            images = torch.from_numpy(views[chosen]).permute(0, 3, 1, 2).float() / 255
            if generator.random() < 0.5:  # colours are not informative, and there are few photos
                images = images[:, generator.permutation(3)]
            images = images * torch.empty(BATCH, 1, 1, 1).uniform_(0.8, 1.1)
            images = images.flip(-1) if generator.random() < 0.5 else images
            targets = torch.from_numpy(kinds[chosen])
            scores = network(images.clamp(0, 1).contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(scores, targets, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(network)
            losses.append(loss.item())
            right.append((scores.argmax(1) == targets).float().mean().item())
        seconds = time.process_time() - start
        print(f'{epoch + 1}: loss {np.mean(losses):.3f}, accuracy {np.mean(right):.3f}, {seconds:.0f} s', flush=True)
    return averaged.module.eval()


def judge(network: DegradationClassifier, folder: Path, seed: int = 7) -> float:
    """Print the confusion matrix on whole photos, each degraded once per class; return the accuracy."""
    table = np.zeros((len(CLASSES), len(CLASSES)), int)
    for number, path in enumerate(find_photos(folder)):
        photo = read_rgb(path).astype(np.float32) / 255
        for kind, name in enumerate(CLASSES):
            image = photo
            if kind:
                row = DEGRADATIONS[name]
                image = row.apply(photo, np.random.default_rng([seed, number]), row.parameters())[0]
            shares = classify((255 * image).round().clip(0, 255).astype(np.uint8), network)
            answer = max(shares, key=shares.get)
            table[kind, CLASSES.index(answer)] += 1
            if answer != name:
                print(f'{path.name}: {name} classified as {answer}: {shares[answer]:.2f}')
    print(f'rows: true class, columns: predicted class, {", ".join(CLASSES)}\n{table}')
    return float(np.trace(table) / table.sum())


def main() -> None:
    """Synthesise or read the samples; train and write weights if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('photos', type=Path)
    parser.add_argument('samples', type=Path)
    parser.add_argument('-o', '--output', type=Path)
    parser.add_argument('--val', type=Path, help='folder of photos to evaluate the network on')
    parser.add_argument('--release', action='store_true', help='make the result the bundled classifier of the package')
    parser.add_argument('--count', type=int, default=3000, help='degraded images to synthesise')
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rate', type=float, default=3e-3, help='maximum learning rate')
    parser.add_argument('--init', type=Path, help='weights to start from (default: random)')
    args = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    if not args.samples.exists():
        views, kinds = make_samples(args.photos, args.count, args.seed)
        np.savez(args.samples, views=views, kinds=kinds)
    if args.output is None:
        return
    with np.load(args.samples) as samples:
        views, kinds = samples['views'], samples['kinds']
    network = train(views, kinds, args.epochs, args.seed, args.rate, args.init)
    card = {'steps': args.epochs * (len(views) // BATCH), 'version': __version__}
    if args.val:
        share = judge(network, args.val)
        print(f'accuracy: {share:.3f}')
        card['results'] = {'share of unseen synthetic images that is right': round(share, 3)}
    save_weights(args.output, network.state_dict(), NETWORK, card)
    if args.release:
        print(weights.release(weights.CLASSIFIER, network.state_dict(), NETWORK, card))


if __name__ == '__main__':
    main()
