import pytest
import torch
from torch import nn

from ast_plugin.errors import OptionError
from ast_plugin.models.training_step import PRECISIONS, Precision


@pytest.mark.parametrize('name', PRECISIONS)
def test_the_network_computes_in_it_and_losses_in_float32(name, device):
    precision = Precision(name, device)
    network = nn.Conv2d(3, 3, 3).to(device)
    with precision.autocast():
        output = network(torch.rand(1, 3, 5, 5, device=device))
    assert output.dtype == (PRECISIONS[name] or torch.float32)
    assert precision.widen(output).dtype == torch.float32
    assert precision.scaler.is_enabled() == (name == 'fp16')


def test_float64_stays():
    output = torch.rand(2, dtype=torch.float64)
    assert Precision('fp32', torch.device('cpu')).widen(output) is output


def test_a_device_that_cannot(monkeypatch, device):
    with pytest.raises(OptionError, match=r'fp32, bf16, fp16'):
        Precision('fp8', device)

    def unsupported(*args):
        raise RuntimeError('"slow_conv2d" not implemented for Half\nand more')

    monkeypatch.setattr('torch.nn.functional.conv2d', unsupported)
    with pytest.raises(
        OptionError, match=r'fp16 does not work .* not implemented for Half\); use fp32 or bf16'
    ) as info:
        Precision('fp16', device)
    assert 'and more' not in str(info.value)
    monkeypatch.setattr('torch.nn.functional.conv2d', lambda image, weight: (image * weight.sum()).float())
    with pytest.raises(OptionError, match='bf16 does not work'):  # autocast that switched itself off
        Precision('bf16', device)


def test_bfloat16_wants_a_process_for_each_device():
    several = nn.DataParallel(nn.Conv2d(1, 1, 1))
    cpu = torch.device('cpu')
    with pytest.raises(OptionError, match='torchrun'):
        Precision('bf16', cpu).check_wrapper(several)
    Precision('fp16', cpu).check_wrapper(several)
    Precision('bf16', cpu).check_wrapper(several.module)
