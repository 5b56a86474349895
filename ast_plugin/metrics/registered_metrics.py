"""Metrics in BasicSR's registry: PSNR and SSIM as defined in papers, and `pyiqa` for every metric of that package.

Images are passed as in BasicSR: BGR or gray, [H, W, 3], [H, W, 1] or [H, W], in [0, 255]. BasicSR's model rounds them
to uint8; floating-point images are measured without rounding, as by BasicSR's `calculate_psnr` and `calculate_ssim`.
"""

import functools
import importlib
import json
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch

from ast_plugin.devices import AUTO, find_device
from ast_plugin.errors import BackendUnavailable, OptionError, ShapeError, did_you_mean, first_line
from ast_plugin.metrics.psnr_ssim import (
    fractions,
    from_toolbox,
    psnr_rgb,
    psnr_y_float,
    psnr_y_matlab,
    ssim_rgb,
    ssim_y_matlab,
)

_LOWER_IS_BETTER = ('calculate_niqe', 'calculate_fid')
_INSTALL = 'pip install "ast_plugin[metrics]"'
_SET_METRICS = ('fid', 'sfid', 'fid_dinov2', 'inception_score')  # metrics of pyiqa for sets of images


def _metric(name: str, measure: Callable[..., float], what: str, rounds: bool = False) -> Callable[..., float]:
    """Wrap `measure` as a metric of BasicSR, which passes arguments by these names.

    `bit_depth`, set by the run, applies to metrics that round.
    """

    def calculate(
        img: np.ndarray,
        img2: np.ndarray,
        crop_border: int = 0,
        input_order: str = 'HWC',
        bit_depth: Literal[8, 16] = 8,
        **kwargs,
    ) -> float:
        pair = (from_toolbox(image, crop_border, input_order) for image in (img, img2))
        return measure(*pair, **({'bit_depth': bit_depth} if rounds else {}))

    calculate.__name__ = calculate.__qualname__ = name
    calculate.__doc__ = f'{what}: see `{measure.__name__}`.'
    return calculate


calculate_psnr_matlab = _metric('calculate_psnr_matlab', psnr_y_matlab, 'PSNR of the rounded luma, as in MATLAB', True)
calculate_ssim_matlab = _metric('calculate_ssim_matlab', ssim_y_matlab, 'SSIM of the rounded luma, as in MATLAB', True)
calculate_psnr_skimage = _metric('calculate_psnr_skimage', psnr_rgb, 'PSNR of unrounded RGB, as in scikit-image')
calculate_ssim_skimage = _metric('calculate_ssim_skimage', ssim_rgb, 'SSIM of unrounded RGB, as in scikit-image')
calculate_psnr_y_float = _metric(
    'calculate_psnr_y_float', psnr_y_float, 'PSNR of the unrounded luma, with which the authors select weights'
)


def pyiqa(
    img: np.ndarray,
    img2: np.ndarray,
    metric: str,
    crop_border: int = 0,
    input_order: str = 'HWC',
    better: str | None = None,
    device: str = AUTO,
    **options: Any,
) -> float:
    """Measure one image with a metric of pyiqa (lpips, dists, niqe …), which downloads the metric's weights once.

    Args:
        img, img2: the image and its reference, which no-reference metrics ignore.
        metric: name of the metric in pyiqa.
        crop_border, input_order: as in BasicSR's metrics.
        better: passed by BasicSR; no effect.
        device: device of the metric's network, see `ast_plugin.devices.find_device`.
        options: further options of the metric.
    Raises:
        BackendUnavailable: if pyiqa is not installed, or the weights cannot be downloaded.
        OptionError: if pyiqa has no such metric, the metric is for sets of images, or the device is not available.
        ShapeError: if the images are too small for the metric, or their sizes differ.
    """
    pair = [from_toolbox(image, crop_border, input_order) for image in (img, img2)]
    model = _pyiqa_model(metric, json.dumps(options, sort_keys=True), device)
    tensors = [torch.from_numpy(np.ascontiguousarray(fractions(image).transpose(2, 0, 1)[None])) for image in pair]
    tensors = [tensor.float().expand(-1, 3, -1, -1) for tensor in tensors]  # gray to three equal channels
    needs_reference = model.metric_mode == 'FR'
    if needs_reference and tensors[0].shape != tensors[1].shape:
        raise ShapeError(f'{metric}: the image is {list(pair[0].shape)} and the reference {list(pair[1].shape)}')
    try:
        with torch.inference_mode():
            return float(model(*(tensors if needs_reference else tensors[:1])))
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        height, width = pair[0].shape[:2]
        raise ShapeError(f'pyiqa: {metric} fails on {width}x{height} pixels: {first_line(error)}') from error


def better_direction(options: Mapping[str, Any]) -> str:
    """Return 'higher' or 'lower' for a metric: its option `better`, else the default of its `type`."""
    if options.get('better'):
        return options['better']
    if options['type'] == 'pyiqa':
        return 'lower' if _pyiqa_entry(options['metric']).get('lower_better') else 'higher'
    return 'lower' if options['type'] in _LOWER_IS_BETTER else 'higher'


def complete(
    metrics: Mapping[str, Mapping[str, Any]], device: torch.device | str = AUTO, bit_depth: int = 8
) -> dict[str, dict[str, Any]]:
    """Complete the options of metrics with the device and bit depth of the run.

    Args:
        metrics: options by printed name, each with a `type`.
        device: device of metrics that are networks (pyiqa).
        bit_depth: bit depth of the images, for metrics that round; the default 8 is not set.
    """
    completed = {'pyiqa': {'device': str(device)}}
    if bit_depth != 8:
        completed |= {name: {'bit_depth': bit_depth} for name in ('calculate_psnr_matlab', 'calculate_ssim_matlab')}
    return {name: {**options, **completed.get(options['type'], {}), **options} for name, options in metrics.items()}


@functools.lru_cache(maxsize=8)
def _pyiqa_model(metric: str, options: str, device: str) -> Any:
    """Build a metric's network; results are cached."""
    _pyiqa_entry(metric)
    try:
        return _pyiqa_package().create_metric(metric, device=find_device(device), **json.loads(options))
    except OSError as error:  # of urllib, requests and huggingface_hub alike
        raise BackendUnavailable(
            f'pyiqa: the weights of {metric} cannot be downloaded ({first_line(error)}); without network access, run '
            'the metric on another machine and copy its folders ~/.cache/torch and ~/.cache/huggingface'
        ) from error
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise OptionError(f'pyiqa: {metric} cannot be built with {options}: {first_line(error)}') from error


def _pyiqa_entry(metric: str) -> dict[str, Any]:
    """Return the entry of a metric in pyiqa's table, without downloading anything."""
    package = _pyiqa_package()
    known = importlib.import_module('pyiqa.default_model_configs').DEFAULT_CONFIGS
    if metric in _SET_METRICS:
        raise OptionError(f'pyiqa: {metric} measures sets of images, not single images')
    if metric not in known:
        suggestion = did_you_mean(str(metric), known) or f'; available: {", ".join(package.list_models())}'
        raise OptionError(f'pyiqa has no metric {metric}{suggestion}')
    return known[metric]


def _pyiqa_package() -> ModuleType:
    try:
        return importlib.import_module('pyiqa')
    except ModuleNotFoundError as error:
        if error.name != 'pyiqa':
            raise BackendUnavailable(f'pyiqa lacks the package {error.name}: {_INSTALL}') from error
        raise BackendUnavailable(f'the package pyiqa is not installed: {_INSTALL}') from error
