"""Tests of the training step on small convolutions; see test_restoration_model.py for its use in a run."""

import logging
import math
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from ast_plugin.archs.ast_arch import AST
from ast_plugin.errors import OptionError, ShapeError, TrainingError
from ast_plugin.losses import ASTCharbonnierLoss, FFTLoss, PSNRLoss
from ast_plugin.models.training_step import (
    Mixup,
    Precision,
    TrainingStep,
    batch_size,
    build_mixup,
    check_reductions,
    check_switches,
    update_average,
)
from ast_plugin.options.sections import MixupOptions

LOSSES = {'l_pix': ASTCharbonnierLoss(), 'l_fft': FFTLoss(loss_weight=0.1), 'l_psnr': PSNRLoss(loss_weight=0.01)}
NAMES = ['a.png', 'b.png', 'c.png', 'd.png']


def losses_of(output, target):
    assert output.dtype == torch.float32
    return {name: loss(output, target) for name, loss in LOSSES.items()}


def step_of(device, precision='fp32', layers=None, rate=1e-2, **train):
    torch.manual_seed(0)
    network = layers or nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))
    network = deepcopy(network).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate)
    return TrainingStep(network, optimizer, Precision(precision, device), train)


def batch(device, count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gt = torch.rand(count, 3, 12, 10, generator=generator)
    return (gt + 0.1 * torch.randn(gt.shape, generator=generator)).to(device), gt.to(device)


def gradients(step):
    return torch.cat([parameter.grad.flatten().float() for parameter in step.parameters])


def weights(step):
    return torch.cat([parameter.detach().flatten() for parameter in step.parameters])


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def test_steps_lower_the_loss(device):
    step = step_of(device)
    losses = [step(*batch(device), losses_of, iteration)[0]['l_pix'] for iteration in range(1, 16)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(('count', 'parts'), [(4, 2), (4, 4), (5, 2), (5, 3), (1, 1)])
def test_micro_batches_add_up_to_the_whole(count, parts, device, tolerances):
    """Sizes of micro-batches may differ: 5 in 3 is 2, 2 and 1."""
    whole, cut = step_of(device), step_of(device, accumulate=parts)
    values = [step(*batch(device, count), losses_of, 1) for step in (whole, cut)]
    assert relative(gradients(cut), gradients(whole)) < tolerances[torch.float32]
    assert values[0][0] == pytest.approx(values[1][0], rel=1e-5)
    assert values[0][1] and values[1][1]


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_lower_precision_is_close(precision, device, tolerances):
    exact, lower = step_of(device), step_of(device, precision)
    for step in (exact, lower):
        values, changed = step(*batch(device), losses_of, 1)
        assert changed and all(map(math.isfinite, values.values()))
    assert 0 < relative(gradients(lower), gradients(exact)) < tolerances[lower.precision.dtype]


def test_long_gradients_are_cut_after_unscaling(device):
    lengths = {}
    for precision in ('fp32', 'fp16'):
        step = step_of(device, precision, clip_grad_norm=0.01)
        step(*batch(device), losses_of, 1)
        lengths[precision] = gradients(step).norm().item()
    assert lengths == pytest.approx({'fp32': 0.01, 'fp16': 0.01}, rel=1e-2)


def test_overflow_of_float16_halves_the_scale(device):
    step = step_of(device, 'fp16')
    before = weights(step)
    step.precision.scaler.load_state_dict({**step.precision.scaler.state_dict(), 'scale': 2.0**40})
    for scale in (2.0**39, 2.0**38):
        values, changed = step(*batch(device), losses_of, 1)
        assert not changed and math.isfinite(values['l_pix'])
        assert torch.equal(weights(step), before)
        assert step.precision.scaler.get_scale() == scale
    step.precision.scaler.update(2.0**8)
    assert step(*batch(device), losses_of, 1)[1]
    assert not torch.equal(weights(step), before)


def test_scaling_ends(device):
    """Gradients that are non-finite at any scale must not be skipped forever."""
    step = step_of(device, 'fp16')
    step.network[0].weight.register_hook(lambda gradient: gradient * math.nan)
    for iteration in range(1, 41):
        assert not step(*batch(device), losses_of, iteration, NAMES)[1]
    with pytest.raises(TrainingError, match=r'iteration 41: the gradient norm is nan; images: a\.png'):
        step(*batch(device), losses_of, 41, NAMES)


@pytest.mark.parametrize(('precision', 'value'), [('fp32', math.nan), ('bf16', math.inf), ('fp16', math.nan)])
def test_infinite_loss_stops_or_is_left_out(precision, value, device, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    statistics = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1))
    bad, gt = batch(device)
    bad[2, 0, 0, 0] = value
    for policy in ('stop', 'skip'):
        step = step_of(device, precision, statistics, on_nonfinite=policy)
        for iteration in (1, 2):
            step(*batch(device), losses_of, iteration, NAMES)
        before, state = weights(step), deepcopy(step.precision.scaler.state_dict())
        names = r'iteration 3: the loss l_pix is nan.*; images: a\.png, b\.png, c\.png, d\.png'
        if policy == 'stop':
            with pytest.raises(TrainingError, match=names):
                step(bad, gt, losses_of, 3, NAMES)
            assert torch.equal(weights(step), before)
            continue
        buffers = [buffer.clone() for buffer in step.network.buffers()]
        values, changed = step(bad, gt, losses_of, 3, NAMES)
        assert not changed and math.isnan(values['l_pix'])
        (message,) = set(caplog.messages)
        assert message.endswith('c.png, d.png. The step is skipped')
        assert torch.equal(weights(step), before)
        assert all(map(torch.equal, buffers, step.network.buffers()))
        assert step.precision.scaler.state_dict() == state
        values, changed = step(*batch(device), losses_of, 4, NAMES)
        assert changed and math.isfinite(values['l_pix'])


def test_losses_that_cannot_be_cut():
    opt = {'datasets': {'train': {'batch_size_per_gpu': 2}}, 'dist': False, 'num_gpu': 0}
    assert batch_size(opt) == 2
    assert batch_size({**opt, 'num_gpu': 3}) == 6
    assert batch_size({**opt, 'num_gpu': 3, 'dist': True}) == 2
    assert batch_size({'dist': False}) is None
    sums = {'l_pix': nn.L1Loss(), 'l_sum': nn.L1Loss(reduction='sum')}
    check_reductions({}, sums)
    with pytest.raises(OptionError, match='l_sum'):
        check_reductions({'accumulate': 2}, sums)


def test_device_that_cannot_compute_in_it(monkeypatch, device):
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
    with pytest.raises(OptionError, match='bf16 does not work'):  # autocast may disable itself
        Precision('bf16', device)


def test_bfloat16_wants_a_process_for_each_device():
    several = nn.DataParallel(nn.Conv2d(1, 1, 1))
    cpu = torch.device('cpu')
    with pytest.raises(OptionError, match='torchrun'):
        Precision('bf16', cpu).check_wrapper(several)
    Precision('fp16', cpu).check_wrapper(several)
    Precision('bf16', cpu).check_wrapper(several.module)


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.register_buffer('mask', torch.tensor([-100.0, 0.1, 1 / 3]))
        self.register_buffer('index', torch.tensor([3, 1]))


def test_average_of_weights_and_statistics():
    network = Net()
    average = deepcopy(network).requires_grad_(False)
    want = {name: tensor.double() for name, tensor in average.state_dict().items()}
    mask = average.mask.clone()
    for step in range(50):
        with torch.no_grad():
            network[0].weight.add_(0.1)
        network(torch.rand(2, 3, 5, 5) + step)
        update_average(average, network, 0.9)
        for name, tensor in network.state_dict().items():
            want[name] = 0.9 * want[name] + 0.1 * tensor if tensor.is_floating_point() else tensor.double()
    for name, tensor in average.state_dict().items():
        torch.testing.assert_close(tensor.double(), want[name], rtol=1e-5, atol=1e-6)
    assert average[1].num_batches_tracked == 50
    assert average[1].running_mean.abs().max() > 0.1
    assert torch.equal(average.mask, mask)


OPT = {
    'num_gpu': 0,
    'dist': False,
    'datasets': {'train': {'batch_size_per_gpu': 4}},
    'train': {
        'precision': 'bf16',
        'accumulate': 2,
        'channels_last': True,
        'gradient_checkpointing': True,
        'compile': True,
        'mixing': {'type': 'mixup', 'start_epoch': 2},
        'iters_per_epoch': 3,
        'on_nonfinite': 'skip',
    },
}
WITHOUT = dict.fromkeys(('accumulate', 'gradient_checkpointing', 'compile'))


@pytest.mark.parametrize(
    ('top', 'switches', 'told'),
    [
        ({}, {}, None),
        ({'num_gpu': 2}, {'precision': 'fp16'}, None),
        ({}, {'precision': 'fp8'}, 'train.precision'),
        ({}, {'accumulate': 5}, 'a batch of 4 cannot be split into 5'),
        ({}, {'accumulate': -1}, 'accumulate of 1 or more'),
        ({}, {'on_nonfinite': 'Stop'}, 'on_nonfinite stop or skip'),
        ({}, {'compile': 'inductr'}, 'no backend'),
        ({}, {'iters_per_epoch': None}, 'train.iters_per_epoch'),
        ({'dist': True}, {**WITHOUT, 'cuda_graph': True}, 'cuda_graph cannot be combined with several processes'),
    ],
)
def test_switches_are_checked_together(top, switches, told, monkeypatch):
    opt = {**OPT, **top, 'train': {**OPT['train'], **switches}}
    before = deepcopy(opt)
    if opt['num_gpu']:  # the precision of a GPU is checked when its process starts
        monkeypatch.setattr('torch.nn.functional.conv2d', None)  # not called
    with torch.device('meta'):
        network = AST(img_size=16, embed_dim=4, depths=[1] * 9, num_heads=[1] * 9)
    with pytest.raises(OptionError, match=told) if told else nullcontext():
        check_switches(opt, network, {'pixel_opt': nn.L1Loss()})
    assert opt == before


def mixup_of(kind, seed=0, rank=0, **options):
    return Mixup(MixupOptions(type=kind, start_epoch=1, **options), seed, rank)


def images_of(B=6, C=3, H=9, W=14):
    """Return constant images with different values, to identify mixed parts."""
    return torch.arange(1.0, B + 1).view(B, 1, 1, 1).expand(B, C, H, W).contiguous()


@pytest.mark.parametrize(('kind', 'scale'), [('mixup', 1), ('cutmix', 1), ('cutmix', 2)])
@pytest.mark.parametrize('shape', [(6, 3, 9, 14), (2, 1, 1, 1), (1, 4, 5, 3), (3, 3, 16, 2)])
def test_both_images_are_mixed_alike(kind, scale, shape, device):
    """Clean images, here with twice the value, may be larger."""

    def clean_of(image):
        return 2 * image.repeat_interleave(scale, 2).repeat_interleave(scale, 3)

    lq = images_of(*shape).to(device)
    before = lq.clone()
    mixed_lq, mixed_gt = mixup_of(kind)(lq, clean_of(lq), 3)
    assert mixed_lq.shape == lq.shape and mixed_lq.dtype == lq.dtype
    torch.testing.assert_close(mixed_gt, clean_of(mixed_lq))
    assert torch.equal(lq, before)
    if scale > 1:
        with pytest.raises(ShapeError, match='CutMix'):
            mixup_of(kind)(lq, clean_of(lq)[..., :-1], 3)


def test_mixup_draws_shares_from_beta():
    """Partners are a permutation, and the shares have the variance 1 / (4 (2 alpha + 1)) of Beta(alpha, alpha)."""
    values = torch.eye(4).view(4, 4, 1, 1)  # channel i is the share of sample i
    mixing = mixup_of('mixup', seed=5)
    shares = []
    for iteration in range(1, 401):
        mixed, _ = mixing(values, values, iteration)
        weights = mixed[:, :, 0, 0]
        torch.testing.assert_close(weights.sum(1), torch.ones(4))
        used = (weights > 0).sum(1)
        assert used.max() <= 2
        shares += [weights[i, i].item() for i in range(4) if used[i] == 2]
    assert len(shares) > 900
    assert np.mean(shares) == pytest.approx(0.5, abs=0.04)
    assert np.var(shares) == pytest.approx(1 / (4 * 3.4), rel=0.15)
    assert len(set(shares)) == len(shares)


def test_cutmix_puts_one_rectangle_over_all():
    lq = images_of()
    changed = torch.zeros(9, 14)
    for iteration in range(1, 200):
        mixed, _ = mixup_of('cutmix', seed=1)(lq, lq, iteration)
        boxes = [(image[0] != original[0]) for image, original in zip(mixed, lq, strict=True)]
        boxes = [box for box in boxes if box.any()]
        for box in boxes:
            assert torch.equal(box, boxes[0])
            rows, columns = box.any(1), box.any(0)
            assert torch.equal(box, rows[:, None] & columns[None])
            assert len(mixed[0, 0].unique()) <= 2
        changed += boxes[0] if boxes else 0
    assert changed.min() > 10  # any place can be covered
    assert changed.mean() == pytest.approx(0.42 * 199, rel=0.25)  # half the area, less the part clipped at the border


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixup_depends_on_seed_rank_and_iteration(kind):
    lq, gt = torch.rand(2, 5, 3, 8, 8)

    def mixed(iteration=7, **place):
        return mixup_of(kind, **place)(lq, gt, iteration)[0]

    first = mixed(seed=1)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert torch.equal(mixed(seed=1), first)
    for other in ({'seed': 2}, {'seed': 1, 'rank': 1}, {'seed': 1, 'iteration': 8}):
        assert not torch.equal(mixed(**other), first)


def test_mixup_starts_with_an_epoch():
    lq, gt = torch.rand(2, 4, 3, 8, 8)
    mixing = build_mixup({'mixing': {'type': 'mixup', 'start_epoch': 6}, 'iters_per_epoch': 10}, seed=0, rank=0)
    assert mixing(lq, gt, 50) == (lq, gt)
    assert not torch.equal(mixing(lq, gt, 51)[0], lq)
    assert build_mixup({}, seed=0, rank=0) is None


def test_mixup_probability():
    lq, gt = torch.rand(2, 4, 3, 8, 8)
    mixing = mixup_of('mixup', probability=0.25)
    count = sum(mixing(lq, gt, iteration)[0] is not lq for iteration in range(400))
    assert 70 < count < 130


@pytest.mark.parametrize(
    ('options', 'told'),
    [
        ({'type': 'cutout'}, "'mixup' or 'cutmix'"),
        ({'type': 'mixup', 'alpha': 0}, r'mixing\.alpha'),
        ({'type': 'mixup', 'probability': 1.5}, r'mixing\.probability'),
        ({'type': 'mixup', 'start_epoch': 0}, r'mixing\.start_epoch'),
        ({'type': 'mixup'}, 'needs train.iters_per_epoch'),
    ],
)
def test_wrong_options_of_mixup(options, told):
    with pytest.raises(OptionError, match=told):
        build_mixup({'mixing': options}, seed=0, rank=0)
