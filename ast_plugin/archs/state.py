"""What the names and shapes of an AST state tell: official names to and from ours, and the network's options."""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from ast_plugin.errors import CheckpointError

# (official, ours) as regular expressions; a name is rewritten by every row that matches, from the top down
OFFICIAL_NAMES = (
    (r'^(input|output)_proj\.proj\.0\.', r'\1_proj.'),
    (r'^encoderlayer_(\d)\.', r'encoder.\1.'),
    (r'^decoderlayer_(\d)\.', r'decoder.\1.'),
    (r'^conv\.blocks\.', r'bottleneck.blocks.'),
    (r'^dowsample_(\d)\.conv\.0\.', r'encoder.\1.downsample.'),
    (r'^upsample_(\d)\.deconv\.0\.', r'decoder.\1.upsample.'),
    (r'\.attn\.relative_position_bias_table$', r'.attn.position_bias'),
    (r'\.attn\.w$', r'.attn.gate'),
    (r'\.attn\.qkv\.to_(q|kv)\.', r'.attn.\1.'),
    (r'\.mlp\.partial_conv3\.', r'.ffn.partial_conv.'),
    (r'\.mlp\.linear1\.0\.', r'.ffn.expand.'),
    (r'\.mlp\.linear2\.0\.', r'.ffn.project.'),
    (r'\.mlp\.dwconv\.0\.', r'.ffn.depthwise.'),
    (r'\.mlp\.fc1\.', r'.ffn.expand.'),
    (r'\.mlp\.fc2\.', r'.ffn.project.'),
)
_FFN_PARTS = {'partial_conv': 'frfn', 'depthwise': 'leff'}  # what only such a network, or one above it, has
DERIVED = '.attn.relative_position_index'  # official files hold this buffer; ours is computed, see ops.windows


def rename_official(name: str) -> str:
    """Our name for an official one; our own names stay as they are."""
    for official, ours in OFFICIAL_NAMES:
        name = re.sub(official, ours, name)
    return name


def plain_state(state: Mapping[str, Tensor], prefix: str = '') -> dict[str, Tensor]:
    """A state under our names: official names rewritten, DataParallel's `module.` and derived buffers left out.

    Args:
        state: names and tensors of an AST, or of a network that contains one under `prefix`.
        prefix: only names that begin so are looked at; all others are kept.
    Returns:
        A new dictionary, the tensors shared.
    """
    if state and all(name.startswith(prefix + 'module.') for name in state):
        state = {prefix + name[len(prefix) + len('module.') :]: tensor for name, tensor in state.items()}
    return {
        prefix + rename_official(name[len(prefix) :]) if name.startswith(prefix) else name: tensor
        for name, tensor in state.items()
        if not (name.startswith(prefix) and name.endswith(DERIVED))
    }


def infer_options(state: Mapping[str, Tensor]) -> tuple[dict, list[str]]:
    """Read a network's options off a state's names and shapes.

    Args:
        state: official names or ours.
    Returns:
        The options for `AST`, and a line for each that had to be assumed.
    Raises:
        CheckpointError: if the state is not of an AST.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in plain_state(state).items()}
    if 'encoder.0.blocks.0.attn.position_bias' in shapes:
        # Uformer, whose official names are the same
        raise CheckpointError('this is not the state of an AST: its encoder has attention')
    try:
        return _read_shapes(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f'this is not the state of an AST: {error} is missing among its names') from error


def _read_shapes(shapes: dict[str, tuple[int, ...]]) -> tuple[dict, list[str]]:
    stages = [*(f'encoder.{i}' for i in range(4)), 'bottleneck', *(f'decoder.{i}' for i in range(4))]
    embed_dim, in_chans = shapes['input_proj.weight'][:2]
    first_ffn = 'encoder.0.blocks.0.ffn'
    attention = 'assa' if 'bottleneck.blocks.0.attn.gate' in shapes else 'dense'
    # a bias table has (2 · window - 1)² rows and a column for each head; the encoder has no attention
    tables = {stage: shapes[f'{stage}.blocks.0.attn.position_bias'] for stage in stages[4:]}
    windows = {stage: (math.isqrt(rows) + 1) // 2 for stage, (rows, _) in tables.items()}
    heads = [heads for _, heads in tables.values()]
    last_norms = [name for name in shapes if name.endswith('norm2.weight')]  # every block has one
    window_size = max(windows.values())
    options = {
        'img_size': 128,
        'in_chans': in_chans,
        'out_chans': shapes['output_proj.weight'][0],
        'embed_dim': embed_dim,
        'depths': [sum(name.startswith(f'{stage}.') for name in last_norms) for stage in stages],
        'num_heads': heads[:0:-1] + heads,  # the encoder has no attention: mirrored, and without effect
        'window_size': window_size,
        'mlp_ratio': shapes[f'{first_ffn}.project.weight'][1] / embed_dim,
        'qkv_bias': 'bottleneck.blocks.0.attn.q.bias' in shapes,
        'attention': attention,
        'ffn': next((ffn for part, ffn in _FFN_PARTS.items() if f'{first_ffn}.{part}.weight' in shapes), 'mlp'),
    }
    assumed = []
    shrunk = [(stage, side) for stage, side in windows.items() if side < window_size]
    if shrunk:
        stage, side = shrunk[0]
        options['img_size'] = side * 2 ** (4 if stage == 'bottleneck' else 3 - int(stage[-1]))
    else:
        assumed.append(
            'img_size cannot be told from weights: 128 is assumed, as in the published tests '
            '(it decides whether the deepest levels shift their windows)'
        )
    if attention == 'dense':
        assumed.append('attention without gates may be dense, sparse or topk: dense is assumed')
    return options, assumed


def describe_mismatch(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """One line on how a state differs from the network's own, and what network it is of; None if it fits."""
    want = {name: list(tensor.shape) for name, tensor in plain_state(expected).items()}
    have = {name: list(tensor.shape) for name, tensor in plain_state(state).items()}
    faults = [f'{n} is {have[n]}, expected {want[n]}' for n in want if n in have and have[n] != want[n]]
    faults += [f'{n} {want[n]} is missing' for n in want if n not in have]
    faults += [f'{n} {have[n]} is not expected' for n in have if n not in want]
    if not faults:
        return None
    more = f', and {len(faults) - 3} more' if len(faults) > 3 else ''
    return f'the weights do not fit the network: {"; ".join(faults[:3])}{more}. {_compare(expected, state)}'


def _compare(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    try:
        have, _ = infer_options(state)
    except CheckpointError:
        return 'The file is not of an AST'
    want, _ = infer_options(expected)
    differing = {key: value for key, value in have.items() if value != want[key]}
    differing = differing or {key: have[key] for key in ('embed_dim', 'depths')}
    options = ', '.join(f'{key}: {value}' for key, value in differing.items())
    return f'The file is of an AST with {options}: set these under network_g'
