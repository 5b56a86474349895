"""The rules of `Mixed`: what they may say, which modules they mean, and what blocks they put there."""

import difflib
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ast_plugin.archs import blocks
from ast_plugin.archs.mixed.adapters import OPERATIONS, MixedIn, keep_weights, put_in
from ast_plugin.archs.mixed.block_registry import Declaration, declaration
from ast_plugin.archs.mixed.call_sites import Site, find_site
from ast_plugin.archs.networks import Trial, square_side, window_of
from ast_plugin.errors import OptionError, PluginError, ShapeError, did_you_mean, one_line

KEYS = ('match', 'with', 'op', 'keep_weights', 'dense_share', 'gain')
DENSE_SHARE = 0.99
WINDOW_SIZE = 8
HEAD_DIM = 32  # channels of a head where nothing says how many heads there are, as in AST's first level
_CLASS = 'class:'
_NEAR = 4  # names that a message lists
# Blocks whose linear layers start as AST's do; those of others start as their authors have them.
_DRAWN_ANEW = (blocks.ASTBlock, *blocks.ATTENTIONS.values(), *blocks.FEED_FORWARDS.values())


@dataclass(frozen=True)
class Rule:
    """One rule: modules that `match` get a `block` by `op`.

    Attributes:
        where: `mix.N`, for messages.
        match: a glob over the dotted names of modules, or `class:` and one over the names of classes. In names `*`
            stands for one step, or a part of it, and `**` for any number of steps.
        block: what is put there.
        options: of the block, those that are inferred left out.
        op: see `adapters.MixedIn`.
        keep_weights: carry what a replaced module has learned into the block.
        dense_share: share of softmax in ASSA's gate then; None for blocks without a gate.
        gain: of `wrap`.
    """

    where: str
    match: str
    block: Declaration
    options: Mapping[str, Any]
    op: str = 'replace'
    keep_weights: bool = False
    dense_share: float | None = None
    gain: float = 0.0


def read_rules(rules: Any) -> list[Rule]:
    """The rules as an option file gives them.

    Raises:
        OptionError: naming rule and key of what is wrong.
    """
    if not isinstance(rules, Sequence) or isinstance(rules, str) or not rules:
        raise OptionError('mix: expected a list of rules, each {match: ..., with: {type: ...}}')
    return [_read_rule(f'mix.{number}', rule) for number, rule in enumerate(rules)]


def _read_rule(where: str, rule: Any) -> Rule:
    if not isinstance(rule, Mapping):
        raise OptionError(f'{where}: expected {{match: ..., with: {{type: ...}}}}, got {rule!r:.60}')
    for key in rule:
        if key not in KEYS:
            raise OptionError(f'{where}.{key}: unknown key{did_you_mean(str(key), KEYS)} (there are {", ".join(KEYS)})')
    match, options = rule.get('match'), rule.get('with')
    if not isinstance(match, str) or not match.removeprefix(_CLASS):
        raise OptionError(f'{where}.match: expected a glob over module names, or class:NAME, got {match!r}')
    if not isinstance(options, Mapping) or 'type' not in options:
        raise OptionError(f'{where}.with: expected the block, {{type: ASSA, ...}}, got {options!r:.60}')
    try:
        block = declaration(options['type'])
    except OptionError as error:
        raise OptionError(f'{where}.with.type: {error}') from None
    own = {key: value for key, value in options.items() if key != 'type'}
    for key in own:
        known = [name for name in block.parameters or () if name != 'layout']
        if key == 'layout' or (block.parameters is not None and key not in known):
            raise OptionError(f'{where}.with.{key}: {block.name} takes no such option{did_you_mean(str(key), known)}')
    op = rule.get('op', 'replace')
    if op not in OPERATIONS:
        raise OptionError(f'{where}.op: expected one of {", ".join(OPERATIONS)}, got {op!r}')
    return Rule(where, match, block, own, op, **_weights_options(where, rule, op))


def _weights_options(where: str, rule: Mapping[str, Any], op: str) -> dict[str, Any]:
    """`keep_weights`, `dense_share` and `gain`, checked."""
    keep, share, gain = rule.get('keep_weights', False), rule.get('dense_share'), rule.get('gain')
    if not isinstance(keep, bool):
        raise OptionError(f'{where}.keep_weights: expected true or false, got {keep!r}')
    if keep and op != 'replace':
        raise OptionError(f'{where}.keep_weights: {op} keeps the module with its weights, it is for replace')
    if share is not None:
        if not keep:
            raise OptionError(f'{where}.dense_share: goes with keep_weights: true')
        if not _is_number(share) or not 0 < share < 1:
            raise OptionError(f'{where}.dense_share: expected a number between 0 and 1, both excluded, got {share!r}')
    if gain is not None and (op != 'wrap' or not _is_number(gain)):
        raise OptionError(f'{where}.gain: a number, for op: wrap alone, got {gain!r} with op: {op}')
    return {'keep_weights': keep, 'dense_share': share, 'gain': gain or 0.0}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def assign(network: nn.Module, rules: Sequence[Rule]) -> dict[str, Rule]:
    """Find the rule of each module that one means, by the module's name.

    Raises:
        OptionError: if a rule means none, with near names, or two mean the same, or one inside of a replaced one.
    """
    assigned: dict[str, Rule] = {}
    modules = {name: module for name, module in network.named_modules(remove_duplicate=False) if name}
    first = {module: name for name, module in reversed(modules.items())}  # a module may have further names
    for rule in rules:
        meant = [module for name, module in modules.items() if _means(rule.match, name, module)]
        names = list(dict.fromkeys(first[module] for module in meant))
        if not names:
            raise OptionError(f'{rule.where}.match: no module is meant by {rule.match}; {_near(rule.match, modules)}')
        for name in names:
            if name in assigned:
                raise OptionError(f'{rule.where}.match: {name} would be exchanged twice, by {assigned[name].where} too')
            assigned[name] = rule
    for name, rule in assigned.items():
        steps = name.split('.')
        for outer in ('.'.join(steps[:depth]) for depth in range(1, len(steps))):
            if outer in assigned and assigned[outer].op == 'replace':
                raise OptionError(
                    f'{rule.where}.match: {name} would be exchanged twice, it lies in {outer}, which '
                    f'{assigned[outer].where} replaces'
                )
    return assigned


def _means(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith(_CLASS):
        return fnmatchcase(type(module).__name__, pattern.removeprefix(_CLASS))
    return _glob(pattern.split('.'), name.split('.'))


def _glob(pattern: list[str], steps: list[str]) -> bool:
    if not pattern:
        return not steps
    if pattern[0] == '**':
        return _glob(pattern[1:], steps) or (bool(steps) and _glob(pattern, steps[1:]))
    return bool(steps) and fnmatchcase(steps[0], pattern[0]) and _glob(pattern[1:], steps[1:])


def _near(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """What could have been meant."""
    if pattern.startswith(_CLASS):
        known = sorted({type(module).__name__ for module in modules.values()})
        near = difflib.get_close_matches(pattern.removeprefix(_CLASS), known, n=_NEAR, cutoff=0.5) or known[:12]
        return f'classes there are: {", ".join(near)}'
    known = list(dict.fromkeys(re.sub(r'\b\d+\b', '*', name) for name in modules))
    near = difflib.get_close_matches(re.sub(r'\b\d+\b', '*', pattern), known, n=_NEAR, cutoff=0.5)
    if not near:
        last = pattern.split('.')[-1]
        near = [name for name in known if last in name.split('.')][:_NEAR] or known[:_NEAR]
    return f'near it are {", ".join(near)}'


@dataclass(frozen=True)
class Exchange:
    """What was done at one place: rule, module, its class, block, operation, shape of x there, and parameters."""

    where: str
    name: str
    was: str
    block: str
    op: str
    kind: str
    shape: tuple[int, ...]
    options: Mapping[str, Any]
    parameters_before: int
    parameters_after: int


def exchange(network: nn.Module, assigned: Mapping[str, Rule], trial: Trial) -> list[Exchange]:
    """Put a block at every place that a rule means.

    Args:
        network: changed in place.
        assigned: see `assign`.
        trial: of the network, with what `record_calls` recorded.
    Returns:
        What was done, by place.
    Raises:
        ShapeError: if a block cannot stand somewhere, with the shapes in question.
        OptionError: if one cannot be made of the sizes there, or not keep the weights.
    """
    positions: dict[str, int] = {}
    made = []
    for name, rule in assigned.items():
        position = positions[rule.where] = positions.get(rule.where, -1) + 1
        module = network.get_submodule(name)
        adapter, options = _make_adapter(name, rule, module, position, trial)
        made.append((rule, module, adapter, options))
    put_in(network, [(module, adapter) for _, module, adapter, _ in made])
    return [
        Exchange(
            where=rule.where,
            name=adapter.site.name,
            was=type(module).__name__,
            block=rule.block.name,
            op=rule.op,
            kind=adapter.site.kind,
            shape=adapter.site.shape,
            options=options,
            parameters_before=sum(parameter.numel() for parameter in module.parameters()),
            parameters_after=sum(parameter.numel() for parameter in adapter.parameters()),
        )
        for rule, module, adapter, options in made
    ]


def _make_adapter(
    name: str, rule: Rule, module: nn.Module, position: int, trial: Trial
) -> tuple[MixedIn, dict[str, Any]]:
    try:
        site = find_site(name, module, trial, rule.options.get('window_size'), rule.block.works_in != 'any')
    except ShapeError as error:
        raise ShapeError(f'{rule.where}.match: {error}') from None
    what = f'{rule.where}: {rule.block.name} at {name} ({type(module).__name__})'
    _check_place(what, rule, site)
    dim = site.channels(site.shape if rule.op in ('replace', 'prepend') else site.output)
    window = next((rule.options.get(key) for key, size in rule.block.sizes.items() if size == 'window_size'), None)
    sizes = infer_sizes(module, site, dim, position, window)
    options = {key: sizes[size] for key, size in rule.block.sizes.items() if size in sizes}
    options.update(rule.options)
    _check_sizes(what, rule, site, options, dim)
    block = _build_block(what, rule, options)
    takes_windows = rule.block.works_in in ('windows', 'any') or hasattr(block, 'attend_windows')
    if site.kind == 'windows' and not takes_windows:
        raise OptionError(f'{what}: a block that works in {rule.block.works_in} needs attend_windows for windows')
    if rule.keep_weights:
        share = rule.dense_share or (DENSE_SHARE if isinstance(block, blocks.ASSA) else None)
        try:
            keep_weights(block, module, share)
        except PluginError as error:
            raise type(error)(f'{rule.where}.keep_weights: {name}: {error}') from error
    original = None if rule.op == 'replace' else module
    return MixedIn(block, rule.block.works_in, site, rule.op, original, rule.gain), options


def _build_block(what: str, rule: Rule, options: Mapping[str, Any]) -> nn.Module:
    try:
        block = rule.block.build(**options)
    except PluginError as error:
        raise type(error)(f'{what}: {error}') from error
    except Exception as error:  # whatever somebody's block raises about its sizes
        raise OptionError(f'{what} cannot be made of {options}: {type(error).__name__}: {one_line(error)}') from error
    if type(block) in _DRAWN_ANEW:
        block.apply(blocks.init_weights)
    return block


def _check_place(what: str, rule: Rule, site: Site) -> None:
    shapes = f'{list(site.shape)} come in and {list(site.output) if site.output else "no tensor"} go out'
    if site.place not in rule.block.replaces:
        words = {'windows': 'in windows', 'tokens': 'among tokens', 'maps': 'on maps'}
        places = ' or '.join(words[place] for place in rule.block.replaces)
        raise ShapeError(f'{what}: {shapes}, {site.place}, and it stands {places} alone')
    if rule.op != 'prepend' and (site.output is None or len(site.output) != len(site.shape)):
        raise ShapeError(f'{what}: {shapes}, expected the same kind of tensor')
    if rule.op == 'replace' and site.output != site.shape:
        raise ShapeError(f'{what}: {shapes}, and a block keeps the shape: use append, prepend or wrap')
    if rule.op in ('append', 'wrap') and site.place != 'maps' and site.output[:2] != site.shape[:2]:
        raise ShapeError(f'{what}: {shapes}, and tokens and windows must keep their number for {rule.op}')
    if site.kind == 'tokens' and site.size is None and rule.block.works_in != 'any':
        raise ShapeError(f'{what}: tokens {list(site.shape)}, and no caller is given their height and width')
    tokens = site.shape[1]
    foreign = [list(shape) for shape in site.others if site.kind != 'windows' or tuple(shape[1:]) != (tokens, tokens)]
    if foreign and rule.op == 'replace':
        raise ShapeError(f'{what}: it is given {foreign[0]} besides {list(site.shape)}, which the block cannot take')


def _check_sizes(what: str, rule: Rule, site: Site, options: Mapping[str, Any], dim: int) -> None:
    given = {size: options[key] for key, size in rule.block.sizes.items() if key in options}
    if given.get('dim', dim) != dim:
        raise ShapeError(f'{what}: {given["dim"]} channels asked for, the place has {dim}')
    window = given.get('window_size')
    if type(window) is not int:
        return
    height, width = site.nominal
    if site.kind == 'windows' and given.get('shift_size'):
        raise ShapeError(f'{what}: shift_size {given["shift_size"]} asked for, it is the caller who cuts the windows')
    if site.kind == 'windows' and window != height:
        raise ShapeError(f'{what}: window_size {window} asked for, the caller cuts windows of {height}x{width}')
    if site.kind != 'windows' and window > min(height, width):
        raise OptionError(
            f'{what}: window_size {window} is larger than the map there, {height}x{width} for images of nominal_size; '
            'give a smaller window_size, or the nominal_size of your images'
        )


def infer_sizes(module: nn.Module, site: Site, dim: int, position: int, window: Any = None) -> dict[str, Any]:
    """Sizes for a block in the place of a module, by their names in `block_registry.SIZES`.

    Heads (of what lies in it, too), window, shift, ratio of the hidden channels and bias are the module's own where it
    has them. Otherwise there is a head for each 32 channels, the window is 8, every second block shifts by half of it,
    and the rest is left out.

    Args:
        module: what stands there.
        site: what it works on.
        dim: channels.
        position: which of the rule's modules it is.
        window: side of a window that is asked for; the shift is half of it.
    """
    own_heads = _heads_of(module)
    heads = own_heads or next(filter(None, map(_heads_of, module.modules())), 0)
    own = site.nominal[0] if site.kind == 'windows' else window_of(module)
    window = window if type(window) is int else own or WINDOW_SIZE
    shift = window // 2 if position % 2 else 0
    if site.kind == 'windows':
        shift = 0
    elif window == own:
        shift = square_side(getattr(module, 'shift_size', shift))
    heads = heads or next(number for number in range(max(1, dim // HEAD_DIM), 0, -1) if dim % number == 0)
    sizes = {'dim': dim, 'num_heads': heads, 'window_size': window}
    if isinstance(shift, int) and 0 <= shift < window:
        sizes['shift_size'] = shift
    ratio = getattr(module, 'mlp_ratio', None)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if ratio is None and not own_heads and layers and layers[-1].out_features == dim:
        hidden = layers[-1].in_features
        ratio = hidden / dim
        if int(ratio * dim) < hidden:  # rounded down
            ratio = math.nextafter(ratio, math.inf)
    if isinstance(ratio, (int, float)):
        sizes['mlp_ratio'] = float(ratio)
    queries = getattr(module, 'qkv', getattr(module, 'q', None))
    if isinstance(queries, nn.Linear):
        sizes['qkv_bias'] = queries.bias is not None
    return sizes


def _heads_of(module: nn.Module) -> int:
    """The number of heads that a module says it has, 0 if none."""
    stated = (getattr(module, key, None) for key in ('num_heads', 'heads', 'n_heads'))
    return next((heads for heads in stated if isinstance(heads, int)), 0)
