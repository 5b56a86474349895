"""State dicts: matching names to a network, conversion of official AST names, inference of AST options."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from ast_plugin.archs.blocks import mlp_ratio_of
from ast_plugin.checkpoints import AVERAGED, STATE_KEYS, Checkpoint
from ast_plugin.errors import CheckpointError

# (official, ours) as regular expressions; every matching row is applied, from top to bottom
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
# names that every AST has, and hardly any other network
_ANCHORS = {'input_proj.weight', 'output_proj.weight', 'bottleneck.blocks.0.norm1.weight'}
_FFN_PARTS = {'partial_conv': 'frfn', 'depthwise': 'leff'}  # layers and the kind that they imply, in this order
DERIVED = '.attn.relative_position_index'  # buffer in official files; computed here, see ops.windows
# Name components inserted by wrappers: torch.compile, FSDP, activation checkpointing, Fabric.
_WRAPPERS = re.compile(r'\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.')
_PARALLEL = re.compile(r'(?<=\.)module\.')  # inside names, if a submodule was wrapped by DataParallel
_MAX_NAMES = 3  # tensors listed in a message


def rename_official(name: str) -> str:
    """Convert an official tensor name to the plugin's; the plugin's own names are unchanged."""
    for official, ours in OFFICIAL_NAMES:
        name = re.sub(official, ours, name)
    return name


def plain_state(state: Mapping[str, Tensor], prefix: str = '') -> dict[str, Tensor]:
    """Convert a state dict to plugin names: convert official names, remove wrapper prefixes and derived buffers.

    Args:
        state: state dict of an AST, or of a network that contains one under `prefix`.
        prefix: only names with this prefix are converted; all others are kept.
    Returns:
        A new dictionary that shares the tensors. Tensors beside the AST keep their names; counters beside it, and
        values that are no arrays, are omitted.
    """
    arrays = {name: tensor for name, tensor in state.items() if hasattr(tensor, 'shape')}
    own = {name[len(prefix) :]: tensor for name, tensor in arrays.items() if name.startswith(prefix)}
    _, own, rest = under_prefix(own, _ANCHORS)
    others = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    others |= {prefix + name: tensor for name, tensor in rest.items() if tensor.ndim}
    return others | {prefix + rename_official(name): own[name] for name in own if not name.endswith(DERIVED)}


def under_prefix(
    state: Mapping[str, Tensor], expected: Iterable[str]
) -> tuple[str, dict[str, Tensor], Mapping[str, Tensor]]:
    """Find the prefix of a network's names in a state dict, such as `module.`, `net.` or `model.`, nested or not.

    Args:
        state: state dict, with official AST names or others.
        expected: names of all or some of the network's tensors.
    Returns:
        The prefix with the most `expected` names, or '' if there are none; on ties, averaged weights come first, then
        no prefix or one of `STATE_KEYS`. The tensors under it, with official names converted if more of these match.
        The remaining tensors.
    """
    expected = set(expected)
    has_module = any(re.search(r'\bmodule\.', name) for name in expected)
    plain = {name if has_module else _PARALLEL.sub('', name): full for name, full in _unwrapped(state).items()}
    counts: Counter[tuple[str, bool]] = Counter()
    for name in plain:
        for start in (0, *(match.end() for match in re.finditer(r'\.', name))):
            own = name[start:]
            counts[name[:start], False] += own in expected
            counts[name[:start], True] += rename_official(own) in expected
    most = max(counts.values(), default=0)
    candidates = [key for key, count in counts.items() if count == most > 0] or [('', False)]
    prefix, is_official = min(candidates, key=lambda key: (_rank(key[0]), len(key[0]), key[1]))
    rename: Callable[[str], str] = rename_official if is_official else str
    own = {rename(name[len(prefix) :]): state[full] for name, full in plain.items() if name.startswith(prefix)}
    return prefix, own, {full: state[full] for name, full in plain.items() if not name.startswith(prefix)}


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map names without wrapper components to the original names of a state dict."""
    return {_WRAPPERS.sub('', name): name for name in state}


def _rank(prefix: str) -> int:
    return 0 if AVERAGED.search(prefix) else 1 if not prefix or not {*STATE_KEYS}.isdisjoint(prefix.split('.')) else 2


def without_prefixes(state: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield a state dict without wrapper components, then repeatedly without the first name part that all share."""
    state = {plain: state[name] for plain, name in _unwrapped(state).items()}
    yield state
    while len(firsts := {name.partition('.')[0] for name in state}) == 1 and all('.' in name for name in state):
        start = len(firsts.pop()) + 1
        state = {name[start:]: tensor for name, tensor in state.items()}
        yield state


def load_into(network: nn.Module, checkpoint: Checkpoint, *, strict: bool = True, assign: bool = False) -> list[str]:
    """Load the weights of a file into a network.

    Common name prefixes are removed, official AST names are converted, and counters that the network does not have are
    ignored.

    Args:
        network: network to load the weights into.
        checkpoint: contents of the weights file.
        strict: whether all tensors must be present and match; otherwise those that match are loaded, at least one.
        assign: use the tensors of the file instead of copying, as in `torch.nn.Module.load_state_dict`.
    Returns:
        A line with the number of tensors loaded, and a line for each notable deviation.
    Raises:
        CheckpointError: if the weights belong to another network; names the tensors that differ.
    """
    expected = network.state_dict()
    prefix, state, rest = under_prefix(checkpoint.state, expected)
    notes = list(checkpoint.notes)
    if prefix:
        other, same, _ = under_prefix(rest, expected)
        if _rank(other) == _rank(prefix) > 0 and len(expected.keys() & same) == len(expected.keys() & state):
            states = f'{prefix.rstrip(".")}, {other.rstrip(".")}'
            raise CheckpointError(
                f'{checkpoint.path} contains several state dicts, {states}: select one with --param-key or '
                'path.param_key_g'
                f'{f", prefixed with {checkpoint.param_key}." if checkpoint.param_key else ""}'
            )
        others = f'; ignored: {_named(rest)}' if rest else ''
        notes.append(f'removed the prefix {prefix} from names{others}')
    if counters := [name for name, tensor in state.items() if name not in expected and tensor.ndim == 0]:
        notes.append(f'ignored counters: {_named(counters)}')
    ignored = {*counters, *(name for name in state.keys() - expected.keys() if name.endswith(DERIVED))}
    state = {name: tensor for name, tensor in state.items() if name not in ignored}
    taken = [name for name, tensor in expected.items() if name in state and state[name].shape == tensor.shape]
    if unlike := [name for name in taken if state[name].is_floating_point() != expected[name].is_floating_point()]:
        raise CheckpointError(
            f'{checkpoint.path}: {unlike[0]} is {state[unlike[0]].dtype}, expected {expected[unlike[0]].dtype}: '
            'weights of quantised networks are not supported'
        )
    if not strict:
        if not taken:
            raise CheckpointError(
                f'{checkpoint.path}: none of its {len(state)} tensors ({_named(state)}) matches one of the '
                f'{len(expected)} of {type(network).__name__} ({_named(expected)}) in name and shape: the weights '
                'belong to another network'
            )
        unfit = [name for name in state if name in expected and name not in taken]
        deviations = {
            'shape mismatch': [f'{n} {list(state[n].shape)}, expected {list(expected[n].shape)}' for n in unfit],
            'missing from the file': [name for name in expected if name not in state],
            'not in the network': [name for name in state if name not in expected],
        }
        notes += [f'{what}: {_named(names)}' for what, names in deviations.items() if names]
        state = {name: state[name] for name in taken}
    try:
        network.load_state_dict(state, strict=strict, assign=assign)
    except CheckpointError as error:
        raise CheckpointError(f'{checkpoint.path}: {error}') from error
    except RuntimeError as error:
        lines = ' '.join(' '.join(str(error).splitlines()[1:3]).split())  # the first line has no details
        raise CheckpointError(
            f'{checkpoint.path}: the weights do not match {type(network).__name__} with these options: '
            f'{lines[:300]}{"…" if len(lines) > 300 else ""}'
        ) from error
    return [f'{len(taken)} of {len(expected)} tensors loaded', *notes]


def _named(names: Iterable[str], separator: str = ', ') -> str:
    names = list(names)
    more = f' and {len(names) - _MAX_NAMES} more' if len(names) > _MAX_NAMES else ''
    return separator.join(names[:_MAX_NAMES]) + more


def infer_options(state: Mapping[str, Tensor]) -> tuple[dict, list[str]]:
    """Infer the options of an AST from the names and shapes of a state dict.

    Args:
        state: state dict with official or plugin names.
    Returns:
        The options for `AST`, and a line for each that had to be assumed.
    Raises:
        CheckpointError: if the state dict does not belong to an AST.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in plain_state(state).items()}
    if 'encoder.0.blocks.0.attn.position_bias' in shapes:  # Uformer, which uses the same official names
        raise CheckpointError('this is not the state dict of an AST: its encoder has attention')
    try:
        return _read_shapes(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f'this is not the state dict of an AST: {error} is missing') from error


def _read_shapes(shapes: dict[str, tuple[int, ...]]) -> tuple[dict, list[str]]:
    stages = [*(f'encoder.{i}' for i in range(4)), 'bottleneck', *(f'decoder.{i}' for i in range(4))]
    embed_dim, in_chans = shapes['input_proj.weight'][:2]
    first_ffn = 'encoder.0.blocks.0.ffn'
    attention = 'assa' if 'bottleneck.blocks.0.attn.gate' in shapes else 'dense'
    # bias tables are [(2 · window - 1)², heads]; the encoder has no attention
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
        'num_heads': heads[:0:-1] + heads,  # encoder values are mirrored and have no effect
        'window_size': window_size,
        # The widest level determines the hidden channels of all others, where they are rounded down.
        'mlp_ratio': mlp_ratio_of(*shapes['bottleneck.blocks.0.ffn.project.weight']),
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
            'img_size cannot be inferred from weights: assuming 128, as in the published tests '
            '(it determines whether the deepest levels shift their windows)'
        )
    if attention == 'dense':
        assumed.append('attention without gates may be dense, sparse or topk: assuming dense')
    return options, assumed


def describe_mismatch(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str | None:
    """Describe in one line how a state dict differs from that of a network; return None if it matches."""
    want = {name: list(tensor.shape) for name, tensor in plain_state(expected).items()}
    have = {name: list(tensor.shape) for name, tensor in plain_state(state).items()}
    faults = [f'{n} is {have[n]}, expected {want[n]}' for n in want if n in have and have[n] != want[n]]
    faults += [f'{n} {want[n]} is missing' for n in want if n not in have]
    faults += [f'{n} {have[n]} is unexpected' for n in have if n not in want]
    if not faults:
        return None
    return f'the weights do not match the network: {_named(faults, "; ")}. {_compare(expected, state)}'


def _compare(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    try:
        have, want = (infer_options(each)[0] for each in (state, expected))
    except CheckpointError:
        return 'The weights do not belong to an AST, or the network was modified'
    differing = {key: value for key, value in have.items() if value != want[key]}
    if not differing:
        return 'The options match, only names or shapes differ'
    options = ', '.join(f'{key}: {value}' for key, value in differing.items())
    return f'The weights belong to an AST with {options}: set these under network_g'
