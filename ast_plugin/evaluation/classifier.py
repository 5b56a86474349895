"""Classification of the degradation of an image, to select the weights that restore it."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ast_plugin.archs.state import load_into
from ast_plugin.checkpoints import read_checkpoint
from ast_plugin.data.image_files import downscale
from ast_plugin.evaluation.restorer import Restorer
from ast_plugin.weights import CLASSIFIER, TASKS, find_weights, is_shipped

CLASSES = ('clean', *TASKS)
VIEW = 224  # size of the training crops in pixels
_HEIGHT = 560  # larger images are downscaled to this, as degradations are synthesised at about 500 pixels


class DegradationClassifier(nn.Module):
    """Convolutional classifier of degradations.

    3×3 convolutions with batch norm, followed by global average pooling (for global degradations such as haze) and
    global max pooling (for local ones such as drops and streaks), concatenated, and a linear layer.

    Args:
        widths: numbers of channels; each stage halves the resolution.
    Shape:
        [B, 3, H, W], RGB in [0, 1], H and W at least 32 -> [B, 4], logits in the order of `CLASSES`.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 72)) -> None:
        super().__init__()
        sizes = [(3, widths[0], 2)]
        for before, after in pairwise(widths):
            sizes += [(before, after, 2)] + ([(after, after, 1)] if after > 32 else [])
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(True))
                for before, after, stride in sizes
            )
        )
        self.head = nn.Linear(2 * widths[-1], len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch."""
        maps = self.features(2 * x - 1)
        return self.head(torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1))


@torch.inference_mode()
def classify(image: np.ndarray, network: DegradationClassifier) -> dict[str, float]:
    """Return the probability of each class.

    Averages the prediction for the full image, downscaled to a shorter side of `VIEW`, and the mean prediction for up
    to nine crops. If the shorter side exceeds 560 pixels, the image is downscaled to it before cropping.

    Args:
        image: gray [H, W] or RGB [H, W, 3]; uint8, uint16 or floating point in [0, 1].
        network: classifier in evaluation mode.
    """
    image = downscale(image if image.dtype.kind == 'u' else image.astype(np.float32), _HEIGHT)
    image = image / np.float32(np.iinfo(image.dtype).max if image.dtype.kind == 'u' else 1)
    image = np.repeat(image[..., None], 3, 2) if image.ndim == 2 else image
    height, width = image.shape[:2]
    tops, lefts = (
        np.linspace(0, max(0, side - VIEW), min(3, -(-side // VIEW))).astype(int) for side in (height, width)
    )
    crops = [image[top : top + VIEW, left : left + VIEW] for top in tops for left in lefts]
    whole, parts = (
        network(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float()).softmax(1).mean(0)
        for views in ([downscale(image, VIEW)], crops)
    )
    return dict(zip(CLASSES, ((whole + parts) / 2).tolist(), strict=True))


class Specialists:
    """Restorers for all bundled tasks, selected for each image by its degradation.

    Args:
        options: device, tile, overlap, batch, self_ensemble and processing_resolution, see `Restorer.from_weights`.
    Raises:
        CheckpointError: if this installation does not include the classifier, or a weights file was modified.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.network = DegradationClassifier().eval()
        load_into(self.network, read_checkpoint(find_weights(CLASSIFIER)))
        for task in filter(is_shipped, TASKS):
            find_weights(task)  # raises now, not at the first image that needs the weights
        self.restorers: dict[str, Restorer] = {}

    def choose(self, image: np.ndarray) -> tuple[str, float, Restorer | None]:
        """Return the class of an image (see `classify`), its probability, and the restorer to use.

        The restorer is None for clean images and for degradations without weights in this installation.
        """
        shares = classify(image, self.network)
        kind = max(shares, key=shares.get)
        if kind != 'clean' and is_shipped(kind) and kind not in self.restorers:
            self.restorers[kind] = Restorer.from_task(kind, **self.options)
        return kind, shares[kind], self.restorers.get(kind)
