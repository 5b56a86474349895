"""AST, the adaptive sparse transformer for image restoration (Zhou et al., CVPR 2024), and its variants."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ast_plugin.archs.blocks import ATTENTIONS, ASTBlock, check_choice, init_weights, run_checkpointed
from ast_plugin.archs.pretrained import Pretrained
from ast_plugin.archs.state import describe_mismatch, infer_options, plain_state
from ast_plugin.errors import CheckpointError, OptionError, ShapeError
from ast_plugin.ops import pad_to_multiple

VARIANTS = {
    'AST_XS': {'embed_dim': 16, 'depths': (1, 1, 1, 1, 1, 1, 1, 1, 1)},
    'AST_T': {'embed_dim': 16, 'depths': (2, 2, 2, 2, 2, 2, 2, 2, 2)},
    'AST_B': {'embed_dim': 32, 'depths': (1, 2, 8, 8, 2, 8, 8, 2, 1)},
}
NUM_LEVELS = 4  # of the encoder and of the decoder each, without the bottleneck


class Stage(nn.Module):
    """Blocks of one level with its resampling layer, which the network applies: `upsample` before, `downsample` after.

    Args:
        blocks: blocks of the level.
        use_checkpoint: whether to apply gradient checkpointing to each block.
        downsample: convolution to the next level of the encoder, or None.
        upsample: transposed convolution from the previous level of the decoder, or None.
    """

    def __init__(
        self,
        blocks: Sequence[ASTBlock],
        use_checkpoint: bool,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.use_checkpoint = use_checkpoint
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the blocks to x, [B, H, W, C]."""
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = run_checkpointed(block, x, mask)
            else:
                x = block(x, mask)
        return x


class AST(Pretrained):
    """U-shaped restoration transformer: feed-forward blocks in the encoder, attention in bottleneck and decoder.

    Args:
        img_size: nominal image size. Level i has the nominal side img_size / 2**i. Where this side is not larger than
            `window_size`, it becomes the window size, and windows are not shifted. Affects results, but cannot be
            inferred from weights unless a window is smaller. The published results were measured with 128.
        in_chans: number of input channels. If equal to `out_chans`, the input is added to the output.
        out_chans: number of output channels.
        embed_dim: number of channels of the first level; the bottleneck has 16 times as many.
        depths: number of blocks in the 4 encoder levels, the bottleneck, and the 4 decoder levels.
        num_heads: number of attention heads per level, ordered like `depths`; encoder values are not used.
        window_size: side length of an attention window.
        mlp_ratio: ratio of hidden channels to channels in feed-forward networks.
        qkv_bias: whether queries, keys and values have a bias.
        attention: 'assa', 'dense', 'sparse', 'sparse_relu' or 'topk'; see `ops.attention_weights`.
        ffn: 'frfn', 'leff' or 'mlp'.
        drop_path_rate: maximum stochastic depth rate: grows from 0 along the encoder, falls along the decoder.
        use_checkpoint: whether to use gradient checkpointing for each block: less memory, about a third more time.
        topk_ratio: fraction of the keys kept by 'topk'.
    Raises:
        OptionError: if an option is out of range or options contradict one another.
    Source: Zhou et al., CVPR 2024, following the released code where it differs from the paper.
    """

    block_classes = (ASTBlock,)  # compiled or checkpointed individually in training, see models.network_switches
    variants = VARIANTS
    takes_any_size = True
    works_as_graph = True  # as a CUDA graph: no value is read on the host, and no tensor is cached by size

    def __init__(
        self,
        img_size: int = 128,
        in_chans: int = 3,
        out_chans: int = 3,
        embed_dim: int = 32,
        depths: Sequence[int] = (2, 2, 2, 2, 2, 2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8, 16, 16, 8, 4, 2),
        window_size: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attention: str = 'assa',
        ffn: str = 'frfn',
        drop_path_rate: float = 0.1,
        use_checkpoint: bool = False,
        topk_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        check_choice('attention', attention, ATTENTIONS)
        num_stages = 2 * NUM_LEVELS + 1
        for key, value in (('depths', depths), ('num_heads', num_heads)):
            if len(value) != num_stages or min(value) < 1:
                raise OptionError(f'{key} must be {num_stages} numbers of 1 or more, not {list(value)}')
        if window_size < 1 or img_size < 2**NUM_LEVELS:
            raise OptionError(
                f'window_size must be at least 1 and img_size at least {2**NUM_LEVELS}, '
                f'not {window_size} and {img_size}'
            )
        self.in_chans, self.out_chans = in_chans, out_chans
        dims = [embed_dim * 2**level for level in range(NUM_LEVELS + 1)]
        drop_rates = _drop_path_rates(depths, drop_path_rate)

        def stage(index: int, dim: int, level: int, attends: bool, **resampling: nn.Module) -> Stage:
            blocks = []
            for position, drop_rate in enumerate(drop_rates[index]):
                sizes = num_heads[index], *_window_and_shift(img_size // 2**level, window_size, position)
                kinds = attention if attends else None, ffn
                blocks.append(ASTBlock(dim, *sizes, mlp_ratio, *kinds, qkv_bias, drop_rate, topk_ratio))
            return Stage(blocks, use_checkpoint, **resampling)

        self.input_proj = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.activation = nn.LeakyReLU(0.01)
        self.encoder = nn.ModuleList(
            stage(i, dims[i], i, False, downsample=nn.Conv2d(dims[i], dims[i + 1], 4, stride=2, padding=1))
            for i in range(NUM_LEVELS)
        )
        self.bottleneck = stage(NUM_LEVELS, dims[-1], NUM_LEVELS, True)
        self.decoder = nn.ModuleList()
        incoming = dims[-1]
        for i in range(NUM_LEVELS):
            level = NUM_LEVELS - 1 - i
            upsample = nn.ConvTranspose2d(incoming, dims[level], 2, stride=2)
            incoming = 2 * dims[level]  # upsampled map, concatenated with the encoder's map of the same level
            self.decoder.append(stage(NUM_LEVELS + 1 + i, incoming, level, True, upsample=upsample))
        self.output_proj = nn.Conv2d(incoming, out_chans, 3, padding=1)

        self.size_multiple = _size_multiple(img_size, window_size)
        self.apply(init_weights)
        self.register_load_state_dict_pre_hook(_rename_official)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Restore images.

        Args:
            x: float, [B, in_chans, H, W], with any H and W >= 1; padded by reflection to multiples of `size_multiple`.
            mask: [B or 1, 1, H, W]; tokens where it is nonzero do not attend to one another, see `ops.pair_mask`.
        Returns:
            [B, out_chans, H, W], not clamped.
        Raises:
            ShapeError: if x or mask has other dimensions.
        """
        self._check_input(x, mask)
        H, W = x.shape[-2:]
        padded = pad_to_multiple(x, self.size_multiple)
        if mask is not None:
            mask = nn.functional.pad(mask, (0, padded.shape[-1] - W, 0, padded.shape[-2] - H))
        y = _nhwc(self.activation(self.input_proj(padded)))
        skips = []
        for stage in self.encoder:
            y = stage(y, mask)
            skips.append(y)
            y = _nhwc(stage.downsample(_nchw(y)))
        y = self.bottleneck(y, mask)
        for stage in self.decoder:
            y = torch.cat([_nhwc(stage.upsample(_nchw(y))), skips.pop()], dim=-1)
            y = stage(y, mask)
        y = self.output_proj(_nchw(y))[..., :H, :W]
        return x + y if self.in_chans == self.out_chans else y.contiguous()

    @staticmethod
    def read_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Infer the options from names and shapes; see `infer_options`, which also reports assumptions."""
        return infer_options(state)[0]

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """Load a state dict with plugin or official names, with or without DataParallel's prefix `module.`.

        Raises:
            CheckpointError: if it does not match; names the tensors and the options of the network it belongs to.
        """
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise CheckpointError(describe_mismatch(self.state_dict(), state_dict) or str(error)) from error

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        if x.ndim != 4 or x.shape[1] != self.in_chans or 0 in x.shape:
            raise ShapeError(f'AST expects a non-empty input [B, {self.in_chans}, H, W], got {list(x.shape)}')
        if mask is not None:
            expected = [[batch, 1, *x.shape[-2:]] for batch in dict.fromkeys((1, x.shape[0]))]
            if list(mask.shape) not in expected:
                raise ShapeError(f'the mask must be {" or ".join(map(str, expected))}, not {list(mask.shape)}')


def _variant(name: str) -> Callable[..., AST]:
    """Return a constructor of AST with a row of `VARIANTS` as defaults, reflected in its signature."""
    row = VARIANTS[name]

    def build(**options) -> AST:
        return AST(**{**row, **options})

    signature = inspect.signature(AST)
    parameters = [
        p.replace(default=row.get(p.name, p.default), kind=inspect.Parameter.KEYWORD_ONLY)
        for p in signature.parameters.values()
    ]
    build.__signature__ = signature.replace(parameters=parameters, return_annotation=AST)
    build.__name__ = build.__qualname__ = name
    build.from_pretrained = AST.from_pretrained
    build.__doc__ = f'AST with {", ".join(f"{key} {value}" for key, value in row.items())}; see `AST` for the options.'
    return build


AST_XS = _variant('AST_XS')
AST_T = _variant('AST_T')
AST_B = _variant('AST_B')


def _rename_official(module: nn.Module, state: dict[str, Tensor], prefix: str, *_) -> None:
    renamed = plain_state(state, prefix)
    state.clear()
    state.update(renamed)


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _window_and_shift(nominal_side: int, window_size: int, position: int) -> tuple[int, int]:
    """Return window and shift size of the block at `position` in a level with a nominal side."""
    if nominal_side <= window_size:
        return nominal_side, 0
    return window_size, window_size // 2 if position % 2 else 0


def _size_multiple(img_size: int, window_size: int) -> int:
    """Return the number that H and W of an image must be multiples of, so that windows fit at every level."""
    sides = (2**level * _window_and_shift(img_size // 2**level, window_size, 0)[0] for level in range(NUM_LEVELS + 1))
    return math.lcm(*sides)


def _drop_path_rates(depths: Sequence[int], highest: float) -> list[list[float]]:
    """Return the stochastic depth rates of the blocks, one list for each of the nine levels.

    The rates grow linearly from 0 to `highest` over the encoder, stay there in the bottleneck, and follow the reversed
    list of the encoder in the decoder, with rate 0 for any further blocks.
    """
    num_encoder = sum(depths[:NUM_LEVELS])
    down = torch.linspace(0, highest, num_encoder, device='cpu').tolist()
    up = down[::-1] + [0.0] * max(0, sum(depths[NUM_LEVELS + 1 :]) - num_encoder)
    rates = iter(down + [highest] * depths[NUM_LEVELS] + up)
    return [[next(rates) for _ in range(depth)] for depth in depths]
