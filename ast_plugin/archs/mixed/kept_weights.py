"""Carrying the weights of a replaced module into the block that stands in its place."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ast_plugin.archs.blocks import MLP, WindowAttention
from ast_plugin.archs.mixed.call_sites import window_of
from ast_plugin.errors import OptionError, ShapeError
from ast_plugin.ops import relative_position_index

# Names in the state of a window attention that can be read; the gate of one of ours is what `dense_share` says.
_READ = {
    *('qkv', 'q', 'kv', 'to_q', 'to_kv', 'proj', 'weight', 'bias'),
    *('relative_position_bias_table', 'position_bias', 'gate'),
}


def keep_weights(block: nn.Module, source: nn.Module, dense_share: float | None = None) -> None:
    """Put what `source` has learned into `block`.

    Window attentions keep queries, keys, values, projection and position bias; ASSA's gate is set so that softmax has
    the share `dense_share` and the squared ReLU the rest. An MLP keeps both layers. Another block can do so with a
    method `keep_weights(source)`.

    Args:
        block: ours.
        source: of the network that the block is mixed into: q, k and v in one linear layer `qkv`, or in `q` and `kv`
            or `to_q` and `to_kv`.
        dense_share: in (0, 1), for ASSA alone.
    Raises:
        OptionError: if the block can keep nothing of such a module, or not all of it.
        ShapeError: if their sizes differ.
    """
    names = f'{type(block).__name__} can keep nothing of {type(source).__name__}'
    if isinstance(block, WindowAttention):
        found = read_attention(source)
        if found is None:
            raise OptionError(f'{names}: it is no window attention with qkv, proj and a table of position bias')
        _refuse(names, [name for name, _ in source.named_parameters() if not _READ.issuperset(name.split('.'))])
        _fill_attention(block, found)
    elif isinstance(block, MLP):
        layers = [module for module in source.modules() if isinstance(module, nn.Linear)]
        if len(layers) != 2 or not any(_is_exact_gelu(module) for module in source.modules()):
            raise OptionError(f'{names}: it is not two linear layers with a GELU between')
        carried = {id(parameter) for layer in layers for parameter in layer.parameters()}
        _refuse(names, [name for name, parameter in source.named_parameters() if id(parameter) not in carried])
        for ours, theirs in zip((block.expand, block.project), layers, strict=True):
            _copy_layer(ours, theirs.weight, theirs.bias)
    elif hasattr(block, 'keep_weights'):
        block.keep_weights(source)
    else:
        raise OptionError(f'{names}: leave keep_weights out')
    if dense_share is not None:
        set_dense_share(block, dense_share)


def _refuse(names: str, further: list[str]) -> None:
    if further:
        raise OptionError(f'{names}: it has learned more than the block has a place for, {", ".join(further[:4])}')


def set_dense_share(block: nn.Module, share: float) -> None:
    """Set the gate of ASSA so that softmax(gate)[0] is `share`.

    Raises:
        OptionError: if the block has no gate.
    """
    gate = getattr(block, 'gate', None)
    if gate is None:
        raise OptionError(f'dense_share is for ASSA: {type(block).__name__} has no gate')
    half = 0.5 * math.log(share / (1 - share))
    with torch.no_grad():
        gate.copy_(torch.tensor([half, -half]))


@dataclass(frozen=True)
class AttentionWeights:
    """What a window attention has learned: weight and bias of each layer, and the table of position bias."""

    q: tuple[Tensor, Tensor | None]
    kv: tuple[Tensor, Tensor | None]
    proj: tuple[Tensor, Tensor | None]
    position_bias: Tensor


def read_attention(source: nn.Module) -> AttentionWeights | None:
    """What `source` has learned, if it is a window attention that we can read.

    Queries are brought to our scale, 1 / sqrt(channels of a head), where the source has another.
    """
    table = getattr(source, 'relative_position_bias_table', getattr(source, 'position_bias', None))
    proj = getattr(source, 'proj', None)
    layers = _queries_keys_values(source)
    if layers is None or not isinstance(proj, nn.Linear) or not isinstance(table, Tensor) or table.ndim != 2:
        return None
    (q, q_bias), kv = layers
    scale = getattr(source, 'scale', None)
    if isinstance(scale, (int, float)):
        factor = scale * (q.shape[0] // table.shape[1]) ** 0.5
        if not math.isclose(factor, 1):
            q, q_bias = q * factor, None if q_bias is None else q_bias * factor
    return AttentionWeights((q, q_bias), kv, (proj.weight, proj.bias), _in_our_order(table, source))


def _in_our_order(table: Tensor, source: nn.Module) -> Tensor:
    """The table of position bias, its rows in the order of `ops.relative_position_index`, should they differ."""
    theirs, side = getattr(source, 'relative_position_index', None), window_of(source)
    if not isinstance(theirs, Tensor) or side is None or theirs.numel() != side**4 or len(table) != (2 * side - 1) ** 2:
        return table
    ours, theirs = relative_position_index(side).flatten().to(table.device), theirs.flatten().long().to(table.device)
    if torch.equal(ours, theirs):
        return table
    ordered = torch.empty_like(table)
    ordered[ours] = table.detach()[theirs]
    if not torch.equal(ordered[ours], table.detach()[theirs]):
        raise OptionError(f'the position bias of {type(source).__name__} depends on more than relative position')
    return ordered


def _queries_keys_values(source: nn.Module) -> tuple | None:
    qkv = getattr(source, 'qkv', None)
    if isinstance(qkv, nn.Linear) and qkv.out_features == 3 * qkv.in_features:
        dim = qkv.in_features
        bias = qkv.bias
        return (qkv.weight[:dim], None if bias is None else bias[:dim]), (
            qkv.weight[dim:],
            None if bias is None else bias[dim:],
        )
    for holder, names in ((source, ('q', 'kv')), (qkv, ('to_q', 'to_kv')), (source, ('to_q', 'to_kv'))):
        found = [getattr(holder, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in found):
            return tuple((layer.weight, layer.bias) for layer in found)
    return None


def _fill_attention(block: WindowAttention, found: AttentionWeights) -> None:
    side = window_of(block)
    if found.position_bias.shape != block.position_bias.shape:
        raise ShapeError(
            f'the table of position bias is {list(found.position_bias.shape)}, a window of {side} and '
            f'{block.num_heads} heads need {list(block.position_bias.shape)}: leave window_size and num_heads out'
        )
    for ours, (weight, bias) in ((block.q, found.q), (block.kv, found.kv), (block.proj, found.proj)):
        _copy_layer(ours, weight, bias)
    with torch.no_grad():
        block.position_bias.copy_(found.position_bias)


def _copy_layer(ours: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    if ours.weight.shape != weight.shape or (bias is not None and ours.bias is None):
        raise ShapeError(
            f'a layer of {list(weight.shape)} {"with" if bias is not None else "without"} bias does not go into one of '
            f'{list(ours.weight.shape)} {"with" if ours.bias is not None else "without"}'
        )
    with torch.no_grad():
        ours.weight.copy_(weight)
        if ours.bias is not None:
            ours.bias.zero_() if bias is None else ours.bias.copy_(bias)


def _is_exact_gelu(module: nn.Module) -> bool:
    return isinstance(module, nn.GELU) and module.approximate == 'none'
