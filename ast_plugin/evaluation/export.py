"""Export of networks to ONNX, TorchScript and torch.export, verified against PyTorch before the file is written.

ONNX uses tracing as well: an AST with dynamic sizes is exported in seconds. torch.export infers symbolic shapes in
every block, which takes minutes of CPU time for the smallest AST with dynamic height and width.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin import __version__
from ast_plugin.archs.networks import any_size, registered_network
from ast_plugin.errors import BackendUnavailable, FileError, MemoryShortage, OptionError, ShapeError, one_line
from ast_plugin.evaluation.cost import SMALL_SIZES, available_bytes, extrapolate, padded_pixels, peak_bytes
from ast_plugin.files import write_file
from ast_plugin.ops import use_backend
from ast_plugin.ops.windows import keep_shape_in_trace

# File extensions of each format. Others are rejected, as programs infer the format from the extension.
FORMATS = {'onnx': ('.onnx',), 'torchscript': ('.pt', '.ts', '.torchscript'), 'torch.export': ('.pt2',)}
OPSET = 17  # first ONNX opset with LayerNormalization; supported by most runtimes
IMAGE, RESTORED = 'image', 'restored'  # names of the input and the output
# Maximum difference to PyTorch in float32, relative to the largest value, by `is_half`.
BOUNDS = {False: 1e-4, True: 1e-2}
_AXES = {0: 'batch', 2: 'height', 3: 'width'}
# (batch, height, width) of test images. The first is traced; it has no 1, as sizes of 1 are specialised in traces.
_SHAPES = ((2, 13, 22), (1, 1, 1), (1, 37, 91), (3, 91, 37), (2, 130, 140))
_EXTRA = 'pip install "ast_plugin[onnx]"'

Run = Callable[[Tensor], Tensor]


class _Exported(nn.Module):
    """Wrapper with float32 input and output for any internal dtype; only `axes` of the input are dynamic."""

    def __init__(self, network: nn.Module, dtype: torch.dtype, axes: Sequence[int]) -> None:
        super().__init__()
        self.network, self.dtype, self.axes = network.to(dtype), dtype, axes

    def forward(self, image: Tensor) -> Tensor:
        shape = [-1 if axis in self.axes else side for axis, side in enumerate(image.shape)]
        return self.network(keep_shape_in_trace(image, shape).to(self.dtype)).float()


def export_network(
    network: nn.Module,
    path: str | os.PathLike,
    file_format: str = 'onnx',
    *,
    channels: int = 3,
    size: tuple[int, int] | None = None,
    is_half: bool = False,
    metadata: Mapping[str, str] | None = None,
    say: Callable[[str], Any] = str,
) -> None:
    """Export a network for another runtime and verify its results against PyTorch.

    The model maps `image`, float32 [B, C, H, W] in [0, 1], to `restored`, float32 [B, D, s·H, s·W], and includes
    padding and cropping. If the trace of a network depends on the batch size, the batch size is fixed to 1.

    Args:
        network: network on the CPU in float32; set to evaluation mode.
        path: output file in an existing folder, with an extension of the format.
        file_format: key of `FORMATS`.
        channels: number of input channels C.
        size: fixed (H, W) with batch size 1; None for dynamic size and batch size.
        is_half: use float16 for weights and activations.
        metadata: additional metadata of the file, next to `batch`, `size`, `precision`, `producer` and `opset`.
        say: called with a line for each compared image.
    Raises:
        BackendUnavailable: if a package is missing.
        FileError: if the file cannot be written.
        MemoryShortage: if tracing at `size` needs more memory than is available.
        OptionError: if the extension does not match the format, or the network cannot be exported in this format or
            size; names the operator, or the image for which the results differ. No file is written.
    """
    check_export(path, file_format)
    name, dtype = type(network).__name__, torch.float16 if is_half else torch.float32
    network = any_size(network.eval(), channels)
    write, read = _CODECS[file_format]

    def export(shapes: Sequence[tuple[int, int, int]], axes: Sequence[int]) -> None:
        """Trace with the first shape (batch, height, width), compare results for all shapes, and write the file."""
        generator = torch.Generator().manual_seed(0)
        images = [torch.rand(batch, channels, *side, generator=generator) for batch, *side in shapes]
        if not axes:
            _check_memory(network, images[0])
        with torch.no_grad():
            expected = [network(image) for image in images]
        facts = {
            'batch': 'dynamic' if 0 in axes else 1,
            'size': 'dynamic' if axes else list(shapes[0][1:]),
            'precision': str(dtype).removeprefix('torch.'),
            'producer': f'ast_plugin {__version__}',
            **({'opset': OPSET} if file_format == 'onnx' else {}),
        }
        texts = {**(metadata or {}), **{key: json.dumps(value) for key, value in facts.items()}}
        with _plain_operators(f'{name} cannot be exported as {file_format}'):
            exported = _Exported(copy.deepcopy(network) if is_half else network, dtype, axes)
            content = write(exported, images[0], axes, expected[0].shape[-1] // images[0].shape[-1], texts)
            run = read(content)
        _compare(run, images, expected, is_half, f'{name} as {file_format}', say)
        write_file(path, content)

    if size is not None:
        export([(1, *size)], ())
        return
    try:
        export(_SHAPES, tuple(_AXES))
    except OptionError:
        export([(1, *side) for _, *side in _SHAPES], tuple(_AXES)[1:])


def check_export(path: str | os.PathLike, file_format: str) -> None:
    """Check path, format and packages before weights are loaded; raises the errors of `export_network`."""
    path = Path(path)
    if file_format not in FORMATS:
        raise OptionError(f'the format is {file_format!r}: expected one of {", ".join(FORMATS)}')
    if path.is_dir() or not path.parent.is_dir():
        why = 'it is a folder' if path.is_dir() else f'the folder {path.parent} does not exist'
        raise FileError(f'{path} cannot be written: {why}; expected a file name in an existing folder')
    if path.suffix.lower() not in FORMATS[file_format]:
        expected = [f'{" or ".join(suffixes)} for {name}' for name, suffixes in FORMATS.items()]
        raise OptionError(
            f'{path}: the extension does not match the format {file_format}: expected {", ".join(expected)}'
        )
    for package in ('onnx', 'onnxruntime') if file_format == 'onnx' else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise BackendUnavailable(f'ONNX needs the package {package}, which is not installed: {_EXTRA}') from error


def network_metadata(options: Mapping[str, Any], of_file: Mapping[str, str]) -> dict[str, str]:
    """Return metadata of a network as JSON strings: its options, `img_size` if it has one, and those of its file."""
    parameter = inspect.signature(registered_network(options['type'])).parameters.get('img_size')
    img_size = options.get('img_size', None if parameter is None else parameter.default)
    own = {'network': dict(options)} | ({} if parameter is None else {'img_size': img_size})
    return {**of_file, **{key: json.dumps(value) for key, value in own.items()}}


@torch.no_grad()
def _compare(
    run: Run, images: Sequence[Tensor], expected: Sequence[Tensor], is_half: bool, what: str, say: Callable[[str], Any]
) -> None:
    bound = BOUNDS[is_half]
    of_size = 'its trace is specialised to the traced size; use --size HxW to export it for one size'
    for number, (image, wanted) in enumerate(zip(images, expected, strict=True)):
        shown = 'x'.join(map(str, image.shape))
        # The first size is the traced one.
        causes = [of_size] * (number > 0) + ['float16 is not precise enough; omit --half'] * is_half
        hint = ', or '.join(causes) or 'an operator of the runtime computes different results'
        try:
            got = run(image)
        except Exception as error:  # each runtime has its own
            raise OptionError(f'{what} fails on {shown}: {hint} ({one_line(error)})') from error
        if got.shape != wanted.shape:
            raise OptionError(f'{what} returns {list(got.shape)} for {shown}, PyTorch {list(wanted.shape)}: {hint}')
        error = float((got - wanted).abs().max() / wanted.abs().max())
        if not error <= bound:
            raise OptionError(f'{what} differs from PyTorch by {error:.1e} at {shown}, more than {bound:.0e}: {hint}')
        say(f'{shown}: matches PyTorch, relative difference {error:.0e}')


def _check_memory(network: nn.Module, image: Tensor) -> None:
    """Raise MemoryShortage if tracing an image would run out of memory, before the system kills the process."""
    multiple, cpu = getattr(network, 'size_multiple', 1), torch.device('cpu')
    height, width = image.shape[-2:]
    if padded_pixels((height, width), multiple) <= padded_pixels(SMALL_SIZES[1], multiple):
        return
    with use_backend('reference'), torch.no_grad():
        images = {size: image.new_zeros(1, image.shape[1], *size) for size in SMALL_SIZES}
        peaks = {size: peak_bytes(partial(network, small), cpu) for size, small in images.items()}
    # Tracing and the other runtime together used a third more memory than a forward pass.
    needed, free = 1.5 * extrapolate((height, width), peaks, multiple), available_bytes(cpu)
    if needed > free:
        raise MemoryShortage(
            f'--size {height}x{width} needs about {needed / 2**30:.1f} GiB for tracing, but '
            f'{free / 2**30:.1f} GiB are available: choose a smaller size, or omit --size to export for all sizes'
        )


@contextmanager
def _plain_operators(what: str) -> Iterator[None]:
    """Use operators that other runtimes support; convert exporter errors to OptionError."""
    try:
        with use_backend('reference'), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # tracer warnings about shape checks; results at other sizes are compared
            yield
    except Exception as error:  # exporters raise many types
        raise OptionError(f'{what}: {type(error).__name__}: {one_line(error)}') from error


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Suppress output to file descriptor 1, to which the exporter prints the graph on failure."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _write_onnx(network: nn.Module, image: Tensor, axes: Sequence[int], scale: int, texts: Mapping[str, str]) -> bytes:
    import onnx

    prefix = '' if scale == 1 else f'{scale}*'
    names = {axis: _AXES[axis] for axis in axes}
    restored = {axis: name if axis == 0 else prefix + name for axis, name in names.items()}
    settings = {'opset_version': OPSET, 'dynamic_axes': {IMAGE: names, RESTORED: restored}}
    settings |= {'input_names': [IMAGE], 'output_names': [RESTORED]}
    buffer = io.BytesIO()
    with _without_stdout():
        torch.onnx.export(network, (image,), buffer, dynamo=False, **settings)
    model = onnx.load_from_string(buffer.getvalue())
    model.producer_name, model.producer_version = 'ast_plugin', __version__
    onnx.helper.set_model_props(model, dict(texts))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def read_onnx(content: bytes) -> Run:
    """Return a function that runs an ONNX model, given as file content, on the CPU with PyTorch's number of threads."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # fatal only; errors are raised
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, settings, providers=['CPUExecutionProvider'])
    return lambda image: torch.from_numpy(session.run([RESTORED], {IMAGE: image.numpy()})[0])


def _write_torchscript(
    network: nn.Module, image: Tensor, axes: Sequence[int], scale: int, texts: Mapping[str, str]
) -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(network, image, check_trace=False), buffer, _extra_files=dict(texts))
    return buffer.getvalue()


def _write_exported(
    network: nn.Module, image: Tensor, axes: Sequence[int], scale: int, texts: Mapping[str, str]
) -> bytes:
    multiple = getattr(network.network, 'size_multiple', 1)
    if axes and multiple != 1:  # torch.export would fail after minutes
        raise ShapeError(
            f'torch.export does not support dynamic sizes padded to a multiple of {multiple}: set --size HxW'
        )
    shapes = {IMAGE: {axis: torch.export.Dim(_AXES[axis]) for axis in axes}}
    program = torch.export.export(network, (image,), dynamic_shapes=shapes, strict=False)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files=dict(texts))
    return buffer.getvalue()


_CODECS = {
    'onnx': (_write_onnx, read_onnx),
    'torchscript': (_write_torchscript, lambda content: torch.jit.load(io.BytesIO(content))),
    'torch.export': (_write_exported, lambda content: torch.export.load(io.BytesIO(content)).module()),
}
