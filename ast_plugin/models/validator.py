"""Restores and measures a dataset, all processes of a run together."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from basicsr.metrics import calculate_metric
from basicsr.utils import imwrite, tensor2img
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ast_plugin.models.processes import Processes
from ast_plugin.models.results import PictureResult, ValidationResults, distinct, side_by_side

Restore = Callable[[dict[str, Any]], Mapping[str, Tensor]]
ImagePath = Callable[[str, str, int | str], Path]

_TENSORBOARD_PICTURES = 4


class Validator:
    """Measures datasets picture by picture; with several processes each takes its share, and all get all results.

    Args:
        metrics: options of each metric, by the name it is printed under.
        processes: those that share the work.
        image_path: where the restored picture of that dataset, name and iteration is to be written.
        num_strips: of how many pictures of a dataset the results carry a strip to look at.
    """

    def __init__(
        self,
        metrics: Mapping[str, Mapping[str, Any]],
        processes: Processes,
        image_path: ImagePath,
        num_strips: int = 0,
    ) -> None:
        self.metrics = metrics
        self.processes = processes
        self.image_path = image_path
        self.num_strips = num_strips
        self.degraded: dict[str, dict[int, dict[str, float]]] = {}  # an input's metrics never change

    @classmethod
    def from_options(cls, opt: Mapping[str, Any], processes: Processes, image_path: ImagePath) -> 'Validator':
        """A validator by `val.metrics`, with strips where they are shown: `logger.tb_pictures` of them, else 4."""
        logger = opt.get('logger') or {}
        shown = logger.get('tb_pictures')
        # BasicSR keeps no TensorBoard log of testing, nor in its debug mode.
        is_shown = opt['is_train'] and logger.get('use_tb_logger') and 'debug' not in opt['name']
        metrics = (opt.get('val') or {}).get('metrics') or {}
        return cls(metrics, processes, image_path, (_TENSORBOARD_PICTURES if shown is None else shown) * bool(is_shown))

    def measure(
        self, restore: Restore, loader: DataLoader, current_iter: int | str = '', save_img: bool = False
    ) -> ValidationResults:
        """Restore a dataset, with the metrics before and after.

        Args:
            restore: gives `lq`, `result` and perhaps `gt` of a sample, [1, C, H, W] in [0, 1].
            loader: gives samples in batches of one.
            current_iter: goes into the names of pictures.
            save_img: write the restored pictures.
        Returns:
            A row an image, the same in every process. Pictures are rounded to 8 bits first, as BasicSR does.
        """
        dataset = loader.dataset.opt['name']
        pictures: list[PictureResult] = []
        written: dict[int, Path] = {}
        taken: dict[str, None] = {}
        for number, sample in self._bar(loader, dataset):
            visuals = restore(sample)
            images = {key: tensor2img([visuals[key]]) for key in ('lq', 'result', 'gt') if key in visuals}
            picture = self._measure_picture(dataset, number, Path(sample['lq_path'][0]).stem, images)
            pictures.append(picture)
            if save_img:
                name = distinct(picture.name, taken)
                taken[name] = None
                written[number] = self.image_path(dataset, name, current_iter)
                if self.processes.count > 1:
                    # Which of several namesakes this one is will be known when all have been read.
                    written[number] = written[number].with_name(f'.{number}~{written[number].name}')
                imwrite(images['result'], str(written[number]))
        results = ValidationResults.collect(dataset, self.processes.gather(pictures))
        names = list(results.restored)
        for number, path in written.items():
            final = self.image_path(dataset, names[number], current_iter)
            if path != final:
                final.parent.mkdir(parents=True, exist_ok=True)
                path.replace(final)
        return results

    def _bar(self, loader: DataLoader, dataset: str) -> tqdm:
        rank, count = self.processes.rank, self.processes.count
        return tqdm(
            self.processes.share(loader),
            total=len(range(rank, len(loader.dataset), count)),
            desc=dataset,
            unit='image',
            leave=False,
            disable=None if rank == 0 else True,
        )

    def _measure_picture(self, dataset: str, number: int, name: str, images: Mapping[str, np.ndarray]) -> PictureResult:
        restored, degraded = {}, {}
        if 'gt' in images:
            restored = self._values(images['result'], images['gt'])
            known = self.degraded.setdefault(dataset, {})
            if number not in known and images['lq'].shape == images['gt'].shape:
                known[number] = self._values(images['lq'], images['gt'])
            degraded = known.get(number, {})
        strip = side_by_side(images.values()) if number < self.num_strips else None
        return PictureResult(number, name, restored, degraded, strip)

    def _values(self, image: np.ndarray, reference: np.ndarray) -> dict[str, float]:
        data = {'img': image, 'img2': reference}
        return {metric: float(calculate_metric(data, options)) for metric, options in self.metrics.items()}
