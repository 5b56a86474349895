"""Rules of `Mixed`: their schema, the modules that they match, and the blocks that they insert."""

import difflib
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
HEAD_DIM = 32  # channels per head if the number of heads is unknown, as in AST's first level
_CLASS = 'class:'
_MAX_NAMES = 4  # number of names listed in a message
# Blocks whose linear layers are initialised as in AST; third-party blocks keep their own initialisation.
_REINITIALISED = (blocks.ASTBlock, *blocks.ATTENTIONS.values(), *blocks.FEED_FORWARDS.values())


class Block(TypedDict):
    """Value of the key `with`: type and options of a block."""

    __pydantic_config__ = ConfigDict(extra='allow')

    type: str


class Rule(BaseModel, extra='forbid', frozen=True, strict=True):
    """Rule that inserts a block at all modules that match a pattern.

    Attributes:
        match: glob over the dotted names of modules, or `class:` followed by a glob over class names. In module names,
            `*` matches one component or a part of it, and `**` matches any number of components.
        block: `with` in an option file: `type`, a name in `block_registry.BLOCKS`, and options; missing sizes are
            inferred.
        op: 'replace', 'append', 'prepend' or 'wrap', see `adapters.MixedIn`.
        keep_weights: whether to transfer the weights of the replaced module to the block.
        dense_share: initial share of softmax in ASSA's gate with `keep_weights`; None selects `DENSE_SHARE`.
        gain: initial gain of the branch, for `wrap`.
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
            raise ValueError('expected a glob over module names or class:NAME')
        return match

    @field_validator('block')
    @classmethod
    def _check_block(cls, block: Block) -> Block:
        declared = declaration(block['type'])
        known = [name for name in declared.parameters or () if name != 'layout']
        for key in block.keys() - {'type'}:
            if key == 'layout' or (declared.parameters is not None and key not in known):
                raise ValueError(f'{declared.name} has no option {key}{did_you_mean(str(key), known)}')
        return block

    @model_validator(mode='after')
    def _check_together(self) -> 'Rule':
        if self.keep_weights and self.op != 'replace':
            raise ValueError(f'keep_weights requires op: replace; {self.op} keeps the module and its weights')
        if self.dense_share is not None and not self.keep_weights:
            raise ValueError('dense_share requires keep_weights: true')
        if 'gain' in self.model_fields_set and self.op != 'wrap':
            raise ValueError(f'gain requires op: wrap, got {self.op}')
        return self

    @property
    def where(self) -> str:
        """Location of the rule for messages, `mix.N`."""
        return f'mix.{self._number}'

    @cached_property
    def declaration(self) -> Declaration:
        return declaration(self.block['type'])

    @property
    def options(self) -> dict[str, Any]:
        """Options of the block, without its type and inferred sizes."""
        return {key: value for key, value in self.block.items() if key != 'type'}


_RULES = TypeAdapter(Annotated[list[Rule], Field(min_length=1)])


def read_rules(rules: Any) -> list[Rule]:
    """Parse the rules of an option file.

    Raises:
        OptionError: lists all faults with rule and key.
    """
    if faults := rule_faults(rules, ('mix',)):
        raise OptionError('; '.join(map(str, faults)))
    read = _RULES.validate_python(rules)
    for number, rule in enumerate(read):
        rule._number = number
    return read


def rule_faults(rules: Any, where: Where) -> list[Fault]:
    """Return the faults in rules located at `where` in an option file."""
    try:
        _RULES.validate_python(rules)
        return []
    except ValidationError as error:
        return faults_of(error, Rule, rules, where)


def assign(network: nn.Module, rules: Sequence[Rule]) -> dict[str, Rule]:
    """Return the matching rules by module name.

    Raises:
        OptionError: if a rule matches no module, with similar names, or a module matches two rules or is inside a
            replaced one.
    """
    assigned: dict[str, Rule] = {}
    modules = {name: module for name, module in network.named_modules(remove_duplicate=False) if name}
    first = {module: name for name, module in reversed(modules.items())}  # a shared module has several names
    for rule in rules:
        matched = [module for name, module in modules.items() if _matches(rule.match, name, module)]
        names = list(dict.fromkeys(first[module] for module in matched))
        if not names:
            raise OptionError(f'{rule.where}.match: no module matches {rule.match}; {_suggest(rule.match, modules)}')
        for name in names:
            if name in assigned:
                raise OptionError(f'{rule.where}.match: {name} also matches {assigned[name].where}')
            assigned[name] = rule
    for name, rule in assigned.items():
        steps = name.split('.')
        for outer in ('.'.join(steps[:depth]) for depth in range(1, len(steps))):
            if outer in assigned and assigned[outer].op == 'replace':
                raise OptionError(
                    f'{rule.where}.match: {name} is inside {outer}, which {assigned[outer].where} replaces'
                )
    return assigned


def _matches(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith(_CLASS):
        return fnmatchcase(type(module).__name__, pattern.removeprefix(_CLASS))
    return _glob(pattern.split('.'), name.split('.'))


def _glob(pattern: list[str], steps: list[str]) -> bool:
    if not pattern:
        return not steps
    if pattern[0] == '**':
        return _glob(pattern[1:], steps) or (bool(steps) and _glob(pattern, steps[1:]))
    return bool(steps) and fnmatchcase(steps[0], pattern[0]) and _glob(pattern[1:], steps[1:])


def _suggest(pattern: str, modules: Mapping[str, nn.Module]) -> str:
    """Return a hint with similar class or module names; all numbers in names are equal."""
    is_class = pattern.startswith(_CLASS)
    names = sorted({type(module).__name__ for module in modules.values()}) if is_class else modules
    pattern, *known = (re.sub(r'\b\d+\b', '*', name) for name in (pattern.removeprefix(_CLASS), *names))
    known = list(dict.fromkeys(known))
    near = (
        difflib.get_close_matches(pattern, known, n=_MAX_NAMES, cutoff=0.5)
        or [name for name in known if pattern.split('.')[-1] in name.split('.')]
        or known
    )
    return f'{"existing classes" if is_class else "similar names"}: {", ".join(near[:_MAX_NAMES])}'


class Exchange(NamedTuple):
    """Record of one inserted block."""

    rule: Rule
    site: Site
    was: str  # class name of the original module
    options: Mapping[str, Any]
    parameters_before: int
    parameters_after: int


def exchange(network: nn.Module, assigned: Mapping[str, Rule], trial: Trial) -> list[Exchange]:
    """Insert a block at every module that matches a rule.

    Args:
        network: modified in place.
        assigned: rules by module name, see `assign`.
        trial: trial of the network, with the records of `record_calls`.
    Returns:
        A record for each inserted block.
    Raises:
        ShapeError: if a block does not fit its position; the message includes the shapes.
        OptionError: if a block cannot be built with the sizes of its position, or cannot keep the weights.
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
    declared, own = rule.declaration, rule.options
    window = next((own.get(key) for key, size in declared.sizes.items() if size == 'window_size'), None)
    site = find_site(name, module, trial, window, declared.works_in != 'any')
    _check_place(rule, site)
    dim = site.channels(site.shape if rule.op in ('replace', 'prepend') else site.output)
    sizes = _infer_sizes(module, site, dim, position, window)
    options = {key: sizes[size] for key, size in declared.sizes.items() if size in sizes} | own
    _check_sizes({size: options[key] for key, size in declared.sizes.items() if key in options}, site, dim)
    try:
        block = declared.build(**options)
    except PluginError:
        raise
    except Exception as error:  # third-party blocks may raise anything
        raise OptionError(f'it cannot be built with {options}: {type(error).__name__}: {one_line(error)}') from error
    if type(block) in _REINITIALISED:
        block.apply(blocks.init_weights)
    if site.kind == 'windows' and declared.works_in not in ('windows', 'any') and not hasattr(block, 'attend_windows'):
        raise OptionError(f'a block with works_in = {declared.works_in!r} needs a method attend_windows for windows')
    if rule.keep_weights:
        keep_weights(block, module, rule.dense_share or (DENSE_SHARE if isinstance(block, blocks.ASSA) else None))
    original = None if rule.op == 'replace' else module
    return MixedIn(block, declared.works_in, site, rule.op, original, rule.gain), options


def _check_place(rule: Rule, site: Site) -> None:
    """Raise ShapeError if no block of a rule fits the position."""
    declared = rule.declaration
    shapes = f'the input is {list(site.shape)} and the output {list(site.output) if site.output else "not a tensor"}'
    if site.place not in declared.replaces:
        raise ShapeError(f'{shapes} ({site.place}), but the block supports only {" and ".join(declared.replaces)}')
    if rule.op != 'prepend' and (site.output is None or len(site.output) != len(site.shape)):
        raise ShapeError(f'{shapes}, expected the same kind of tensor')
    if rule.op == 'replace' and site.output != site.shape:
        raise ShapeError(f'{shapes}, but a block preserves the shape: use append, prepend or wrap')
    if rule.op in ('append', 'wrap') and site.place != 'maps' and site.output[:2] != site.shape[:2]:
        raise ShapeError(f'{shapes}, but {rule.op} requires the same number of tokens and windows')
    if site.kind == 'tokens' and site.size is None and declared.works_in != 'any':
        raise ShapeError(f'the height and width of the tokens {list(site.shape)} are not an argument of any caller')
    if site.second and rule.op == 'replace':
        raise ShapeError(f'the module has a second input {site.second} in addition to {list(site.shape)}')


def _check_sizes(given: Mapping[str, Any], site: Site, dim: int) -> None:
    """Raise ShapeError or OptionError if sizes, by their names in `block_registry.SIZES`, do not fit the position."""
    if given.get('dim', dim) != dim:
        raise ShapeError(f'expected {dim} channels, got {given["dim"]}')
    window = given.get('window_size')
    if type(window) is not int:
        return
    height, width = site.nominal
    if site.kind == 'windows' and given.get('shift_size'):
        raise ShapeError(f'expected no shift_size, as the caller partitions the windows, got {given["shift_size"]}')
    if site.kind == 'windows' and window != height:
        raise ShapeError(f'expected window_size {height}, as the caller partitions the windows, got {window}')
    if site.kind != 'windows' and window > min(height, width):
        raise OptionError(
            f'window_size {window} is larger than the feature map, {height}x{width} for images of nominal_size; '
            'reduce window_size, or set nominal_size to the size of your images'
        )


def _infer_sizes(module: nn.Module, site: Site, dim: int, position: int, window: Any = None) -> dict[str, Any]:
    """Infer the sizes of a block from the module at its position, by their names in `block_registry.SIZES`.

    Number of heads (also of submodules), window size, shift, MLP ratio and bias are read from the module. Missing ones
    default to one head per 32 channels, window size 8 and a shift of half a window in every second block; other sizes
    are omitted.
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
        ratio = blocks.mlp_ratio_of(dim, layers[-1].in_features)
    if isinstance(ratio, (int, float)):
        sizes['mlp_ratio'] = float(ratio)
    queries = getattr(module, 'qkv', getattr(module, 'q', None))
    if isinstance(queries, nn.Linear):
        sizes['qkv_bias'] = queries.bias is not None
    return sizes


def _heads_of(module: nn.Module) -> int:
    """Return the number of heads declared by a module, or 0."""
    stated = (getattr(module, key, None) for key in ('num_heads', 'heads', 'n_heads'))
    return next((heads for heads in stated if isinstance(heads, int)), 0)
