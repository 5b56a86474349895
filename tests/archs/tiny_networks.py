"""Tiny networks of BasicSR, and networks that call their submodules in unusual ways."""

import torch
from torch import Tensor, nn

SIZES = {'embed_dim': 8, 'depths': [2, 2], 'num_heads': [2, 2], 'window_size': 4, 'mlp_ratio': 2, 'img_size': 16}
SWINIR = {'type': 'SwinIR', 'upscale': 1, 'drop_path_rate': 0.0, **SIZES}
EDSR = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 3, 'upscale': 1, 'img_range': 1.0}
RCAN = {**EDSR, 'type': 'RCAN', 'num_group': 2, 'num_block': 2, 'squeeze_factor': 2}
CHANNELS = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8}
RRDBNET = {'type': 'RRDBNet', **CHANNELS, 'num_block': 2, 'scale': 1, 'num_grow_ch': 4}
SRVGG = {'type': 'SRVGGNetCompact', 'num_feat': 8, 'num_conv': 3, 'upscale': 1}
AST = {'type': 'AST', 'embed_dim': 4, 'depths': [1] * 9, 'num_heads': [1] * 9, 'img_size': 32, 'drop_path_rate': 0.0}

ODD = [(13, 22), (7, 31), (19, 5)]
"""Image sizes (height, width) that are not divisible by any window size."""

ATTENTIONS = 'layers.*.residual_group.blocks.*.attn'
FEED_FORWARDS = 'layers.*.residual_group.blocks.*.mlp'
"""Patterns that match SwinIR's attention and feed-forward modules."""

KEEP = {'keep_weights': True}
SMALL = {'block': 'ASTBlock', 'window_size': 4, 'mlp_ratio': 2}
"""Options of a block that fits all networks here."""


def rule(match='**.attn', block='ASSA', keys=(), **options):
    """Return a rule with further `keys` and `options` of the block."""
    return {'match': match, 'with': {'type': block, **options}, **dict(keys)}


class TokenLayer(nn.Module):
    """Two linear layers over tokens [B, H·W, C], which ignores all other arguments."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, *_, **__) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class TokenBlock(nn.Module):
    """A residual branch that receives the token size in one of several ways."""

    def __init__(self, dim: int, way: str) -> None:
        super().__init__()
        self.ffn, self.way = TokenLayer(dim), way

    def forward(self, x: Tensor, *size: int, hw: tuple[int, int] | None = None) -> Tensor:
        if self.way == 'own numbers':
            return x + self.ffn(x, *size)
        return x + self.ffn(x)


class TokenNet(nn.Module):
    """Network [B, 3, H, W] with two token blocks.

    Args:
        way: how H and W are passed to the blocks: 'pair' (keyword argument), 'swapped' (W first), 'numbers', 'own
            numbers' (to the layer itself), 'map' (only the network gets a feature map) or 'hidden' (not at all, on a
            map of another size).
    """

    def __init__(self, dim: int = 8, way: str = 'pair') -> None:
        super().__init__()
        self.way = way
        self.first, self.last = nn.Conv2d(3, dim, 3, padding=1), nn.Conv2d(dim, 3, 3, padding=1)
        self.blocks = nn.ModuleList(TokenBlock(dim, way) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.way == 'hidden':
            y = nn.functional.avg_pool2d(y, 2)
        B, C, H, W = y.shape
        tokens = y.flatten(2).transpose(1, 2)
        for block in self.blocks:
            if self.way in ('pair', 'swapped'):
                tokens = block(tokens, hw=(H, W) if self.way == 'pair' else (W, H))
            else:
                tokens = block(tokens, H, W) if 'numbers' in self.way else block(tokens)
        y = tokens.transpose(1, 2).reshape(B, C, H, W)
        if self.way == 'hidden':
            y = nn.functional.interpolate(y, scale_factor=2.0)
        return x + self.last(y)


class TimmBlock(nn.Module):
    """A Swin block on [B, H, W, C] with a feed-forward network on windows; H and W must be multiples of 4."""

    def __init__(self, dim: int, shift: int) -> None:
        super().__init__()
        self.window_size, self.shift_size = (4, 4), (shift, shift)
        self.attn = nn.Linear(dim, dim)
        self.attn.num_heads = 3
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        shift = self.shift_size[0]
        y = torch.roll(x, (-shift, -shift), (1, 2)).reshape(B, H // 4, 4, W // 4, 4, C).transpose(2, 3)
        y = self.mlp(self.attn(y.reshape(-1, 16, C))).reshape(B, H // 4, W // 4, 4, 4, C).transpose(2, 3)
        return x + torch.roll(y.reshape(B, H, W, C), (shift, shift), (1, 2))


class Timm(nn.Module):
    """Network [B, 3, H, W] with two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 3, 1)
        self.blocks = nn.Sequential(TimmBlock(12, 0), TimmBlock(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def excite(network: nn.Module, std: float = 0.5) -> nn.Module:
    """Set random weights large enough that attention affects the output; call after seeding."""
    for name, parameter in network.named_parameters():
        if parameter.ndim >= 2:
            scale = 1.0 if name.endswith('table') else parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, std=std * scale)
    return network


def relative(got: Tensor, want: Tensor) -> float:
    """Relative error ‖got − want‖ / ‖want‖."""
    return float((got - want).norm() / want.norm())


def image(height: int, width: int, batch: int = 1) -> Tensor:
    """Return random pixels in [0, 1]."""
    return torch.rand(batch, 3, height, width)
