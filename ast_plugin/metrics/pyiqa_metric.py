"""LPIPS, DISTS, NIQE and whatever else pyiqa measures, behind one registered name. pyiqa is an extra."""

import functools
import importlib
import json
from types import ModuleType
from typing import Any

import numpy as np
import torch

from ast_plugin.errors import BackendUnavailable, OptionError, ShapeError, first_line
from ast_plugin.metrics.toolbox_metrics import from_toolbox
from ast_plugin.suggest import did_you_mean

INSTALL = 'pip install "ast_plugin[metrics]"'
# Of sets of images, not of one.
_OF_SETS = ('fid', 'sfid', 'fid_dinov2', 'inception_score')


def pyiqa(
    img: np.ndarray,
    img2: np.ndarray,
    metric: str,
    crop_border: int = 0,
    input_order: str = 'HWC',
    better: str | None = None,
    **options: Any,
) -> float:
    """Measure one image by a metric of pyiqa, which fetches the metric's weights the first time.

    Args:
        img, img2: the image and its reference, which metrics without reference do not look at; see `toolbox_metrics`.
        metric: its name in pyiqa, such as lpips, dists or niqe.
        crop_border, input_order: as of BasicSR's metrics.
        better: what BasicSR leaves among the options; without effect here.
        options: the metric's own.
    Raises:
        BackendUnavailable: if pyiqa is not installed, or the weights cannot be fetched.
        OptionError: if pyiqa has no such metric, or it measures sets of images.
        ShapeError: if the images are too small for the metric, or differ in size.
    """
    pair = [from_toolbox(image, crop_border, input_order) for image in (img, img2)]
    model = _model(metric, json.dumps(options, sort_keys=True))
    tensors = [
        torch.from_numpy(np.array(image, np.float32).transpose(2, 0, 1)[None]).div(
            255 if image.dtype == np.uint8 else 1
        )
        for image in pair
    ]
    needs_reference = model.metric_mode == 'FR'
    if needs_reference and tensors[0].shape != tensors[1].shape:
        raise ShapeError(f'{metric}: the image is {list(pair[0].shape)} and the reference {list(pair[1].shape)}')
    try:
        with torch.inference_mode():
            value = model(*(tensors if needs_reference else tensors[:1]))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        height, width = pair[0].shape[:2]
        raise ShapeError(f'pyiqa: {metric} fails on {width}x{height} pixels: {first_line(error)}') from error
    return float(value)


def lower_is_better(metric: str) -> bool:
    """Whether less is better, as pyiqa says; nothing is fetched.

    Raises:
        BackendUnavailable, OptionError: see `pyiqa`.
    """
    return bool(_description(metric).get('lower_better'))


def _description(metric: str) -> dict[str, Any]:
    package = _package()
    known = importlib.import_module('pyiqa.default_model_configs').DEFAULT_CONFIGS
    if metric in _OF_SETS:
        raise OptionError(f'pyiqa: {metric} measures sets of images, not one after the other')
    if metric not in known:
        suggestion = did_you_mean(str(metric), known) or f'; it has {", ".join(package.list_models())}'
        raise OptionError(f'pyiqa has no metric {metric}{suggestion}')
    return known[metric]


def _package() -> ModuleType:
    try:
        return importlib.import_module('pyiqa')
    except ModuleNotFoundError as error:
        if error.name != 'pyiqa':
            raise BackendUnavailable(f'pyiqa lacks the package {error.name}: {INSTALL}') from error
        raise BackendUnavailable(f'the package pyiqa is not installed: {INSTALL}') from error


@functools.lru_cache(maxsize=8)
def _model(metric: str, options: str) -> Any:
    """The metric's network, made once; on the GPU where there is one, as pyiqa has it."""
    _description(metric)
    try:
        return _package().create_metric(metric, **json.loads(options))
    except OSError as error:  # of urllib, requests and huggingface_hub alike
        raise BackendUnavailable(
            f'pyiqa: the weights of {metric} cannot be fetched ({first_line(error)}); '
            'where there is a network, use it once there and copy the folders ~/.cache/torch and ~/.cache/huggingface'
        ) from error
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise OptionError(f'pyiqa: {metric} cannot be made with {options}: {first_line(error)}') from error
