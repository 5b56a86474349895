"""Validation of an option file: keys and types, then registered names and their arguments."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import math
import textwrap
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from ast_plugin.errors import OptionError, PluginError, did_you_mean
from ast_plugin.faults import Fault, Where, faults_of, shown, unknown_key
from ast_plugin.options.reading import EXCLUSIVE_KEYS, NETWORKS_KEY, STAGES_KEY, find_alternative, find_at
from ast_plugin.options.runs import expand_network, is_trained, phase_of, stage_name, staged
from ast_plugin.options.sections import ComparedFile, Registered, StagedFile, Typed, dataset_model, file_model

_OPEN_SECTIONS = ((), ('train',), ('val',), ('logger',), ('path',))  # third-party models may read additional keys here
_NEEDED_FOR_TRAINING = [
    ('datasets', 'train', 'batch_size_per_gpu'),
    ('datasets', 'train', 'num_worker_per_gpu'),
    ('datasets', 'train'),
    ('train', 'total_iter'),
    ('train',),
    ('logger', 'save_checkpoint_freq'),
    ('logger',),
]
_MISSING = 'required, but missing'
_UNKNOWN = inspect.Parameter.empty
_POSITIONAL_OR_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def check(
    opt: Mapping[str, Any],
    source: str,
    registered: Registered | None = None,
    *,
    is_train: bool = True,
    explain: Callable[[Fault], Fault] | None = None,
) -> None:
    """Check the options of a file before `ast_plugin.options.prepare` completes them.

    Args:
        opt: options returned by `ast_plugin.options.load`.
        source: name of the file in messages.
        registered: available names; if None, only keys and types are checked.
        is_train: also require the keys needed for training.
        explain: adds details to a fault, see `reading.Sources`.
    Raises:
        OptionError: with all faults, one line each: `FILE: datasets.train.gt_sise: unknown key, did you mean …?`
    """
    raise_faults(find_faults(opt, registered, is_train=is_train), source, explain)


def raise_faults(faults: list[Fault], source: str, explain: Callable[[Fault], Fault] | None = None) -> None:
    """Raise OptionError with one line per fault, if there are any."""
    if faults:
        raise OptionError('\n'.join(f'{source}: {explain(fault) if explain else fault}' for fault in faults))


def find_faults(opt: Mapping[str, Any], registered: Registered | None = None, *, is_train: bool = True) -> list[Fault]:
    """Return all faults of the options, including those in stages or compared networks, in the order of the file."""
    if NETWORKS_KEY in opt:
        faults = _comparison_faults(opt, registered)
    elif STAGES_KEY in opt:
        faults = _staged_faults(opt, registered, is_train)
    else:
        faults = _RunCheck(opt, registered, is_train).faults()
    # Keep one fault per key: if several checks report a key, the first is closest to the cause.
    first = {fault.where: fault for fault in reversed(faults)}
    return sorted(first.values(), key=lambda fault: _position(opt, fault.where))


def _position(opt: Any, where: Where) -> list[int]:
    """Return a sort key for the position of a key in the file; missing keys are sorted after existing ones."""
    position = []
    for step in where:
        keys = list(opt) if isinstance(opt, dict) else list(range(len(opt))) if isinstance(opt, list) else []
        position.append(keys.index(step) if step in keys else len(keys))
        opt = opt[step] if step in keys else None
    return position


class _RunCheck:
    """Validation of the options of a single run, without stages."""

    def __init__(self, opt: Mapping[str, Any], registered: Registered | None, is_train: bool) -> None:
        self.opt, self.registered, self.is_train = opt, registered, is_train
        self.found: list[Fault] = []
        model = registered.get('model', str(opt.get('model_type'))) if registered is not None else None
        package = getattr(model, '__module__', '').split('.')[0]
        self.is_ours = package == 'ast_plugin'
        self.is_third_party = package not in ('', 'basicsr', 'ast_plugin')

    def faults(self) -> list[Fault]:
        """Return all faults."""
        self._check_keys()
        self._check_presence()
        if self.registered is not None:
            self._check_names()
        if self.is_train:
            self._check_best_metric()
        self._check_exclusive_keys()
        self._check_duplicate_names()
        return self.found

    def _report(self, where: Where, message: str) -> None:
        self.found.append(Fault(where, message))

    def _at(self, *where: str | int) -> Any:
        return find_at(self.opt, where)

    def _section(self, *where: str) -> dict[str, Any]:
        value = self._at(*where)
        return value if isinstance(value, dict) else {}

    def _check_keys(self) -> None:
        """Check keys and types against the models of the sections."""
        model = file_model(tuple(key.removeprefix('network_') for key in self.opt if key.startswith('network_')))
        faults = model_faults(model, dict(self.opt))
        self.found += [fault for fault in faults if not (fault.unknown_key and self._is_open(fault.where))]

    def _is_open(self, where: Where) -> bool:
        """Return whether an unknown key may be read by the model."""
        if self.is_third_party:
            return where[:-1] in _OPEN_SECTIONS
        return self.is_ours and where[:-1] == ('train',) and str(where[-1]).endswith('_opt')

    def _check_presence(self) -> None:
        datasets = self._section('datasets')
        for key in datasets:
            if not phase_of(key) or (phase_of(key) == 'train' and key != 'train'):
                self._report(('datasets', key), 'expected train, val or test, optionally with a number: val_2')
        needed: list[tuple[str, ...]] = [] if self.is_third_party else [('network_g',)]
        if self.is_train:
            needed += _NEEDED_FOR_TRAINING
            needed += [] if self.is_third_party else [('train', 'optim_g'), ('train', 'scheduler')]
            needed += [('val', 'val_freq')] if isinstance(self.opt.get('val'), dict) else []
            measured = [key for key in datasets if phase_of(key) == 'val']
            if measured and self.opt.get('val') is None:
                self._report(('val',), f'required to measure datasets.{measured[0]}; set val.val_freq')
            elif self.opt.get('val') and datasets and not measured:
                self._report(('datasets', 'val'), 'required by the section val, but missing; add it, or remove val')
        elif datasets and not any(phase_of(key) in ('val', 'test') for key in datasets):
            self._report(('datasets', 'val'), 'required for testing (or datasets.test), but missing')
        for *section, key in needed:
            other = find_alternative(section, key)
            # Do not report missing keys of a section that is itself missing or invalid.
            is_there = not section or isinstance(self._at(*section), dict)
            if is_there and self._at(*section, key) is None and (not other or self._at(*section, other) is None):
                self._report((*section, key), _MISSING + (f' (or {other})' if other else ''))

    def _check_exclusive_keys(self) -> None:
        """Report pairs of keys that set the same quantity in different units."""
        for where, *pair in EXCLUSIVE_KEYS:
            given = [key for key, value in self._section(*where).items() if key in pair and value is not None]
            if len(given) > 1:
                self._report((*where, given[1]), f'conflicts with {given[0]}, remove one of them')

    def _check_duplicate_names(self) -> None:
        """Report validation and test sets with the same name, whose result files would collide."""
        measured = [key for key in self._section('datasets') if key.startswith(('val', 'test'))]
        self.found += _name_faults('datasets', {key: self._at('datasets', key, 'name') for key in measured})

    def _check_best_metric(self) -> None:
        val, during = self._section('val'), self._section('val', 'during_training')
        best = val.get('best_metric')
        if not isinstance(best, str):
            return
        # The best weights are selected during training; a protocol given there replaces the metrics.
        deciding = during if during.get('metrics') or during.get('protocol') else val
        metrics = deciding.get('metrics')
        if metrics is None:
            protocol = deciding.get('protocol') or 'basicsr'
            name = protocol.get('type') if isinstance(protocol, dict) else protocol
            metrics = self.registered.protocols.get(str(name)) if self.registered is not None else None
        if isinstance(metrics, (dict, tuple)) and best not in metrics:
            place = 'val.during_training.metrics' if deciding is during else 'val.metrics'
            self._report(('val', 'best_metric'), f'{best} is not in {place}: {", ".join(metrics) or "empty"}')

    def _check_names(self) -> None:
        """Check registered names and their arguments."""
        model_type = self.opt.get('model_type')
        if isinstance(model_type, str) and self.registered.get('model', model_type) is None:
            self._report(('model_type',), self.registered.missing('model', model_type))
        for key in self.opt:
            if key.startswith('network_'):
                self._check_call('arch', (key,))
        for key in self._section('datasets'):
            self._check_dataset(key)
        for key, value in self._section('train').items():
            if key.endswith('_opt') and value is not None:
                self._check_call('loss', ('train', key))
            elif key.startswith('optim_') and _is_typed(value):
                self._check_optimizer(('train', key), value)
        self._check_scheduler()
        for where in (('val',), ('val', 'during_training')):
            for key in self._section(*where, 'metrics'):
                # `better` is read by the model and is not an argument of the function.
                given, ignored = ('img', 'img2'), ('type', 'better')
                self._check_call('metric', (*where, 'metrics', key), given=given, ignored=ignored)
            if not self.is_ours and not self.is_third_party and self._at(*where, 'protocol') is not None:
                self._report((*where, 'protocol'), 'only supported by model_type RestorationModel')

    def _check_call(self, kind: str, where: tuple[str, ...], **names: tuple[str, ...]) -> None:
        """Check `{type: NAME, argument: value, …}`."""
        options = self._at(*where)
        faults = model_faults(Typed, options, where)
        if faults:
            self.found += faults
            return
        target = self.registered.get(kind, options['type'])
        if target is None:
            self._report((*where, 'type'), self.registered.missing(kind, options['type']))
            return
        if hasattr(target, 'class_for'):
            # A family of networks, selected by the option `name`.
            try:
                target = target.class_for(options)
            except PluginError as error:
                self._report((*where, 'name'), str(error))
                return
            names = {**names, 'ignored': ('type', 'name')}
        self.found += argument_faults(target, options, where, **names)
        if hasattr(target, 'find_faults'):
            self.found += target.find_faults(options, where)
        # Options of networks that this network is built from.
        for key in getattr(target, 'network_options', ()):
            if isinstance(options.get(key), dict):
                self._check_call('arch', (*where, key))

    def _check_dataset(self, key: str) -> None:
        where, options = ('datasets', key), self._at('datasets', key)
        if not _is_typed(options):
            return
        target = self.registered.get('dataset', options['type'])
        model = dataset_model(options['type'], target)
        if target is None:
            self._report((*where, 'type'), self.registered.missing('dataset', options['type']))
        elif model is not None:
            scale = self.opt.get('scale')
            is_right = isinstance(scale, (int, float)) and 0 < scale < math.inf
            given = {'phase': phase_of(key), 'scale': scale if is_right else 1}
            self.found += model_faults(model, {**options, **given}, where)

    def _check_optimizer(self, where: Where, options: dict[str, Any]) -> None:
        try:
            target = self.registered.find_optimizer(options['type'])
        except OptionError as error:
            self._report((*where, 'type'), str(error))
        else:
            self.found += argument_faults(target, options, where, given=('params', 'defaults'))

    def _check_scheduler(self) -> None:
        where, options = ('train', 'scheduler'), self._at('train', 'scheduler')
        if not _is_typed(options):
            return
        schedulers = {**self.registered.schedulers, **(self.registered.own_schedulers if self.is_ours else {})}
        name, target = options['type'], schedulers.get(options['type'])
        if target is not None:
            # total_iter defaults to that of the run.
            optional = ('total_iter',)
            self.found += argument_faults(target, options, where, given=('optimizer', 'last_epoch'), optional=optional)
        elif not self.is_third_party:
            known = did_you_mean(name, schedulers) or f' (available: {", ".join(schedulers)})'
            self._report((*where, 'type'), f'unknown scheduler {name}{known}')


def _is_typed(options: Any) -> bool:
    return isinstance(options, dict) and isinstance(options.get('type'), str)


def model_faults(model: type[BaseModel], value: Any, where: Where = ()) -> list[Fault]:
    """Validate `value` at `where` with `model` and return the faults; see `ast_plugin.faults.faults_of`."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        return faults_of(error, model, value, where)
    return []


def _staged_faults(opt: Mapping[str, Any], registered: Registered | None, is_train: bool) -> list[Fault]:
    """Return the faults of all stages, each with the options it inherits, located where they were written."""
    base = {key: value for key, value in opt.items() if key != STAGES_KEY}
    faults = model_faults(StagedFile, {STAGES_KEY: opt[STAGES_KEY]})
    if find_at(base, ('path', 'resume_state')) is not None:
        message = f'a training state belongs to one stage: set it in {STAGES_KEY}.N.path, or use --auto_resume'
        faults.append(Fault(('path', 'resume_state'), message))
    stages = {}
    for number, entry in _mappings(opt[STAGES_KEY]).items():
        stages[number] = {key: value for key, value in entry.items() if key != STAGES_KEY}
        if STAGES_KEY in entry:
            faults.append(Fault((STAGES_KEY, number, STAGES_KEY), 'stages cannot be nested'))
    faults += _name_faults(STAGES_KEY, {number: stage_name(number + 1, entry) for number, entry in stages.items()})
    return faults + _faults_of_entries(
        STAGES_KEY, base, stages, lambda entry: _RunCheck(staged(base, entry), registered, is_train).faults()
    )


def _comparison_faults(opt: Mapping[str, Any], registered: Registered | None) -> list[Fault]:
    """Return all faults of a compare file: of its own keys, then of the resolved options of each network."""
    faults = model_faults(ComparedFile, {key: opt[key] for key in ComparedFile.model_fields if key in opt})
    faults += [
        Fault((key,), reason)
        for key, reason in (
            ('network_g', f'not supported here; each network is an entry of {NETWORKS_KEY}'),
            (STAGES_KEY, 'not supported here; to compare staged runs, set `weights` of a network'),
            ('path', 'not supported here; set `weights` of a network. Runs are resumed automatically'),
        )
        if key in opt
    ]
    entries = _mappings(opt[NETWORKS_KEY])
    names = {number: entry['name'] for number, entry in entries.items() if isinstance(entry.get('name'), str)}
    # Names are folder names, and some file systems are case-insensitive.
    faults += _name_faults(NETWORKS_KEY, names, str.casefold)
    faults += _shared_faults(opt, list(names.values()))

    def find(is_train: bool, entry: Mapping[str, Any]) -> list[Fault]:
        found = find_faults(expand_network(opt, entry), registered, is_train=is_train)
        made_here = {'name', 'path', *(() if entry.get('network_g') is not None else ('network_g',))}
        return [fault for fault in found if fault.where[0] not in made_here]

    alike: dict[bool, dict[int, Mapping[str, Any]]] = {True: {}, False: {}}
    for number, entry in entries.items():
        if entry.get('network_g') is None and entry.get('weights') is None:
            missing = 'required, but missing (or weights that contain the network options)'
            faults.append(Fault((NETWORKS_KEY, number, 'network_g'), missing))
        else:
            alike[is_trained(entry)][number] = entry
    for is_train, some in alike.items():
        if some:
            faults += _faults_of_entries(NETWORKS_KEY, opt, some, functools.partial(find, is_train))
    return faults


def _mappings(entries: Any) -> dict[int, dict[str, Any]]:
    """Return the items of a list that are mappings, by index; empty if `entries` is not a list."""
    numbered = enumerate(entries if isinstance(entries, list) else ())
    return {number: entry for number, entry in numbered if isinstance(entry, dict)}


def _name_faults(key: str, names: Mapping[Any, Any], folded: Callable[[str], str] = str) -> list[Fault]:
    """Report entries with the same name after applying `folded`."""
    first: dict[str, Any] = {}
    return [
        Fault((key, number, 'name'), f'{name} is already the name of {key}.{first[folded(name)]}')
        for number, name in names.items()
        if isinstance(name, str) and first.setdefault(folded(name), number) != number
    ]


def _faults_of_entries(
    key: str,
    base: Mapping[str, Any],
    entries: Mapping[int, Mapping[str, Any]],
    find: Callable[[Mapping[str, Any]], list[Fault]],
) -> list[Fault]:
    """Return the faults of all runs of a file, located in the entry of `key` or in the shared options."""
    faults: list[Fault] = []
    inherited: dict[Fault, list[int]] = {}
    num_checked = 0
    for number, entry in entries.items():
        place = (key, number)
        try:
            found = find(entry)
        except OptionError as error:
            where, _, message = str(error).partition(': ')
            faults.append(Fault((*place, *where.split('.')), message))
            continue
        num_checked += 1
        for fault in found:
            if _contains(entry, fault.where) or (fault.where[0] in entry and fault.where[0] not in base):
                faults.append(replace(fault, where=(*place, *fault.where)))
            else:
                inherited.setdefault(fault, []).append(number)
    # Stages may complete the shared options; for compared networks, the shared options must be valid without entries.
    shared = find({}) if key == NETWORKS_KEY or not num_checked else []
    places = {fault.where for fault in shared}
    for fault, numbers in inherited.items():
        # A fault of all entries is a fault of the shared options; otherwise it belongs to the entry.
        if len(numbers) == num_checked or fault.where in places:
            faults.append(fault)
        else:
            faults += [replace(fault, where=(key, number, *fault.where)) for number in numbers]
    if not num_checked:
        faults += [fault for fault in shared if not any(_contains(entry, fault.where) for entry in entries.values())]
    return faults


def _contains(entry: Mapping[str, Any], where: Where) -> bool:
    return find_at(entry, where, _UNKNOWN) is not _UNKNOWN


def _shared_faults(opt: Mapping[str, Any], names: Sequence[str]) -> list[Fault]:
    """Return the faults of the shared sections of a compare file with networks of these names."""
    faults = []
    baseline = find_at(opt, ('compare', 'baseline'))
    if isinstance(baseline, str) and baseline not in names:
        expected = f'expected one of {", ".join(names)}, got {shown(baseline)}'
        faults.append(Fault(('compare', 'baseline'), expected))
    for key in ('total_iter', 'total_epochs'):
        if find_at(opt, ('compare', 'minutes')) is not None and find_at(opt, ('train', key)) is not None:
            faults.append(Fault(('train', key), 'conflicts with compare.minutes, remove one of them'))
    phases = {key: phase_of(key) for key in opt['datasets']} if isinstance(opt.get('datasets'), dict) else {}
    tests = [key for key, phase in phases.items() if phase == 'test']
    measured = tests or [key for key, phase in phases.items() if phase == 'val']
    if not measured:
        missing = 'required, but missing (or datasets.test): the dataset on which networks are compared'
        faults.append(Fault(('datasets', 'val'), missing))
    if len(measured) > 1:
        message = f'networks are compared on one dataset, which is already {measured[0]}'
        faults.append(Fault(('datasets', measured[1]), message))
    return faults


def argument_faults(
    target: Callable,
    arguments: Mapping[str, Any],
    where: Where,
    given: Collection[str] = (),
    ignored: Collection[str] = ('type',),
    optional: Collection[str] = (),
) -> list[Fault]:
    """Check options against the signature of the callable that receives them as keyword arguments.

    Args:
        target: class or function.
        arguments: the options at `where`.
        given: arguments that the caller passes, which an option file must not contain.
        ignored: options that are removed before the call.
        optional: arguments that the caller passes if the options do not contain them.
    """
    parameters, is_open = parameters_of(target)
    known = {name: parameter for name, parameter in parameters.items() if name not in given}
    faults = []
    for name, value in arguments.items():
        if name in known:
            faults += _value_faults(known[name], value, (*where, name))
        elif name not in ignored and not is_open:
            faults.append(unknown_key((*where, name), [*known, *ignored]))
    for name, parameter in known.items():
        if parameter.default is _UNKNOWN and name not in arguments and name not in optional and not is_open:
            faults.append(Fault((*where, name), f'required by {getattr(target, "__name__", target)}, but missing'))
    return faults


def _value_faults(parameter: inspect.Parameter, value: Any, where: Where) -> list[Fault]:
    annotation, default = parameter.annotation, parameter.default
    if annotation is _UNKNOWN or isinstance(annotation, str):
        # Only check text, numbers and booleans: a parameter with the default 8 may also accept [8, 8].
        if not isinstance(value, (str, bool, int, float)):
            return []
        annotation = next((kind for kind in (bool, str, int, float) if isinstance(default, kind)), Any)
        annotation = float if annotation is int else annotation
    has_config = hasattr(annotation, 'model_config')
    try:
        adapter = TypeAdapter(annotation, config=None if has_config else ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, TypeError, NameError):
        return []
    try:
        # YAML has no tuples; when validating JSON, pydantic accepts lists as tuples even in strict mode.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return faults_of(error, annotation, value, where)
    return []


@functools.cache
def parameters_of(target: Callable) -> tuple[Mapping[str, inspect.Parameter], bool]:
    """Return the parameters by name, including those reached through `**kwargs`, and whether others are accepted."""
    cls, layers = target, []
    if not inspect.isclass(target):
        # A factory `def AST_T(**options) -> AST` accepts the parameters of AST.
        cls, layers = _returned_class(target), [(target, 0)]
    for base in cls.__mro__ if cls else ():
        # nn.Module accepts **kwargs but rejects any content.
        if '__init__' in vars(base) and base is not object and base.__module__ != 'torch.nn.modules.module':
            layers.append((vars(base)['__init__'], 1))  # without self
    found: dict[str, inspect.Parameter] = {}
    for function, num_given in layers:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return found, True
        with suppress(NameError, AttributeError, SyntaxError, TypeError):  # names imported under TYPE_CHECKING
            signature = inspect.signature(function, eval_str=True)
        parameters = list(signature.parameters.values())[num_given:]
        for parameter in parameters:
            if parameter.kind in _POSITIONAL_OR_KEYWORD:
                found.setdefault(parameter.name, parameter)
        open_names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        if not open_names or not _reads(function, open_names[0]):
            return found, False
    return found, cls is None


def _returned_class(function: Callable) -> type | None:
    with suppress(NameError, TypeError, AttributeError):
        returned = typing.get_type_hints(function).get('return')
        return returned if inspect.isclass(returned) else None
    return None


def _reads(function: Callable, name: str) -> bool:
    """Return whether `**name` is used: BasicSR's metrics and SwinIR accept `**kwargs` and ignore it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return True
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(tree))
