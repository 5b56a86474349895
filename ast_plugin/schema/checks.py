"""The check of an option file: its keys, then what they say against what is registered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ast_plugin.errors import OptionError, PluginError, did_you_mean
from ast_plugin.options import phase_of, stages
from ast_plugin.options.merging import RIVALS, rivals
from ast_plugin.schema.faults import Fault, Where, faults_of, shown, unknown_key
from ast_plugin.schema.keys import Dataset, OptionFile, Paths
from ast_plugin.schema.registered import Registered
from ast_plugin.schema.signatures import argument_faults, keys_read_by
from ast_plugin.schema.staged import staged_faults

_PATH_PATTERNS = {'pretrain_network_': str, 'param_key_': str, 'strict_load_': bool}
_METRIC_IMAGES = ('img', 'img2')
# Taken out of a metric's options, or left in for the model to read, but no argument of the function.
_METRIC_OWN = ('type', 'better')
_OPTIMIZER_GIVEN = ('params', 'defaults')
_SCHEDULER_GIVEN = ('optimizer', 'last_epoch')
_SCHEDULER_OPTIONAL = ('total_iter',)  # the model's own total_iter stands in
_BASICSR, _OURS = 'basicsr', 'ast_plugin'


def check(opt: Mapping[str, Any], source: str, registered: Registered | None = None, *, is_train: bool = True) -> None:
    """Check the options of a file, as read, before `ast_plugin.options.prepare` completes them.

    Args:
        opt: what `ast_plugin.options.load` returned.
        source: the file's name in messages.
        registered: what names may be used; without it only keys and types are checked.
        is_train: what training needs must be there as well.
    Raises:
        OptionError: listing every fault, one line each: `FILE: datasets.train.gt_sise: unknown key, did you mean …?`
    """
    faults = find_faults(opt, registered, is_train=is_train)
    if faults:
        raise OptionError('\n'.join(f'{source}: {fault}' for fault in faults))


def find_faults(opt: Mapping[str, Any], registered: Registered | None = None, *, is_train: bool = True) -> list[Fault]:
    """Every fault of the options, those inside of its stages too, in the order of the file."""

    def run_faults(run: Mapping[str, Any]) -> list[Fault]:
        return _run_faults(run, registered, is_train)

    faults = staged_faults(opt, run_faults) if stages.KEY in opt else run_faults(opt)
    # The same key may be seen by two checks; what the first one says is nearer to the cause.
    unique = {fault.where: fault for fault in reversed(faults)}
    return sorted(unique.values(), key=lambda fault: _position(opt, fault.where))


def _run_faults(opt: Mapping[str, Any], registered: Registered | None, is_train: bool) -> list[Fault]:
    """The faults of options without stages."""
    faults = _key_faults(opt, _is_third_party(opt, registered), _is_ours(opt, registered))
    faults += _missing_sections(opt, is_train, _is_third_party(opt, registered))
    if registered is not None:
        faults += _registry_faults(opt, registered)
    if registered is not None and not _is_ours(opt, registered) and not _is_third_party(opt, registered):
        faults += _protocol_faults(opt)
    faults += (_best_metric_faults(opt, registered) if is_train else []) + _rival_faults(opt)
    faults += _namesake_faults(_section(opt, 'datasets'))
    return list({fault.where: fault for fault in reversed(faults)}.values())[::-1]


def _position(opt: Any, where: Where) -> list[int]:
    """The place of a key in the file, section by section; what is not there comes behind what is."""
    position = []
    for step in where:
        keys = list(opt) if isinstance(opt, dict) else list(range(len(opt))) if isinstance(opt, list) else []
        position.append(keys.index(step) if step in keys else len(keys))
        opt = opt[step] if step in keys else None
    return position


def _key_faults(opt: Mapping[str, Any], is_third_party: bool, is_ours: bool) -> list[Fault]:
    networks = {key: value for key, value in opt.items() if key.startswith('network_')}
    paths = _section(opt, 'path')
    # Keys that name networks are checked by their pattern, all others by the models.
    rest = {key: value for key, value in opt.items() if key not in networks}
    if paths:
        rest['path'] = {key: value for key, value in paths.items() if key in Paths.model_fields}
    faults = [
        Fault((key,), 'expected a mapping with a type')
        for key, value in networks.items()
        if not isinstance(value, dict) or not isinstance(value.get('type'), str)
    ]
    for key, value in paths.items():
        if key not in Paths.model_fields:
            faults += _path_faults(key, value, networks)
    faults += _model_faults(OptionFile, rest, (), also_known=('network_g', 'network_d'))
    return [fault for fault in faults if not _is_allowed(fault, is_third_party, is_ours)]


def _model_faults(model: type[BaseModel], value: Any, where: Where, also_known: tuple[str, ...] = ()) -> list[Fault]:
    try:
        model.model_validate(value)
    except ValidationError as error:
        return faults_of(error, model, value, where, also_known)
    return []


def _is_allowed(fault: Fault, is_third_party: bool, is_ours: bool) -> bool:
    """An unknown key may be read by a third party's model; ours takes any number of `*_opt` losses."""
    if not fault.unknown_key:
        return False
    section, key = fault.where[:-1], str(fault.where[-1])
    if is_third_party:
        return section in ((), ('train',), ('val',), ('logger',), ('path',))
    return is_ours and section == ('train',) and key.endswith('_opt')


def _path_faults(key: str, value: Any, networks: Mapping[str, Any]) -> list[Fault]:
    letters = [network.removeprefix('network_') for network in networks or ('network_g',)]
    kinds = {f'{pattern}{letter}': kind for pattern, kind in _PATH_PATTERNS.items() for letter in letters}
    if key not in kinds:
        return [unknown_key(('path', key), [*kinds, *Paths.model_fields])]
    if value is None or isinstance(value, kinds[key]):
        return []
    return [Fault(('path', key), f'expected {"text" if kinds[key] is str else "true or false"}, got {shown(value)}')]


def _missing_sections(opt: Mapping[str, Any], is_train: bool, is_third_party: bool) -> list[Fault]:
    datasets = _section(opt, 'datasets')
    faults = [
        Fault(('datasets', key), 'expected train, val or test, with or without a number behind _ (val_2)')
        for key in datasets
        if not phase_of(key) or (phase_of(key) == 'train' and key != 'train')
    ]
    needed: list[Where] = [] if is_third_party else [('network_g',)]
    if is_train:
        needed += [
            ('datasets', 'train'),
            ('datasets', 'train', 'batch_size_per_gpu'),
            ('datasets', 'train', 'num_worker_per_gpu'),
            ('train',),
            ('logger',),
        ]
        needed += [] if is_third_party else [('train', 'optim_g'), ('train', 'scheduler')]
        needed += [('train', 'total_iter'), ('logger', 'save_checkpoint_freq')]
        if isinstance(opt.get('val'), dict):
            needed.append(('val', 'val_freq'))
    elif datasets and not any(phase_of(key) in ('val', 'test') for key in datasets):
        faults.append(Fault(('datasets', 'val'), 'required for testing (or datasets.test), but not there'))
    # Where a whole section is missing or wrong, what it lacks is not worth a line.
    return faults + [
        Fault(where, ''.join(['required, but not there', *(f' (or {other})' for other in others)]))
        for where in needed
        for others in [rivals(where[:-1], where[-1])]
        if isinstance(_at(opt, where[:-1]), dict)
        and all(_at(opt, (*where[:-1], key)) is None for key in (where[-1], *others))
    ]


def _rival_faults(opt: Mapping[str, Any]) -> list[Fault]:
    """Two keys that say the same thing in different units."""
    return [
        Fault((*where, given[1]), f'{given[0]} says that already, leave one of them out')
        for where, pairs in RIVALS.items()
        for pair in pairs
        if isinstance(_at(opt, where), dict)
        and len(given := [key for key in _at(opt, where) if key in pair and _at(opt, (*where, key)) is not None]) > 1
    ]


def _namesake_faults(datasets: Mapping[str, Any]) -> list[Fault]:
    """Sets to measure that share a name, and so the files of their results."""
    faults, first = [], {}
    for key, dataset in datasets.items():
        name = dataset.get('name') if isinstance(dataset, dict) and key.startswith(('val', 'test')) else None
        if isinstance(name, str) and first.setdefault(name, key) != key:
            faults.append(Fault(('datasets', key, 'name'), f'datasets.{first[name]} is called {name}, too'))
    return faults


def _protocol_faults(opt: Mapping[str, Any]) -> list[Fault]:
    """Protocols that nothing would read."""
    places = (('val', 'protocol'), ('val', 'during_training', 'protocol'))
    message = 'read by model_type RestorationModel alone'
    return [Fault(place, message) for place in places if _at(opt, place) is not None]


def _best_metric_faults(opt: Mapping[str, Any], registered: Registered | None) -> list[Fault]:
    val = _section(opt, 'val')
    best, during = val.get('best_metric'), _section(val, 'during_training')
    if not isinstance(best, str):
        return []
    # The best weights are picked during training; a protocol that is named there brings its own metrics.
    deciding = during if during.get('metrics') or during.get('protocol') else val
    metrics = deciding.get('metrics')
    if metrics is None:
        protocol = deciding.get('protocol') or 'basicsr'
        name = protocol.get('type') if isinstance(protocol, dict) else protocol
        if registered is None or name not in registered.protocols:
            return []
        metrics = registered.protocols[name]
    if not isinstance(metrics, (dict, tuple)) or best in metrics:
        return []
    place = 'val.during_training.metrics' if deciding is during else 'val.metrics'
    return [Fault(('val', 'best_metric'), f'{best} is not among {place}: {", ".join(metrics) or "none there"}')]


def _registry_faults(opt: Mapping[str, Any], registered: Registered) -> list[Fault]:
    faults = []
    model_type = opt.get('model_type')
    if isinstance(model_type, str) and registered.get('model', model_type) is None:
        faults.append(Fault(('model_type',), registered.missing('model', model_type)))
    for key, value in opt.items():
        if key.startswith('network_'):
            faults += _call_faults('arch', value, (key,), registered)
    for key, value in _section(opt, 'datasets').items():
        faults += _dataset_faults(key, value, opt, registered)
    train = _section(opt, 'train')
    for key, value in train.items():
        if key.endswith('_opt') and value is not None:
            faults += _call_faults('loss', value, ('train', key), registered)
        elif key.startswith('optim_'):
            faults += _optimizer_faults(value, ('train', key), registered)
    faults += _scheduler_faults(train.get('scheduler'), opt, registered)
    for where in (('val',), ('val', 'during_training')):
        section = _at(opt, where)
        for key, value in _section(section if isinstance(section, dict) else {}, 'metrics').items():
            place = (*where, 'metrics', key)
            faults += _call_faults('metric', value, place, registered, given=_METRIC_IMAGES, ignored=_METRIC_OWN)
    return faults


def _call_faults(
    kind: str, options: Any, where: Where, registered: Registered, **names: tuple[str, ...]
) -> list[Fault]:
    """Faults of `{type: NAME, argument: value, …}`."""
    if not isinstance(options, dict) or not isinstance(options.get('type'), str):
        return [Fault(where, 'expected a mapping with a type')]
    target = registered.get(kind, options['type'])
    if target is None:
        return [Fault((*where, 'type'), registered.missing(kind, options['type']))]
    if hasattr(target, 'class_for'):
        # A family of networks: which of them is meant is the option `name`.
        try:
            target = target.class_for(options)
        except PluginError as error:
            return [Fault((*where, 'name'), str(error))]
        names = {**names, 'ignored': ('type', 'name')}
    faults = argument_faults(target, options, where, **names)
    # Of a network that is made of another one.
    for key in getattr(target, 'network_options', ()):
        if isinstance(options.get(key), dict):
            faults += _call_faults('arch', options[key], (*where, key), registered)
    return faults


def _dataset_faults(key: str, options: Any, opt: Mapping[str, Any], registered: Registered) -> list[Fault]:
    where = ('datasets', key)
    if not isinstance(options, dict) or not isinstance(options.get('type'), str):
        return []
    target = registered.get('dataset', options['type'])
    if target is None:
        return [Fault((*where, 'type'), registered.missing('dataset', options['type']))]
    options_type = getattr(target, 'options_type', None)
    if options_type is not None:
        return _model_faults(options_type, {**options, 'phase': phase_of(key), 'scale': opt.get('scale') or 1}, where)
    read = keys_read_by(target)
    if read is None:
        return []
    known = [*Dataset.model_fields, *sorted(read)]
    return [unknown_key((*where, name), known) for name in options if name not in known]


def _optimizer_faults(options: Any, where: Where, registered: Registered) -> list[Fault]:
    if not isinstance(options, dict) or not isinstance(options.get('type'), str) or not registered.find_optimizer:
        return []
    try:
        target = registered.find_optimizer(options['type'])
    except OptionError as error:
        return [Fault((*where, 'type'), str(error))]
    return argument_faults(target, options, where, given=_OPTIMIZER_GIVEN)


def _scheduler_faults(options: Any, opt: Mapping[str, Any], registered: Registered) -> list[Fault]:
    where = ('train', 'scheduler')
    if not isinstance(options, dict) or not isinstance(options.get('type'), str):
        return []
    schedulers = {**registered.schedulers, **(registered.own_schedulers if _is_ours(opt, registered) else {})}
    target = schedulers.get(options['type'])
    if target is not None:
        return argument_faults(target, options, where, given=_SCHEDULER_GIVEN, optional=_SCHEDULER_OPTIONAL)
    if _is_third_party(opt, registered):
        return []
    return [_unknown_name((*where, 'type'), 'scheduler', options['type'], list(schedulers))]


def _unknown_name(where: Where, kind: str, name: str, known: list[str]) -> Fault:
    suggestion = did_you_mean(name, known) or f', there are {", ".join(known)}'
    return Fault(where, f'no {kind} is named {name}{suggestion}')


def _package(opt: Mapping[str, Any], registered: Registered | None) -> str:
    model = registered.get('model', str(opt.get('model_type'))) if registered is not None else None
    return getattr(model, '__module__', '').split('.')[0]


def _is_third_party(opt: Mapping[str, Any], registered: Registered | None) -> bool:
    return _package(opt, registered) not in ('', _BASICSR, _OURS)


def _is_ours(opt: Mapping[str, Any], registered: Registered | None) -> bool:
    return _package(opt, registered) == _OURS


def _section(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _at(opt: Any, where: Where) -> Any:
    for key in where:
        opt = opt.get(key) if isinstance(opt, dict) else None
    return opt
