"""Restores and measures a dataset, all processes of a run together."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from basicsr.utils import get_root_logger, tensor2img
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ast_plugin.data.image_files import ImageFile, write_image
from ast_plugin.errors import DataError, PluginError
from ast_plugin.evaluation.protocols import PROTOCOLS, Metrics, Protocol, read_protocol
from ast_plugin.evaluation.results import PictureResult, Ranking, ValidationResults, distinct, thumbnails
from ast_plugin.metrics.registered_metrics import better_direction
from ast_plugin.models.processes import Processes

Restore = Callable[[dict[str, Any]], Mapping[str, Tensor]]
ImagePath = Callable[[str, str, int | str], Path]

_TENSORBOARD_PICTURES = 4
_EXAMPLES = 3  # of the worst pictures of a test, and as many of the best


class Validator:
    """Measures datasets picture by picture; with several processes each takes its share, and all get all results.

    Args:
        metrics: options of each metric, by the name it is printed under.
        processes: those that share the work.
        image_path: where the restored picture of that dataset, name and iteration is to be written.
        num_strips: of how many pictures of a dataset, the first ones, the results carry thumbnails.
        protocol: how results are made and measured.
        num_examples: of how many of the worst and of the best pictures the results carry thumbnails.
    """

    def __init__(
        self,
        metrics: Metrics,
        processes: Processes,
        image_path: ImagePath,
        num_strips: int = 0,
        protocol: Protocol = PROTOCOLS['basicsr'],
        num_examples: int = 0,
    ) -> None:
        self.metrics = metrics
        self.processes = processes
        self.image_path = image_path
        self.num_strips = num_strips
        self.protocol = protocol
        self.num_examples = num_examples
        self.degraded: dict[str, dict[int, dict[str, float]]] = {}  # an input's metrics never change

    @classmethod
    def from_options(cls, opt: Mapping[str, Any], processes: Processes, image_path: ImagePath) -> 'Validator':
        """A validator by `val`, with thumbnails of `logger.tb_pictures` pictures, else 4, where they are shown.

        What `val` leaves out is put in: the protocol's metrics, and of each metric which way is better.
        """
        logger = opt.get('logger') or {}
        shown = logger.get('tb_pictures')
        # BasicSR keeps no TensorBoard log of testing, nor in its debug mode.
        is_shown = opt['is_train'] and logger.get('use_tb_logger') and 'debug' not in opt['name']
        num_strips = (_TENSORBOARD_PICTURES if shown is None else shown) * bool(is_shown)
        val = opt.get('val') or {}
        protocol = read_protocol(val.get('protocol'))
        metrics = protocol.metrics if val.get('metrics') is None else val['metrics']
        # Only where it must be said: other packages' metrics may not take the argument.
        metrics = {
            name: {**options, 'better': 'lower'} if better_direction(options) == 'lower' else dict(options)
            for name, options in metrics.items()
        }
        if opt.get('val') is not None:
            val['metrics'] = metrics
            if not metrics:
                other = '' if protocol.metrics else f', and protocol {protocol.type} has none of its own'
                get_root_logger().warning(f'Nothing is measured: val.metrics names no metric{other}')
        return cls(metrics, processes, image_path, num_strips, protocol, 0 if opt['is_train'] else _EXAMPLES)

    def measure(
        self, restore: Restore, loader: DataLoader, current_iter: int | str = '', save_img: bool = False
    ) -> ValidationResults:
        """Restore a dataset, with the metrics before and after.

        Args:
            restore: gives `lq`, `result` and perhaps `gt` of a sample, [1, C, H, W] in [0, 1].
            loader: gives samples in batches of one.
            current_iter: goes into the names of pictures.
            save_img: write the restored pictures, rounded to 8 bits.
        Returns:
            A row an image, the same in every process.
        Raises:
            PluginError: if a picture cannot be restored or measured; names it.
        """
        dataset = loader.dataset.opt['name']
        pictures: list[PictureResult] = []
        written: dict[int, Path] = {}
        taken: dict[str, None] = {}
        for number, sample in self._bar(loader, dataset):
            path = sample['lq_path'][0]
            try:
                visuals = restore(sample)
                picture = self._measure_picture(dataset, number, Path(path).stem, visuals)
            except PluginError as error:
                error.args = (f'{dataset}: {path}: {error}', *error.args[1:])
                raise
            pictures.append(picture)
            self._keep_examples(pictures)
            if save_img:
                name = distinct(picture.name, taken)
                taken[name] = None
                written[number] = self.image_path(dataset, name, current_iter)
                if self.processes.count > 1:
                    # Which of several namesakes this one is will be known when all have been read.
                    written[number] = written[number].with_name(f'.{number}~{written[number].name}')
                _write(written[number], tensor2img([visuals['result']]))
        results = ValidationResults.collect(dataset, self.processes.gather(pictures), self.ranking())
        names = list(results.restored)
        for number, path in written.items():
            final = self.image_path(dataset, names[number], current_iter)
            if path != final:
                final.parent.mkdir(parents=True, exist_ok=True)
                path.replace(final)
        return results

    def ranking(self) -> Ranking | None:
        """By the first metric."""
        for name, options in self.metrics.items():
            return Ranking(name, better_direction(options) == 'lower', self.num_examples)
        return None

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

    def _measure_picture(self, dataset: str, number: int, name: str, visuals: Mapping[str, Tensor]) -> PictureResult:
        restored, degraded = {}, {}
        if 'gt' in visuals:
            restored = self.protocol.measure(visuals['result'], visuals['gt'], self.metrics)
            known = self.degraded.setdefault(dataset, {})
            if number not in known and visuals['lq'].shape == visuals['gt'].shape:
                known[number] = self.protocol.measure(visuals['lq'], visuals['gt'], self.metrics)
            degraded = known.get(number, {})
        is_shown = number < self.num_strips or (self.num_examples and restored)
        images = [tensor2img([visuals[key]]) for key in ('lq', 'result', 'gt') if is_shown and key in visuals]
        return PictureResult(number, name, restored, degraded, thumbnails(images))

    def _keep_examples(self, pictures: list[PictureResult]) -> None:
        """Of all but the worst and the best so far let the thumbnails go: of a thousand they would fill the memory."""
        ranking = self.ranking()
        if not self.num_examples or ranking is None:
            return
        shown = [place for place, picture in enumerate(pictures) if picture.thumbnails]
        if len(shown) > 2 * self.num_examples:
            shown.sort(key=lambda place: ranking.key(pictures[place].restored))
            middle = shown[self.num_examples]
            pictures[middle] = replace(pictures[middle], thumbnails=())


def _write(path: Path, picture: np.ndarray) -> None:
    """Write BGR or gray, uint8: OpenCV would not say why it cannot, and ends the process at names that are no text."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f'{path.parent}: this folder cannot be made: {error.strerror or error}') from error
    write_image(path, ImageFile(picture if picture.ndim == 2 else picture[..., ::-1]))
