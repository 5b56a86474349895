"""Networks as files for other runtimes, ONNX, TorchScript and torch.export, compared with PyTorch before they are kept.

ONNX comes from a trace, too: one of AST takes images of any size and is written in seconds. torch.export reasons about
the shapes of each block: for the smallest AST with any height and width that took minutes of processor time.
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

# Formats, and what their files may end in: with an ending of another kind, a file would be taken for what it is not.
FORMATS = {'onnx': ('.onnx',), 'torchscript': ('.pt', '.ts', '.torchscript'), 'torch.export': ('.pt2',)}
OPSET = 17  # of ONNX; the first with LayerNormalization, and what most runtimes read
IMAGE, RESTORED = 'image', 'restored'  # names of the input and the output
# Of the difference to PyTorch in float32, as a share of the largest value; by is_half.
BOUNDS = {False: 1e-4, True: 1e-2}
_AXES = {0: 'batch', 2: 'height', 3: 'width'}
# Batch, height and width of images. It is traced with the first: none of it is 1, which shapes treat in its own way.
_SHAPES = ((2, 13, 22), (1, 1, 1), (1, 37, 91), (3, 91, 37), (2, 130, 140))
_EXTRA = 'pip install "ast_plugin[onnx]"'

Run = Callable[[Tensor], Tensor]


class _Exported(nn.Module):
    """A network as it is written: float32 comes in and goes out, whatever it computes in; only `axes` may change."""

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
    """Write a network for another runtime, after that has restored images as PyTorch does.

    The file takes `image`, float32 [B, C, H, W] in [0, 1], and gives `restored`, float32 [B, D, s·H, s·W]. Padding to
    what the network needs, and cropping, lie in it. A network that computes with the number of images that it was
    traced with takes single ones.

    Args:
        network: on the CPU, in float32; it is put into evaluation mode.
        path: the file, in a folder that is there, with an ending of the format.
        file_format: one of `FORMATS`.
        channels: C.
        size: (H, W) of the only images that will be taken, one at a time; None for all sizes and batches.
        is_half: weights and activations are float16.
        metadata: texts by name, which the file carries beside `opset`, `size`, `precision` and `producer`.
        say: called with a line for each image that was compared.
    Raises:
        BackendUnavailable: if a package is missing.
        FileError: if the file cannot be written.
        MemoryShortage: if a pass at `size` needs more memory than is free.
        OptionError: if the path does not end as the format's files do, or the network cannot be written in this format
            or size; names the operator or the image at which PyTorch and the other runtime part. Nothing is written
            then.
    """
    check_export(path, file_format)
    name, dtype = type(network).__name__, torch.float16 if is_half else torch.float32
    network = any_size(network.eval(), channels)
    write, read = _CODECS[file_format]

    def export(shapes: Sequence[tuple[int, int, int]], axes: Sequence[int]) -> None:
        """Trace with the first of some shapes, batch, height and width, compare at all, and write the file."""
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
        with _plain_operators(f'{name} cannot be written as {file_format}'):
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
    """Check, before weights are read, that a file can be written: the errors are those of `export_network`."""
    path = Path(path)
    if file_format not in FORMATS:
        raise OptionError(f'the format is {file_format!r}: expected one of {", ".join(FORMATS)}')
    if path.is_dir() or not path.parent.is_dir():
        why = 'it is a folder' if path.is_dir() else f'there is no folder {path.parent}'
        raise FileError(f'{path} cannot be written: {why}; expected the name of a file in a folder that is there')
    if path.suffix.lower() not in FORMATS[file_format]:
        others = [f'{name} in {" or ".join(endings)}' for name, endings in FORMATS.items()]
        raise OptionError(f'{path} is no name of a file of the format {file_format}: {", ".join(others)}')
    for package in ('onnx', 'onnxruntime') if file_format == 'onnx' else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise BackendUnavailable(f'ONNX needs the package {package}, which is not installed: {_EXTRA}') from error


def network_metadata(options: Mapping[str, Any], of_file: Mapping[str, str]) -> dict[str, str]:
    """Texts, each JSON, that tell of a network: its options, `img_size` where it has one, and what its file told."""
    parameter = inspect.signature(registered_network(options['type'])).parameters.get('img_size')
    img_size = options.get('img_size', None if parameter is None else parameter.default)
    own = {'network': dict(options)} | ({} if parameter is None else {'img_size': img_size})
    return {**of_file, **{key: json.dumps(value) for key, value in own.items()}}


@torch.no_grad()
def _compare(
    run: Run, images: Sequence[Tensor], expected: Sequence[Tensor], is_half: bool, what: str, say: Callable[[str], Any]
) -> None:
    bound = BOUNDS[is_half]
    of_size = 'it computes with numbers of the size that it was traced with; --size HxW writes it for one size'
    for number, (image, wanted) in enumerate(zip(images, expected, strict=True)):
        shown = 'x'.join(map(str, image.shape))
        # The first size is that of the trace.
        causes = [of_size] * (number > 0) + ['float16 is too coarse for it; leave --half out'] * is_half
        hint = ', or '.join(causes) or 'an operator computes something else there'
        try:
            got = run(image)
        except Exception as error:  # each runtime has its own
            raise OptionError(f'{what} does not take {shown}: {hint} ({one_line(error)})') from error
        if got.shape != wanted.shape:
            raise OptionError(f'{what} gives {list(got.shape)} for {shown}, PyTorch {list(wanted.shape)}: {hint}')
        error = float((got - wanted).abs().max() / wanted.abs().max())
        if not error <= bound:
            raise OptionError(f'{what} differs from PyTorch by {error:.1e} at {shown}, more than {bound:.0e}: {hint}')
        say(f'{shown}: as PyTorch, {error:.0e} apart')


def _check_memory(network: nn.Module, image: Tensor) -> None:
    """Refuse an image for which memory runs out: the system may end a process that takes too much, without a word."""
    multiple, cpu = getattr(network, 'size_multiple', 1), torch.device('cpu')
    height, width = image.shape[-2:]
    if padded_pixels((height, width), multiple) <= padded_pixels(SMALL_SIZES[1], multiple):
        return
    with use_backend('reference'), torch.no_grad():
        images = {size: image.new_zeros(1, image.shape[1], *size) for size in SMALL_SIZES}
        peaks = {size: peak_bytes(partial(network, small), cpu) for size, small in images.items()}
    # A trace, and the other runtime beside it, held a third more than a pass.
    needed, free = 1.5 * extrapolate((height, width), peaks, multiple), available_bytes(cpu)
    if needed > free:
        raise MemoryShortage(
            f'--size {height}x{width} needs about {needed / 2**30:.1f} GiB to be traced, and '
            f'{free / 2**30:.1f} GiB are free: choose a smaller one, or write the network for all sizes'
        )


@contextmanager
def _plain_operators(what: str) -> Iterator[None]:
    """Let a network be traced by operators that other runtimes have, and an error name the one that they lack."""
    try:
        with use_backend('reference'), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the tracer on checks of shapes; results at other sizes are compared
            yield
    except Exception as error:  # exporters have many
        raise OptionError(f'{what}: {type(error).__name__}: {one_line(error)}') from error


@contextmanager
def _without_stdout() -> Iterator[None]:
    """Keep the exporter from printing all of a graph that it cannot write: it does so past `sys.stdout`."""
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
    """What restores images by ONNX Runtime on the CPU, on as many threads as torch has, from the content of a file."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4  # of errors it raises
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
    if axes and multiple != 1:  # known at once, where torch takes minutes to find it out
        raise ShapeError(
            f'torch.export takes no sizes that are padded to multiples of {multiple}: give one by --size HxW'
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
