"""Validation: restore and measure a dataset image by image, distributed over all processes of a run."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from ast_plugin.data.contact_sheet import make_thumbnails
from ast_plugin.data.image_files import ImageFile, encode_image
from ast_plugin.devices import AUTO
from ast_plugin.errors import DataError, PluginError, class_of_failure, one_line
from ast_plugin.evaluation.protocols import PROTOCOLS, Metrics, Protocol, read_protocol
from ast_plugin.evaluation.results import ImageResult, Ranking, ValidationResults, distinct
from ast_plugin.files import write_file
from ast_plugin.metrics.psnr_ssim import as_array, to_integers
from ast_plugin.metrics.registered_metrics import better_direction, complete
from ast_plugin.names import printable

ImagePath = Callable[[str, str, int | str], Path]  # (dataset, image name, iteration) -> path

_TENSORBOARD_IMAGES = 4
_EXAMPLES = 3  # number of the worst and of the best images to show


class Validator:
    """Validation of datasets, distributed over processes; every process receives all results.

    Args:
        metrics: metric options by display name.
        image_path: returns the path of a restored image.
        num_strips: number of first images of a dataset for which thumbnails are kept.
        protocol: validation protocol.
        num_examples: number of the worst and of the best images for which thumbnails are kept.
        processes: processes of the run, see `ast_plugin.models.processes.Processes`; None for a single process.
    """

    num_failed = 0  # failed images of all datasets in this process, for the exit status

    def __init__(
        self,
        metrics: Metrics,
        image_path: ImagePath,
        num_strips: int = 0,
        protocol: Protocol = PROTOCOLS['basicsr'],
        num_examples: int = 0,
        processes: Any = None,
    ) -> None:
        self.metrics, self.image_path, self.protocol = metrics, image_path, protocol
        self.num_strips, self.num_examples = num_strips, num_examples
        self.rank, self.world_size = (processes.rank, processes.count) if processes else (0, 1)
        self.gather = processes.gather if processes else list
        rankings = [Ranking(name, better_direction(o) == 'lower', num_examples) for name, o in metrics.items()]
        self.ranking = rankings[0] if rankings else None
        self._degraded: dict[str, dict[int, dict[str, float]]] = {}  # metrics of the inputs, which never change

    @classmethod
    def from_options(cls, opt: Mapping[str, Any], image_path: ImagePath, processes: Any = None) -> 'Validator':
        """Build a validator from the section `val` of the options.

        Adds missing options to `val`: the protocol's metrics, whether lower is better, and the defaults of `complete`.
        If TensorBoard is in use, thumbnails are kept for `logger.tb_pictures` images (default 4).
        """
        logger = opt.get('logger') or {}
        shown = logger.get('tb_pictures')
        # BasicSR writes no TensorBoard log for tests and in debug mode.
        is_shown = opt['is_train'] and logger.get('use_tb_logger') and 'debug' not in opt['name']
        num_strips = (_TENSORBOARD_IMAGES if shown is None else shown) * bool(is_shown)
        val = opt.get('val') or {}
        protocol = read_protocol(val.get('protocol'), opt.get('bit_depth') or 8)
        metrics = protocol.metrics if val.get('metrics') is None else val['metrics']
        # Set `better` only if needed: third-party metrics may not accept the argument.
        metrics = {
            name: {**options, 'better': 'lower'} if better_direction(options) == 'lower' else dict(options)
            for name, options in complete(metrics, opt.get('device') or AUTO, protocol.bit_depth).items()
        }
        if opt.get('val') is not None:
            val['metrics'] = metrics
        return cls(metrics, image_path, num_strips, protocol, 0 if opt['is_train'] else _EXAMPLES, processes)

    def measure(
        self, restore: Callable, loader: DataLoader, current_iter: int | str = '', save_img: bool = False
    ) -> ValidationResults:
        """Restore a dataset and compute metrics before and after restoration.

        Args:
            restore: returns `lq`, `result` and optionally `gt` for a sample, [1, C, H, W] in [0, 1].
            loader: yields samples with batch size 1.
            current_iter: iteration, passed to `image_path`.
            save_img: write the restored images, rounded to the protocol's bit depth.
        Returns:
            Results of all images, identical in every process; failed images have a reason and are excluded from means.
        Raises:
            PluginError: if no image can be restored and measured, or an error is not specific to an image.
        """
        dataset = loader.dataset.opt['name']
        images: list[ImageResult] = []
        written: dict[int, Path] = {}
        taken: dict[str, None] = {}
        for number, sample in self._samples(loader):
            name, stage = name_of(loader.dataset, number), 'unreadable'
            try:
                if isinstance(sample, Exception):
                    raise sample
                name, stage = sample['lq_path'][0], 'network'
                visuals = restore(sample)
                stage = 'metric'
                image = self._measure_image(dataset, number, Path(name).stem, visuals)
            except Exception as error:
                if isinstance(error, PluginError) and name not in str(error):
                    error.args = (f'{dataset}: {name}: {error}', *error.args[1:])
                kind, text = class_of_failure(error, stage), one_line(error)
                if 'Original Traceback' in str(error):  # from a worker; the last line is its message
                    text = str(error).strip().splitlines()[-1]
                image, visuals = ImageResult(number, Path(name).stem, failure=f'{kind}: {text}'), None
            images.append(image)
            self._drop_thumbnails(images)
            name = distinct(image.name, taken)  # failed images, too, have a name in the results
            taken[name] = None
            if save_img and visuals is not None:
                written[number] = self.image_path(dataset, name, current_iter)
                if self.world_size > 1:
                    # Numbers of duplicate names are known only after gathering; renamed below.
                    written[number] = written[number].with_name(f'.{number}{written[number].suffix}')
                pixels = _to_pixels(visuals['result'], self.protocol.bit_depth)
                image_file = ImageFile(pixels if pixels.shape[2] == 3 else pixels[..., 0])
                write_file(written[number], encode_image(written[number], image_file), make_folder=True)
        results = ValidationResults.collect(dataset, self.gather(images), self.ranking)
        self._report_failures(results)
        names = list(results.restored)
        for number, path in written.items():
            final = self.image_path(dataset, names[number], current_iter)
            if path != final:
                final.parent.mkdir(parents=True, exist_ok=True)
                path.replace(final)
        return results

    def _samples(self, loader: DataLoader) -> Iterator[tuple[int, Any]]:
        """Yield index and sample (or the error of reading it) of this process's share, with a progress bar."""
        dataset = loader.dataset
        mine = range(self.rank, len(dataset), self.world_size)
        if self.world_size > 1:
            loader = DataLoader(
                Subset(dataset, mine),
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
            )
        disable = None if self.rank == 0 else True  # None: disabled without a terminal
        samples = iter(loader)
        with tqdm(total=len(mine), desc=dataset.opt['name'], unit='image', leave=False, disable=disable) as bar:
            for number in mine:
                try:
                    sample = next(samples)
                except StopIteration:
                    raise ValueError(f'{dataset.opt["name"]}: the loader yields too few samples') from None
                except Exception as error:  # datasets raise any type
                    if 'DataLoader worker (pid' in str(error):
                        raise  # the worker was killed
                    sample = error
                yield number, sample
                bar.update()

    def _report_failures(self, results: ValidationResults) -> None:
        """Log a warning about failed images; raise DataError if no image has a value."""
        failures, count = results.failures, len(results.restored)
        Validator.num_failed += len(failures)
        if failures and self.rank == 0:
            shown = [f'{name}: {failure}' for name, failure in failures.items()]
            shown = '; '.join(shown) if len(shown) < 4 else f'{shown[0]}; and more'
            line = f'{results.dataset}: {len(failures)} of {count} images failed, excluded from the means: {shown}'
            logging.getLogger('basicsr').warning(printable(line))
        values = [value for image in results.restored.values() for value in image.values()]
        if len(failures) == count and all(map(math.isnan, values)):
            raise DataError(
                f'{results.dataset}: no image can be restored and measured: {next(iter(failures.values()))}'
            )

    def _measure_image(self, dataset: str, number: int, name: str, visuals: Mapping[str, Tensor]) -> ImageResult:
        restored, degraded, failures = {}, {}, []
        if 'gt' in visuals:
            restored = self.protocol.measure(visuals['result'], visuals['gt'], self.metrics, failures.append)
            known = self._degraded.setdefault(dataset, {})
            if number not in known and visuals['lq'].shape == visuals['gt'].shape:
                known[number] = self.protocol.measure(visuals['lq'], visuals['gt'], self.metrics, lambda _: None)
            degraded = known.get(number, {})
        is_shown = number < self.num_strips or (self.num_examples and restored)
        images = [_to_pixels(visuals[key]) for key in ('lq', 'result', 'gt') if is_shown and key in visuals]
        return ImageResult(number, name, restored, degraded, make_thumbnails(images), '; '.join(failures))

    def _drop_thumbnails(self, images: list[ImageResult]) -> None:
        """Drop all thumbnails but those of the worst and the best images so far, to bound memory use."""
        if not self.num_examples or self.ranking is None:
            return
        shown = [place for place, image in enumerate(images) if image.thumbnails]
        if len(shown) > 2 * self.num_examples:
            shown.sort(key=lambda place: self.ranking.key(images[place].restored))
            middle = shown[self.num_examples]
            images[middle] = replace(images[middle], thumbnails=())


def name_of(dataset: Any, number: int) -> str:
    """Return the file of a sample from the dataset's list of pairs, or `image_N` if it has none."""
    pairs = getattr(dataset, 'pairs', None) or getattr(dataset, 'paths', ())  # the plugin's or BasicSR's
    pair = pairs[number] if number < len(pairs) else f'image_{number + 1}'
    return pair if isinstance(pair, str) else pair.lq if hasattr(pair, 'lq') else str(next(iter(pair.values())))


def _to_pixels(image: Tensor, bit_depth: int = 8) -> np.ndarray:
    """Convert a tensor [1, C, H, W], clamped to [0, 1], to an array [H, W, C] of uint8 or uint16."""
    return to_integers(as_array(image.clamp(0, 1)), bit_depth)
