"""The check of an option file: its keys, then what they say against what is registered. Every fault at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from ast_plugin.errors import OptionError, PluginError, did_you_mean
from ast_plugin.faults import Fault, Where, faults_of, shown, unknown_key
from ast_plugin.options.reading import RIVALS, STAGES_KEY, rivals
from ast_plugin.options.runs import phase_of, stage_name, staged
from ast_plugin.options.sections import FolderName, OptionFile, Paths, dataset_model
from ast_plugin.options.signatures import argument_faults

_FOLDER_NAME = TypeAdapter(FolderName)
_PATH_PATTERNS = {'pretrain_network_': str, 'param_key_': str, 'strict_load_': bool}
_OPEN_SECTIONS = ((), ('train',), ('val',), ('logger',), ('path',))  # where a third party's model may read its own keys
_MISSING = 'required, but not there'
# BasicSR registers some of its own under NAME_basicsr, and falls back to that when NAME is not taken.
_FALLBACK_SUFFIX = '_basicsr'


@dataclass(frozen=True)
class Registered:
    """Registered classes and functions by kind (`arch`, `dataset`, `loss`, `metric`, `model`) and name."""

    by_kind: Mapping[str, Mapping[str, object]]
    schedulers: Mapping[str, type] = field(default_factory=dict)  # what `train.scheduler.type` names with every model
    own_schedulers: Mapping[str, type] = field(default_factory=dict)  # further ones that this package's models know
    protocols: Mapping[str, Sequence[str]] = field(default_factory=dict)  # names of each protocol's own metrics
    failed_plugins: Sequence[str] = ()  # a line for each plugin that could not be loaded
    find_optimizer: Callable[[str], type] | None = None  # the class that `train.optim_g.type` names, or OptionError

    def get(self, kind: str, name: str) -> object | None:
        """What BasicSR's registry would give for `name`; None when it would raise."""
        registry = self.by_kind[kind]
        return registry.get(name, registry.get(name + _FALLBACK_SUFFIX))

    def missing(self, kind: str, name: str) -> str:
        """Why `name` cannot be had, and what to do."""
        names = [known.removesuffix(_FALLBACK_SUFFIX) for known in self.by_kind[kind]]
        suggestion = did_you_mean(name, names)
        hint = '; '.join(self.failed_plugins) or f'is its plugin installed? `basicsr list {kind}` shows what there is'
        return f'no {kind} is registered as {name}{suggestion} ({hint})'


def check(
    opt: Mapping[str, Any],
    source: str,
    registered: Registered | None = None,
    *,
    is_train: bool = True,
    explain: Callable[[Fault], Fault] | None = None,
) -> None:
    """Check the options of a file, as read, before `ast_plugin.options.prepare` completes them.

    Args:
        opt: what `ast_plugin.options.load` returned.
        source: the file's name in messages.
        registered: what names may be used; without it only keys and types are checked.
        is_train: what training needs must be there as well.
        explain: says more about a fault, see `reading.Sources`.
    Raises:
        OptionError: listing every fault, one line each: `FILE: datasets.train.gt_sise: unknown key, did you mean …?`
    """
    raise_faults(find_faults(opt, registered, is_train=is_train), source, explain)


def raise_faults(faults: list[Fault], source: str, explain: Callable[[Fault], Fault] | None = None) -> None:
    """Raise OptionError with a line for each fault, if there are any."""
    if faults:
        raise OptionError('\n'.join(f'{source}: {explain(fault) if explain else fault}' for fault in faults))


def find_faults(opt: Mapping[str, Any], registered: Registered | None = None, *, is_train: bool = True) -> list[Fault]:
    """Every fault of the options, those inside of its stages too, in the order of the file."""
    if STAGES_KEY in opt:
        faults = _staged_faults(opt, registered, is_train)
    else:
        faults = _RunCheck(opt, registered, is_train).faults()
    return sorted(unique(faults), key=lambda fault: _position(opt, fault.where))


def unique(faults: list[Fault]) -> list[Fault]:
    """One fault for each key: two checks may see it, and what the first one says is nearer to the cause."""
    return list({fault.where: fault for fault in reversed(faults)}.values())[::-1]


def _position(opt: Any, where: Where) -> list[int]:
    """The place of a key in the file, section by section; what is not there comes behind what is."""
    position = []
    for step in where:
        keys = list(opt) if isinstance(opt, dict) else list(range(len(opt))) if isinstance(opt, list) else []
        position.append(keys.index(step) if step in keys else len(keys))
        opt = opt[step] if step in keys else None
    return position


class _RunCheck:
    """The check of options without stages."""

    def __init__(self, opt: Mapping[str, Any], registered: Registered | None, is_train: bool) -> None:
        self.opt, self.registered, self.is_train = opt, registered, is_train
        self.found: list[Fault] = []
        model = registered.get('model', str(opt.get('model_type'))) if registered is not None else None
        package = getattr(model, '__module__', '').split('.')[0]
        self.is_ours = package == 'ast_plugin'
        self.is_third_party = package not in ('', 'basicsr', 'ast_plugin')

    def faults(self) -> list[Fault]:
        """All that is wrong, one fault for each key."""
        self._check_keys()
        self._check_presence()
        if self.registered is not None:
            self._check_names(self.registered)
        if self.is_train:
            self._check_best_metric()
        self._check_rivals()
        self._check_namesakes()
        return unique(self.found)

    def _report(self, where: Where, message: str) -> None:
        self.found.append(Fault(where, message))

    def _report_type(self, where: Where) -> None:
        options = self._at(*where)
        if isinstance(options, dict) and 'type' in options:
            self._report((*where, 'type'), f'expected text, got {shown(options["type"])}')
        else:
            self._report(where, 'expected a mapping with a type')

    def _at(self, *where: str | int) -> Any:
        value: Any = self.opt
        for key in where:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def _section(self, *where: str) -> dict[str, Any]:
        value = self._at(*where)
        return value if isinstance(value, dict) else {}

    def _check_keys(self) -> None:
        """Hold keys and types against the sections; keys that name networks go by their pattern."""
        networks = [key for key in self.opt if key.startswith('network_')]
        letters = [key.removeprefix('network_') for key in networks or ['network_g']]
        kinds = {f'{pattern}{letter}': kind for pattern, kind in _PATH_PATTERNS.items() for letter in letters}
        for key in networks:
            if not _is_typed(self.opt[key]):
                self._report_type((key,))
        for key, value in self._section('path').items():
            if value == 'None' and kinds.get(key, str) is str:
                self._report(('path', key), "expected text or nothing, got the text 'None'")
            elif value is not None and not isinstance(value, kinds.get(key, object)):
                self._report(
                    ('path', key), f'expected {"text" if kinds[key] is str else "true or false"}, got {shown(value)}'
                )
        for fault in model_faults(OptionFile, dict(self.opt), also_known=('network_g', 'network_d')):
            if not fault.unknown_key or not self._is_open(fault.where, networks, kinds):
                known = [*kinds, *Paths.model_fields]
                self.found.append(
                    unknown_key(fault.where, known) if fault.where[:-1] == ('path',) and fault.unknown_key else fault
                )

    def _is_open(self, where: Where, networks: list[str], kinds: Mapping[str, type]) -> bool:
        """Whether a key that no section has is known all the same, or may be read by a third party's model."""
        section, key = where[:-1], str(where[-1])
        if (section == () and key in networks) or (section == ('path',) and key in kinds):
            return True
        if self.is_third_party:
            return section in _OPEN_SECTIONS
        return self.is_ours and section == ('train',) and key.endswith('_opt')

    def _check_presence(self) -> None:
        datasets = self._section('datasets')
        for key in datasets:
            if not phase_of(key) or (phase_of(key) == 'train' and key != 'train'):
                self._report(
                    ('datasets', key), 'expected train, val or test, with or without a number behind _ (val_2)'
                )
        needed: list[tuple[str, ...]] = [] if self.is_third_party else [('network_g',)]
        if self.is_train:
            needed += [('datasets', 'train', key) for key in ('batch_size_per_gpu', 'num_worker_per_gpu')]
            needed += [('datasets', 'train'), ('train',), ('logger',)]
            needed += [] if self.is_third_party else [('train', 'optim_g'), ('train', 'scheduler')]
            needed += [('train', 'total_iter'), ('logger', 'save_checkpoint_freq')]
            measured = [key for key in datasets if phase_of(key) == 'val']
            if isinstance(self.opt.get('val'), dict):
                needed.append(('val', 'val_freq'))
            if measured and self.opt.get('val') is None:
                self._report(('val',), f'datasets.{measured[0]} is never measured without; give val.val_freq')
            elif self.opt.get('val') and datasets and not measured:
                self._report(('datasets', 'val'), 'nothing to measure by val; add it, or leave val out')
        elif datasets and not any(phase_of(key) in ('val', 'test') for key in datasets):
            self._report(('datasets', 'val'), 'required for testing (or datasets.test), but not there')
        for *section, key in needed:
            others = rivals(tuple(section), key)
            # Where a whole section is missing or wrong, what it lacks is not worth a line.
            is_there = not section or isinstance(self._at(*section), dict)
            if is_there and all(self._at(*section, name) is None for name in (key, *others)):
                self._report((*section, key), _MISSING + ''.join(f' (or {other})' for other in others))

    def _check_rivals(self) -> None:
        """Report two keys that say one thing in different units."""
        for where, pairs in RIVALS.items():
            section = self._section(*where)
            for pair in pairs:
                given = [key for key in section if key in pair and section[key] is not None]
                if len(given) > 1:
                    self._report((*where, given[1]), f'{given[0]} says that already, leave one of them out')

    def _check_namesakes(self) -> None:
        """Report sets to measure that share a name, and so the files of their results."""
        first: dict[str, str] = {}
        for key, dataset in self._section('datasets').items():
            name = dataset.get('name') if isinstance(dataset, dict) and key.startswith(('val', 'test')) else None
            if isinstance(name, str) and first.setdefault(name, key) != key:
                self._report(('datasets', key, 'name'), f'datasets.{first[name]} is called {name}, too')

    def _check_best_metric(self) -> None:
        val, during = self._section('val'), self._section('val', 'during_training')
        best = val.get('best_metric')
        if not isinstance(best, str):
            return
        # The best weights are picked during training; a protocol that is named there brings its own metrics.
        deciding = during if during.get('metrics') or during.get('protocol') else val
        metrics = deciding.get('metrics')
        if metrics is None:
            protocol = deciding.get('protocol') or 'basicsr'
            name = protocol.get('type') if isinstance(protocol, dict) else protocol
            metrics = self.registered.protocols.get(str(name)) if self.registered is not None else None
        if isinstance(metrics, (dict, tuple)) and best not in metrics:
            place = 'val.during_training.metrics' if deciding is during else 'val.metrics'
            self._report(('val', 'best_metric'), f'{best} is not among {place}: {", ".join(metrics) or "none there"}')

    def _check_names(self, registered: Registered) -> None:
        """Hold the names in the options, and the arguments beside them, against what is registered."""
        model_type = self.opt.get('model_type')
        if isinstance(model_type, str) and registered.get('model', model_type) is None:
            self._report(('model_type',), registered.missing('model', model_type))
        for key in self.opt:
            if key.startswith('network_'):
                self._check_call(registered, 'arch', (key,))
        for key in self._section('datasets'):
            self._check_dataset(registered, key)
        for key, value in self._section('train').items():
            if key.endswith('_opt') and value is not None:
                self._check_call(registered, 'loss', ('train', key))
            elif key.startswith('optim_') and _is_typed(value) and registered.find_optimizer is not None:
                self._check_optimizer(registered, ('train', key), value)
        self._check_scheduler(registered)
        for where in (('val',), ('val', 'during_training')):
            for key in self._section(*where, 'metrics'):
                # `better` is for the model, and no argument of the function.
                given, ignored = ('img', 'img2'), ('type', 'better')
                self._check_call(registered, 'metric', (*where, 'metrics', key), given=given, ignored=ignored)
            if not self.is_ours and not self.is_third_party and self._at(*where, 'protocol') is not None:
                self._report((*where, 'protocol'), 'read by model_type RestorationModel alone')

    def _check_call(self, registered: Registered, kind: str, where: tuple[str, ...], **names: tuple[str, ...]) -> None:
        """Check `{type: NAME, argument: value, …}`."""
        options = self._at(*where)
        if not _is_typed(options):
            self._report_type(where)
            return
        target = registered.get(kind, options['type'])
        if target is None:
            self._report((*where, 'type'), registered.missing(kind, options['type']))
            return
        if hasattr(target, 'class_for'):
            # A family of networks: which of them is meant is the option `name`.
            try:
                target = target.class_for(options)
            except PluginError as error:
                self._report((*where, 'name'), str(error))
                return
            names = {**names, 'ignored': ('type', 'name')}
        self.found += argument_faults(target, options, where, **names)
        if hasattr(target, 'find_faults'):
            self.found += target.find_faults(options, where)
        # Of a network that is made of another one.
        for key in getattr(target, 'network_options', ()):
            if isinstance(options.get(key), dict):
                self._check_call(registered, 'arch', (*where, key))

    def _check_dataset(self, registered: Registered, key: str) -> None:
        where, options = ('datasets', key), self._at('datasets', key)
        if not _is_typed(options):
            return
        target = registered.get('dataset', options['type'])
        model = dataset_model(options['type'], target)
        if target is None:
            self._report((*where, 'type'), registered.missing('dataset', options['type']))
        elif model is not None:
            scale = self.opt.get('scale')
            is_right = isinstance(scale, (int, float)) and 0 < scale < math.inf
            given = {'phase': phase_of(key), 'scale': scale if is_right else 1}
            self.found += model_faults(model, {**options, **given}, where)

    def _check_optimizer(self, registered: Registered, where: Where, options: dict[str, Any]) -> None:
        try:
            target = registered.find_optimizer(options['type'])
        except OptionError as error:
            self._report((*where, 'type'), str(error))
        else:
            self.found += argument_faults(target, options, where, given=('params', 'defaults'))

    def _check_scheduler(self, registered: Registered) -> None:
        where, options = ('train', 'scheduler'), self._at('train', 'scheduler')
        if not _is_typed(options):
            return
        schedulers = {**registered.schedulers, **(registered.own_schedulers if self.is_ours else {})}
        name, target = options['type'], schedulers.get(options['type'])
        if target is not None:
            # The model's own total_iter stands in for one that is not given.
            optional = ('total_iter',)
            self.found += argument_faults(target, options, where, given=('optimizer', 'last_epoch'), optional=optional)
        elif not self.is_third_party:
            known = did_you_mean(name, schedulers) or f', there are {", ".join(schedulers)}'
            self._report((*where, 'type'), f'no scheduler is named {name}{known}')


def _is_typed(options: Any) -> bool:
    return isinstance(options, dict) and isinstance(options.get('type'), str)


def model_faults(
    model: type[BaseModel], value: Any, where: Where = (), also_known: tuple[str, ...] = ()
) -> list[Fault]:
    """What `model` finds wrong in `value`, which lies at `where`; see `ast_plugin.faults.faults_of`."""
    try:
        model.model_validate(value)
    except ValidationError as error:
        return faults_of(error, model, value, where, also_known)
    return []


def _staged_faults(opt: Mapping[str, Any], registered: Registered | None, is_train: bool) -> list[Fault]:
    """The faults of each stage with all that it takes from the file, named where they were written."""
    entries = opt[STAGES_KEY]
    base = {key: value for key, value in opt.items() if key != STAGES_KEY}
    if not isinstance(entries, list) or not entries:
        message = f'expected a list of mappings, each of what differs in a stage, got {shown(entries)}'
        return [*_RunCheck(base, registered, is_train).faults(), Fault((STAGES_KEY,), message)]
    faults = _stage_name_faults(entries)
    if isinstance(base.get('path'), dict) and base['path'].get('resume_state') is not None:
        message = f'a state is of one stage: put it into {STAGES_KEY}.0.path or another, or use --auto_resume'
        faults.append(Fault(('path', 'resume_state'), message))
    inherited: dict[Fault, list[int]] = {}
    num_checked = 0
    for number, entry in enumerate(entries):
        place = (STAGES_KEY, number)
        if not isinstance(entry, dict):
            faults.append(Fault(place, f'expected a mapping of what differs in this stage, got {shown(entry)}'))
            continue
        if STAGES_KEY in entry:
            faults.append(Fault((*place, STAGES_KEY), 'stages have no stages of their own'))
        try:
            run = staged(base, {key: value for key, value in entry.items() if key != STAGES_KEY})
        except OptionError as error:
            where, _, message = str(error).partition(': ')
            faults.append(Fault((*place, *where.split('.')), message))
            continue
        num_checked += 1
        for fault in _RunCheck(run, registered, is_train).faults():
            if holds(entry, fault.where):
                faults.append(Fault((*place, *fault.where), fault.message, fault.unknown_key))
            else:
                inherited.setdefault(fault, []).append(number)
    for fault, numbers in inherited.items():
        # What is wrong in all of them is wrong in what they share; else only this stage makes it wrong.
        if len(numbers) == num_checked:
            faults.append(fault)
        else:
            faults += [replace(fault, where=(STAGES_KEY, number, *fault.where)) for number in numbers]
    return faults if num_checked else [*faults, *_RunCheck(base, registered, is_train).faults()]


def _stage_name_faults(entries: list[Any]) -> list[Fault]:
    faults = []
    taken: dict[str, int] = {}
    for number, entry in enumerate(entries):
        where = (STAGES_KEY, number, 'name')
        if not isinstance(entry, dict):
            continue
        try:
            if entry.get('name') is not None:
                _FOLDER_NAME.validate_python(entry['name'], strict=True)
        except ValidationError:
            faults.append(Fault(where, f'expected a name that can name a folder, got {shown(entry["name"])}'))
            continue
        name = stage_name(number + 1, entry)
        if name in taken:
            faults.append(Fault(where, f'{name} is the name of {STAGES_KEY}.{taken[name]} already'))
        taken[name] = number
    return faults


def holds(value: Any, where: Where) -> bool:
    """Whether there is something at `where` below `value`."""
    for step in where:
        keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        if step not in keys:
            return False
        value = value[step]
    return True
