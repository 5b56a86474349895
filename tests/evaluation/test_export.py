"""Exported networks match PyTorch for all image sizes, or are rejected with the reason."""

import io
import json
import sys

import pytest
import torch
from torch import nn

from ast_plugin.archs.networks import any_size, load_network
from ast_plugin.errors import BackendUnavailable, FileError, MemoryShortage, OptionError
from ast_plugin.evaluation import export
from ast_plugin.evaluation.export import BOUNDS, FORMATS, OPSET, export_network, network_metadata
from tests.archs.tiny_networks import AST, RRDBNET, SRVGG, SWINIR, excite, image, rule

onnx = pytest.importorskip('onnx', reason='extra onnx')
onnxruntime = pytest.importorskip('onnxruntime', reason='extra onnx')

SMALL = {**AST, 'img_size': 64, 'window_size': 4}
SHALLOW = {**SWINIR, 'depths': [2], 'num_heads': [2]}
MIXED = {'type': 'Mixed', 'base': SHALLOW, 'mix': [rule('**.attn')]}
MIXED_MAPS = {'type': 'Mixed', 'base': RRDBNET, 'mix': [rule('body.*', 'ASTBlock', window_size=3, num_heads=2)]}
SIZES = [(5, 90), (1, 1), (70, 33), (61, 100)]


def of_all_kinds():
    """Return an AST that contains every kind of attention, with shifted windows, and of feed-forward network."""
    torch.manual_seed(0)
    kinds = ('assa', 'frfn'), ('dense', 'leff'), ('sparse', 'mlp'), ('sparse_relu', 'frfn'), ('topk', 'leff')
    networks = [
        load_network({**SMALL, 'depths': [1, 1, 1, 1, 2, 2, 2, 2, 2], 'attention': attention, 'ffn': ffn})
        for attention, ffn in kinds
    ]
    network = networks[0]
    for level, other in enumerate(networks[1:]):
        network.decoder[level] = other.decoder[level]
        network.encoder[level] = other.encoder[level]
    return excite(network)


def build(options):
    torch.manual_seed(0)
    return excite(load_network(options))


def restore(path, x):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(None, {'image': x.numpy()})[0])


def assert_near(got, wanted, bound=BOUNDS[False]):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0, atol=bound * float(wanted.abs().max()))


class WithoutOperator(nn.Module):
    """Network with an operator that this ONNX opset does not have."""

    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[-2:])


class OfItsSize(nn.Module):
    """Network whose trace is specialised to the width of the traced image."""

    takes_any_size = True

    def forward(self, x):
        return x / float(x.shape[-1])


@pytest.fixture(scope='module')
def all_kinds(tmp_path_factory):
    """Return the network of all kinds and the path of its ONNX file."""
    network, path = of_all_kinds(), tmp_path_factory.mktemp('onnx') / 'n.onnx'
    export_network(network, path, metadata=network_metadata(SMALL, {'recipe': '"pretrained/rain"'}))
    return network, path


@pytest.mark.parametrize(('batch', 'size'), enumerate(SIZES, 1))
def test_onnx_of_ast(batch, size, all_kinds):
    (network, path), x = all_kinds, image(*size, batch)
    with torch.no_grad():
        assert_near(restore(path, x), network(x))


def test_onnx_metadata(all_kinds):
    model = onnx.load(all_kinds[1])
    onnx.checker.check_model(model, full_check=True)
    found = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert found['network'] == SMALL and found['img_size'] == 64 and found['recipe'] == 'pretrained/rain'
    assert (found['size'], found['batch'], found['precision']) == ('dynamic', 'dynamic', 'float32')
    assert model.producer_name == 'ast_plugin' and found['opset'] == model.opset_import[0].version == OPSET
    sides = [side.dim_param or side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    assert sides == ['batch', 3, 'height', 'width']
    # no loops or sequences, which other runtimes do not support
    assert not {node.op_type for node in model.graph.node} & {'Loop', 'If', 'SequenceAt', 'SplitToSequence'}


@pytest.mark.parametrize(
    'options',
    [{**SRVGG, 'num_in_ch': 1, 'num_out_ch': 1}, {**RRDBNET, 'scale': 2}, MIXED_MAPS, MIXED],
    ids=['gray', 'RRDBNet x2', 'Mixed RRDBNet', 'Mixed SwinIR'],
)
def test_onnx_of_others(options, tmp_path):
    network, channels = build(options), options.get('num_in_ch', 3)
    export_network(network, tmp_path / 'n.onnx', channels=channels)
    takes_batches = 'SwinIR' not in str(options)
    for number, size in enumerate(SIZES, 1):
        x = image(*size, number if takes_batches else 1)[:, :channels]
        with torch.no_grad():
            assert_near(restore(tmp_path / 'n.onnx', x), any_size(network, channels)(x))
    if not takes_batches:
        with pytest.raises(Exception, match='Got: 2 Expected: 1'):
            restore(tmp_path / 'n.onnx', image(8, 8, 2))


def test_metadata_of_defaults():
    assert json.loads(network_metadata({'type': 'AST_XS'}, {})['img_size']) == 128
    assert 'img_size' not in network_metadata(SRVGG, {})


def test_onnx_in_half(tmp_path):
    network, x = build(MIXED_MAPS), image(40, 21)
    export_network(network, tmp_path / 'n.onnx', is_half=True)
    weights = onnx.load(tmp_path / 'n.onnx').graph.initializer
    assert {weight.data_type for weight in weights if len(weight.dims) > 1} == {onnx.TensorProto.FLOAT16}
    assert next(network.parameters()).dtype == torch.float32
    with torch.no_grad():
        assert_near(restore(tmp_path / 'n.onnx', x), network(x), BOUNDS[True])


def test_onnx_of_one_size(tmp_path):
    network, x = build(SRVGG), image(37, 50)
    export_network(network, tmp_path / 'n.onnx', size=(37, 50))
    assert_near(restore(tmp_path / 'n.onnx', x), network(x).detach())
    with pytest.raises(Exception, match='Got: 38 Expected: 37'):
        restore(tmp_path / 'n.onnx', image(38, 50))


@pytest.mark.parametrize(
    ('network', 'file_format', 'message'),
    [
        (WithoutOperator(), 'onnx', 'WithoutOperator cannot be exported as onnx: .*aten::fft_rfft2'),
        (OfItsSize(), 'onnx', 'OfItsSize as onnx differs from PyTorch by .* at 1x3x1x1'),
        (OfItsSize(), 'torchscript', 'OfItsSize as torchscript differs from PyTorch by .* at 1x3x1x1'),
        (OfItsSize(), 'torch.export', r'OfItsSize cannot be exported as torch\.export: '),
        (
            load_network(SMALL),
            'torch.export',
            r'dynamic sizes padded to a multiple of 64: set --size HxW',
        ),
        (load_network(MIXED_MAPS), 'torchscript', 'Mixed as torchscript fails on .*: its trace is specialised'),
        (OfItsSize(), 'onnxx', r"the format is 'onnxx': expected one of onnx, torchscript, torch\.export"),
    ],
)
def test_rejected_networks(network, file_format, message, tmp_path, capfd):
    with pytest.raises(OptionError, match=message):
        export_network(network, tmp_path / f'n{FORMATS.get(file_format, [""])[0]}', file_format)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ('', '')


class BeyondHalf(nn.Module):
    """Network with intermediate values beyond the range of float16."""

    takes_any_size = True

    def forward(self, x):
        return x * 1e5 / 1e5


def test_half_that_is_not_precise_enough(tmp_path):
    with pytest.raises(OptionError, match=r'differs from PyTorch by .* at 1x3x4x4, .*: float16 is not precise'):
        export_network(BeyondHalf(), tmp_path / 'n.onnx', size=(4, 4), is_half=True)
    export_network(BeyondHalf(), tmp_path / 'n.onnx', size=(4, 4))


def test_size_beyond_memory(tmp_path, monkeypatch):
    network, size = build(SRVGG), (160, 240)
    monkeypatch.setattr(export, 'available_bytes', lambda device: 1e6)
    with pytest.raises(
        MemoryShortage, match=r'--size 160x240 needs about 0\.0 GiB for tracing, but 0\.0 GiB are available'
    ):
        export_network(network, tmp_path / 'n.pt', 'torchscript', size=size)
    export_network(network, tmp_path / 'n.pt', 'torchscript', size=(20, 30))  # too small to be checked
    monkeypatch.undo()
    export_network(network, tmp_path / 'n.pt', 'torchscript', size=size)


@pytest.mark.parametrize(('name', 'file_format'), [('n.pth', 'onnx'), ('n.onnx', 'torchscript'), ('n', 'torch.export')])
def test_extension_of_another_format(name, file_format, tmp_path):
    with pytest.raises(
        OptionError, match=rf'n.*: the extension does not match the format {file_format}: expected \.onnx'
    ):
        export_network(nn.Identity(), tmp_path / name, file_format)


def test_torchscript_of_ast(tmp_path):
    network = build(SMALL)
    export_network(network, tmp_path / 'n.pt', 'torchscript', metadata=network_metadata(SMALL, {}))
    texts = {'network': '', 'size': ''}
    trace = torch.jit.load(tmp_path / 'n.pt', _extra_files=texts)
    assert json.loads(texts['network']) == SMALL and json.loads(texts['size']) == 'dynamic'
    for batch, size in enumerate(SIZES, 1):
        x = image(*size, batch)
        with torch.no_grad():
            assert_near(trace(x), network(x))


@pytest.mark.parametrize('options', [SRVGG, MIXED_MAPS], ids=['SRVGG', 'Mixed'])
def test_torchscript_of_one_size(options, tmp_path):
    network, x = build(options), image(20, 30)
    export_network(network, tmp_path / 'n.pt', 'torchscript', size=(20, 30))
    trace = torch.jit.load(tmp_path / 'n.pt')
    assert_near(trace(x), network(x).detach())
    with pytest.raises(torch.jit.Error, match='traced for'):
        trace(image(30, 20))


@pytest.mark.parametrize(('options', 'size'), [(SRVGG, None), (MIXED_MAPS, (20, 30))], ids=['SRVGG', 'Mixed'])
def test_torch_export(options, size, tmp_path):
    network, x = build(options), image(20, 30)
    export_network(network, tmp_path / 'n.pt2', 'torch.export', size=size, metadata=network_metadata(options, {}))
    texts = {'network': ''}
    program = torch.export.load(io.BytesIO((tmp_path / 'n.pt2').read_bytes()), extra_files=texts).module()
    assert json.loads(texts['network']) == options
    assert_near(program(x), network(x).detach())
    other = image(7, 41, 2)
    if size is None:
        assert_near(program(other), network(other).detach())
    else:
        with pytest.raises(AssertionError, match='20'):
            program(image(30, 20))


@pytest.mark.parametrize('place', ['missing/n.onnx', '.'])
def test_export_to_no_file(place, tmp_path):
    with pytest.raises(FileError, match=r'cannot be written: .*; expected a file name in an existing folder'):
        export_network(nn.Identity(), tmp_path / place)


@pytest.mark.parametrize('package', ['onnx', 'onnxruntime'])
def test_export_without_package(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BackendUnavailable, match=rf'the package {package}, which is not installed: pip install'):
        export_network(nn.Identity(), tmp_path / 'n.onnx')
