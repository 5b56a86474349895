import numpy as np
import pytest
import torch

from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.models.training_step import Mixup, build_mixup
from ast_plugin.options.sections import MixupOptions


def make(kind, seed=0, rank=0, **options):
    return Mixup(MixupOptions(type=kind, start_epoch=1, **options), seed, rank)


KINDS = pytest.mark.parametrize('kind', ['mixup', 'cutmix'])


def batch(B=6, C=3, H=9, W=14):
    """Pictures of one value each, and clean ones that are twice that: what was mixed how can be read off."""
    lq = torch.arange(1.0, B + 1).view(B, 1, 1, 1).expand(B, C, H, W).contiguous()
    return lq, 2 * lq


@KINDS
@pytest.mark.parametrize('shape', [(6, 3, 9, 14), (2, 1, 1, 1), (1, 4, 5, 3), (3, 3, 16, 2)])
def test_both_images_are_mixed_alike(kind, shape, device):
    lq, gt = (tensor.to(device) for tensor in batch(*shape))
    before = lq.clone()
    mixed_lq, mixed_gt = make(kind)(lq, gt, 3)
    assert mixed_lq.shape == lq.shape and mixed_lq.dtype == lq.dtype
    torch.testing.assert_close(mixed_gt, 2 * mixed_lq)
    assert torch.equal(lq, before)


def test_mixup_draws_shares_from_beta():
    """Partners are a permutation, and the shares have the variance 1 / (4 (2 alpha + 1)) of Beta(alpha, alpha)."""
    values = torch.eye(4).view(4, 4, 1, 1)  # channel i holds how much of sample i is there
    mixing = make('mixup', seed=5)
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
    lq, gt = batch()
    changed = torch.zeros(9, 14)
    for iteration in range(1, 200):
        mixed, _ = make('cutmix', seed=1)(lq, gt, iteration)
        boxes = [(picture[0] != original[0]) for picture, original in zip(mixed, lq, strict=True)]
        boxes = [box for box in boxes if box.any()]
        for box in boxes:
            assert torch.equal(box, boxes[0])
            rows, columns = box.any(1), box.any(0)
            assert torch.equal(box, rows[:, None] & columns[None])
            assert len(mixed[0, 0].unique()) <= 2
        changed += boxes[0] if boxes else 0
    assert changed.min() > 10  # any place can be covered
    assert changed.mean() == pytest.approx(0.42 * 199, rel=0.25)  # half the area, less what the border cuts off


def test_clean_images_may_be_larger():
    lq, _ = batch(H=6, W=5)
    gt = lq.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mixed_lq, mixed_gt = make('cutmix')(lq, gt, 1)
    assert torch.equal(mixed_gt, mixed_lq.repeat_interleave(2, 2).repeat_interleave(2, 3))
    with pytest.raises(ShapeError, match='CutMix'):
        make('cutmix')(lq, gt[..., :-1], 1)


@KINDS
def test_depends_on_seed_rank_and_iteration(kind):
    lq, gt = torch.rand(2, 5, 3, 8, 8)

    def mixed(iteration=7, **place):
        return make(kind, **place)(lq, gt, iteration)[0]

    first = mixed(seed=1)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert torch.equal(mixed(seed=1), first)
    for other in ({'seed': 2}, {'seed': 1, 'rank': 1}, {'seed': 1, 'iteration': 8}):
        assert not torch.equal(mixed(**other), first)


def test_it_starts_with_an_epoch():
    lq, gt = torch.rand(2, 4, 3, 8, 8)
    mixing = build_mixup({'mixing': {'type': 'mixup', 'start_epoch': 6}, 'iters_per_epoch': 10}, seed=0, rank=0)
    assert mixing(lq, gt, 50) == (lq, gt)
    assert not torch.equal(mixing(lq, gt, 51)[0], lq)
    assert build_mixup({}, seed=0, rank=0) is None


def test_probability():
    lq, gt = torch.rand(2, 4, 3, 8, 8)
    mixing = make('mixup', probability=0.25)
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
def test_wrong_options(options, told):
    with pytest.raises(OptionError, match=told):
        build_mixup({'mixing': options}, seed=0, rank=0)
