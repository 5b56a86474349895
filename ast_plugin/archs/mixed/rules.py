"""The rules of `Mixed`: what they may say, which modules they mean, and what blocks they put there."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from torch import nn
from typing_extensions import TypedDict

from ast_plugin.archs import blocks
from ast_plugin.archs.mixed.adapters import MixedIn, Site, find_site, keep_weights, put_in
from ast_plugin.archs.mixed.block_registry import Declaration, declaration
from ast_plugin.archs.networks import Trial, square_side, window_of
from ast_plugin.errors import OptionError, PluginError, ShapeError, did_you_mean, one_line, tell_place
from ast_plugin.faults import Fault, Where, faults_of

DENSE_SHARE = 0.99
WINDOW_SIZE = 8
HEAD_DIM = 32  # channels of a head where nothing says how many heads there are, as in AST's first level
_CLASS = 'class:'
_NEAR = 4  # names that a message lists
# Blocks whose linear layers start as AST's do; those of others start as their authors have them.
_DRAWN_ANEW = (blocks.ASTBlock, *blocks.ATTENTIONS.values(), *blocks.FEED_FORWARDS.values())


class Block(TypedDict):
    """What stands at `with`: a block's type, and its options."""

    __pydantic_config__ = ConfigDict(extra='allow')

    type: str


class Rule(BaseModel, extra='forbid', frozen=True, strict=True):
    """One rule: modules that `match` get a block by `op`.

    Attributes:
        match: a glob over the dotted names of modules, or `class:` and one over the names of classes. In names `*`
            stands for one step, or a part of it, and `**` for any number of steps.
        block: `with` in a file: `type`, a name of `block_registry.BLOCKS`, and options; sizes left out are inferred.
        op: see `adapters.MixedIn`.
        keep_weights: carry what a replaced module has learned into the block.
        dense_share: share of softmax in ASSA's gate then; None for `DENSE_SHARE`.
        gain: of `wrap`.
    """

    match: str
    block: Block = Field(alias='with')
    op: Literal['replace', 'append', 'prepend', 'wrap'] = 'replace'
    keep_weights: bool = False
    dense_share: float | None = Field(None, gt=0, lt=1)
    gain: float = Field(0.0, allow_inf_nan=False)
    _number: int = PrivateAttr(0)

    @field_validator('match')
    @classmethod
    def _check_match(cls, match: str) -> str:
        if not match.removeprefix(_CLASS):
            raise ValueError('expected a glob over module names, or class:NAME')
        return match

    @field_validator('block')
    @classmethod
    def _check_block(cls, block: Block) -> Block:
        said = declaration(block['type'])
        known = [name for name in said.parameters or () if name != 'layout']
        for key in block.keys() - {'type'}:
            if key == 'layout' or (said.parameters is not None and key not in known):
                raise ValueError(f'{said.name} takes no option {key}{did_you_mean(str(key), known)}')
        return block

    @model_validator(mode='after')
    def _check_together(self) -> 'Rule':
        if self.keep_weights and self.op != 'replace':
            raise ValueError(f'keep_weights is for replace, {self.op} keeps the module with its weights')
        if self.dense_share is not None and not self.keep_weights:
            raise ValueError('dense_share goes with keep_weights: true')
        if 'gain' in self.model_fields_set and self.op != 'wrap':
            raise ValueError(f'gain is for op: wrap alone, not for {self.op}')
        return self

    @property
    def where(self) -> str:
        """`mix.N`, for messages."""
        return f'mix.{self._number}'

    @cached_property
    def declaration(self) -> Declaration:
        return declaration(self.block['type'])

    @property
    def options(self) -> dict[str, Any]:
        """Of the block, those that are inferred left out."""
        return {key: value for key, value in self.block.items() if key != 'type'}


_RULES = TypeAdapter(Annotated[list[Rule], Field(min_length=1)])


def read_rules(rules: Any) -> list[Rule]:
    """The rules as an option file gives them.

    Raises:
        OptionError: naming rule and key of all that is wrong.
    """
    if faults := rule_faults(rules, ('mix',)):
        raise OptionError('; '.join(map(str, faults)))
    read = _RULES.validate_python(rules)
    for number, rule in enumerate(read):
        rule._number = number
    return read


def rule_faults(rules: Any, where: Where) -> list[Fault]:
    """What is wrong with rules that stand at `where` in an option file."""
    try:
        _RULES.validate_python(rules)
        return []
    except ValidationError as error:
        return faults_of(error, Rule, rules, where)


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


class Exchange(NamedTuple):
    """What was done at one place: by which rule, the class that stood there, the block's options, and parameters."""

    rule: Rule
    site: Site
    was: str
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
    adapters, exchanges = [], []
    for name, rule in assigned.items():
        position = positions[rule.where] = positions.get(rule.where, -1) + 1
        module = network.get_submodule(name)
        with tell_place(f'{rule.where}: {rule.declaration.name} at {name} ({type(module).__name__})'):
            adapter, options = _make_adapter(name, rule, module, position, trial)
        adapters.append((module, adapter))
        counts = (sum(parameter.numel() for parameter in each.parameters()) for each in (module, adapter))
        exchanges.append(Exchange(rule, adapter.site, type(module).__name__, options, *counts))
    put_in(network, adapters)
    return exchanges


def _make_adapter(
    name: str, rule: Rule, module: nn.Module, position: int, trial: Trial
) -> tuple[MixedIn, dict[str, Any]]:
    said, own = rule.declaration, rule.options
    site = find_site(name, module, trial, own.get('window_size'), said.works_in != 'any')
    _check_place(rule, site)
    dim = site.channels(site.shape if rule.op in ('replace', 'prepend') else site.output)
    window = next((own.get(key) for key, size in said.sizes.items() if size == 'window_size'), None)
    sizes = _infer_sizes(module, site, dim, position, window)
    options = {key: sizes[size] for key, size in said.sizes.items() if size in sizes} | own
    _check_sizes({size: options[key] for key, size in said.sizes.items() if key in options}, site, dim)
    try:
        block = said.build(**options)
    except PluginError:
        raise
    except Exception as error:  # whatever somebody's block raises about its sizes
        raise OptionError(f'it cannot be made of {options}: {type(error).__name__}: {one_line(error)}') from error
    if type(block) in _DRAWN_ANEW:
        block.apply(blocks.init_weights)
    if site.kind == 'windows' and said.works_in not in ('windows', 'any') and not hasattr(block, 'attend_windows'):
        raise OptionError(f'a block that works in {said.works_in} needs attend_windows for windows')
    if rule.keep_weights:
        keep_weights(block, module, rule.dense_share or (DENSE_SHARE if isinstance(block, blocks.ASSA) else None))
    original = None if rule.op == 'replace' else module
    return MixedIn(block, said.works_in, site, rule.op, original, rule.gain), options


def _check_place(rule: Rule, site: Site) -> None:
    """Raise ShapeError where no block of the rule's can stand."""
    said = rule.declaration
    shapes = f'{list(site.shape)} come in and {list(site.output) if site.output else "no tensor"} go out'
    if site.place not in said.replaces:
        words = {'windows': 'in windows', 'tokens': 'among tokens', 'maps': 'on maps'}
        places = ' or '.join(words[place] for place in said.replaces)
        raise ShapeError(f'{shapes}, {site.place}, and it stands {places} alone')
    if rule.op != 'prepend' and (site.output is None or len(site.output) != len(site.shape)):
        raise ShapeError(f'{shapes}, expected the same kind of tensor')
    if rule.op == 'replace' and site.output != site.shape:
        raise ShapeError(f'{shapes}, and a block keeps the shape: use append, prepend or wrap')
    if rule.op in ('append', 'wrap') and site.place != 'maps' and site.output[:2] != site.shape[:2]:
        raise ShapeError(f'{shapes}, and tokens and windows must keep their number for {rule.op}')
    if site.kind == 'tokens' and site.size is None and said.works_in != 'any':
        raise ShapeError(f'tokens {list(site.shape)}, and no caller is given their height and width')
    tokens = site.shape[1]
    foreign = [list(shape) for shape in site.others if site.kind != 'windows' or tuple(shape[1:]) != (tokens, tokens)]
    if foreign and rule.op == 'replace':
        raise ShapeError(f'it is given {foreign[0]} besides {list(site.shape)}, which the block cannot take')


def _check_sizes(given: Mapping[str, Any], site: Site, dim: int) -> None:
    """Raise ShapeError or OptionError where sizes by their names in `block_registry.SIZES` do not suit the place."""
    if given.get('dim', dim) != dim:
        raise ShapeError(f'{given["dim"]} channels asked for, the place has {dim}')
    window = given.get('window_size')
    if type(window) is not int:
        return
    height, width = site.nominal
    if site.kind == 'windows' and given.get('shift_size'):
        raise ShapeError(f'shift_size {given["shift_size"]} asked for, it is the caller who cuts the windows')
    if site.kind == 'windows' and window != height:
        raise ShapeError(f'window_size {window} asked for, the caller cuts windows of {height}x{width}')
    if site.kind != 'windows' and window > min(height, width):
        raise OptionError(
            f'window_size {window} is larger than the map there, {height}x{width} for images of nominal_size; '
            'give a smaller window_size, or the nominal_size of your images'
        )


def _infer_sizes(module: nn.Module, site: Site, dim: int, position: int, window: Any = None) -> dict[str, Any]:
    """Sizes for a block in the place of a module, by their names in `block_registry.SIZES`.

    Heads (of what lies in it, too), window, shift, ratio of the hidden channels and bias are the module's own where it
    has them. Otherwise there is a head for each 32 channels, the window is 8, every second block shifts by half of it,
    and the rest is left out.
    """
    own_heads = _heads_of(module)
    heads = own_heads or next(filter(None, map(_heads_of, module.modules())), 0)
    heads = heads or next(number for number in range(max(1, dim // HEAD_DIM), 0, -1) if dim % number == 0)
    own = site.nominal[0] if site.kind == 'windows' else window_of(module)
    window = window if type(window) is int else own or WINDOW_SIZE
    shift = window // 2 if position % 2 else 0
    if site.kind == 'windows':
        shift = 0
    elif window == own:
        shift = square_side(getattr(module, 'shift_size', shift))
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
