"""Compare files: an option file with a list of networks in the place of one, its check, and what it stands for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ast_plugin.errors import OptionError
from ast_plugin.faults import Fault, Where, shown
from ast_plugin.options.reading import merge
from ast_plugin.options.sections import Count, CountOrZero, FolderName, Number, Section
from ast_plugin.options.validation import Registered, find_faults, holds, model_faults, raise_faults, unique

ENTRIES, SETTINGS = 'networks', 'compare'
INPUT = 'input'  # the row of the unrestored images
# Stands for a number of iterations that is found out by measuring, see `compare.minutes`.
UNKNOWN_LENGTH = 10**6

_OWN = (ENTRIES, SETTINGS)

Size = Annotated[list[Count], Field(min_length=2, max_length=2)]


class ComparedNetwork(Section):
    """One network of a comparison."""

    name: FolderName = Field(description='in tables and plots, and of its folder')
    network_g: dict[str, Any] | None = Field(None, description='type and arguments; not needed where the weights tell')
    weights: str | None = Field(None, description='trained weights; with train, what training starts from')
    param_key: str | None = Field(None, description='where the weights lie in a .pth file, such as params_ema')
    train: dict[str, Any] | None = Field(
        None, description="what differs from the file's train; without weights not needed"
    )


class CompareSettings(Section):
    """How networks are compared."""

    baseline: str | None = Field(None, description='differences are told against this network; the best if not given')
    minutes: Number | None = Field(None, gt=0, description='of training for each network, instead of total_iter')
    weights: Literal['latest', 'best'] = Field('latest', description='which weights of a training are measured')
    sizes: list[Size] = Field([[256, 256]], min_length=1, description='[height, width] for speed, memory and MACs')
    runs: Count = Field(10, description='timed runs at each size')
    threads: Count | None = Field(None, description='of the CPU, for speed; all cores if not given')
    device: str | None = Field(
        None, description="of what is measured: auto, cpu, cuda, cuda:1 … or mps; the file's device goes before it"
    )
    resamples: Count = Field(10_000, description='of the images, for confidence intervals')
    confidence: Number = Field(0.95, gt=0, lt=1, description='of the intervals')
    pictures: CountOrZero = Field(4, description='that the report shows')


class Head(Section):
    """What a compare file has besides the keys of an option file."""

    networks: list[ComparedNetwork] = Field(min_length=1)
    compare: CompareSettings = Field(default_factory=CompareSettings)


def check_comparison(
    opt: Mapping[str, Any], source: str, registered: Registered, explain: Callable[[Fault], Fault] | None = None
) -> None:
    """Check the options of a compare file, or raise OptionError with a line for each fault."""
    raise_faults(find_comparison_faults(opt, registered), source, explain)


def find_comparison_faults(opt: Mapping[str, Any], registered: Registered | None = None) -> list[Fault]:
    """Every fault of a compare file: in its own keys, then in what it comes to for each network."""
    head = {key: opt[key] for key in (ENTRIES, SETTINGS) if opt.get(key) is not None}
    faults = model_faults(Head, head)
    faults += [
        Fault((key,), reason)
        for key, reason in (
            ('network_g', f'each network is an entry of {ENTRIES}'),
            ('stages', 'networks are compared after one run each; compare the weights of staged runs by `weights`'),
            ('path', 'weights are given by `weights` of a network; runs are resumed by themselves'),
        )
        if key in opt
    ]
    entries = opt.get(ENTRIES)
    if not isinstance(entries, list):
        return faults
    faults += _name_faults(entries)
    faults += _shared_faults(opt, [entry.get('name') for entry in entries if isinstance(entry, Mapping)])
    shared: dict[Fault, None] = {}
    for number, entry in enumerate(entries):
        if isinstance(entry, Mapping) and isinstance(entry.get('name'), str):
            own, common = _entry_faults(opt, number, entry, registered)
            faults += own
            shared |= dict.fromkeys(common)
    return unique([*faults, *shared])


def _entry_faults(
    opt: Mapping[str, Any], number: int, entry: Mapping[str, Any], registered: Registered | None
) -> tuple[list[Fault], list[Fault]]:
    """Faults that the entry makes, and those that all share."""
    place: Where = (ENTRIES, number)
    if entry.get('network_g') is None and entry.get('weights') is None:
        return [Fault((*place, 'network_g'), 'required, but not there (or weights that tell the network)')], []
    if not isinstance(entry.get('train') or {}, Mapping) or not isinstance(opt.get('train') or {}, Mapping):
        return [], []
    try:
        expanded = expand_entry(opt, entry)
    except OptionError as error:
        return [Fault(place, str(error))], []
    own, common = [], []
    for fault in find_faults(expanded, registered, is_train=is_trained(entry)):
        first, rest = fault.where[0], fault.where[1:]
        if first == 'network_g' and entry.get('network_g') is None:
            continue
        if first in ('name', 'path'):
            continue  # made here
        if first == 'network_g' or (first == 'train' and rest and holds(entry.get('train'), rest[:1])):
            own.append(Fault((*place, *fault.where), fault.message, fault.unknown_key))
        else:
            common.append(fault)
    return own, common


def _name_faults(entries: list[Any]) -> list[Fault]:
    faults = []
    taken: dict[str, int] = {}
    for number, entry in enumerate(entries):
        name = entry.get('name') if isinstance(entry, Mapping) else None
        if not isinstance(name, str):
            continue
        where = (ENTRIES, number, 'name')
        # Names are names of folders, and some file systems tell no capitals.
        key = name.casefold()
        if key in taken:
            faults.append(Fault(where, f'{name} is the name of {ENTRIES}.{taken[key]} already'))
        elif key == INPUT:
            faults.append(Fault(where, f'{INPUT} is the name of the unrestored images'))
        elif 'debug' in key:
            faults.append(Fault(where, 'BasicSR takes a name with `debug` in it for its debug mode, choose another'))
        taken.setdefault(key, number)
    return faults


def _shared_faults(opt: Mapping[str, Any], names: list[Any]) -> list[Fault]:
    """What the sections of the whole file have wrong for a comparison of networks of these names."""
    sections = [opt.get(key) for key in (SETTINGS, 'train', 'datasets')]
    settings, train, datasets = (section if isinstance(section, Mapping) else {} for section in sections)
    faults = []
    baseline = settings.get('baseline')
    if isinstance(baseline, str) and baseline not in names:
        expected = f'expected one of {", ".join(map(str, names))}, got {shown(baseline)}'
        faults.append(Fault((SETTINGS, 'baseline'), expected))
    for key in ('total_iter', 'total_epochs'):
        if settings.get('minutes') is not None and train.get(key) is not None:
            faults.append(Fault(('train', key), f'{SETTINGS}.minutes says how long networks are trained'))
    tests = [key for key in datasets if str(key).startswith('test')]
    measured = tests or [key for key in datasets if str(key).startswith('val')]
    if not measured:
        missing = 'required, but not there (or datasets.test): what networks are compared on'
        faults.append(Fault(('datasets', 'val'), missing))
    if len(measured) > 1:
        message = f'networks are compared on one set, and {measured[0]} is one already'
        faults.append(Fault(('datasets', measured[1]), message))
    return faults


def is_trained(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `networks` is trained: where it has no weights, or says besides how."""
    return entry.get('weights') is None or entry.get('train') is not None


def expand_entry(opt: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The option file that an entry of `networks` stands for: what all share, its network, what its `train` changes."""
    shared = {key: value for key, value in opt.items() if key not in _OWN}
    expanded = merge(shared, {'train': entry['train']}) if entry.get('train') else copy.deepcopy(shared)
    expanded['name'] = entry.get('name')
    if entry.get('network_g') is not None:
        expanded['network_g'] = copy.deepcopy(entry['network_g'])
    settings = opt.get(SETTINGS)
    if isinstance(settings, Mapping) and settings.get('minutes') and isinstance(expanded.get('train'), dict):
        expanded['train'].setdefault('total_iter', UNKNOWN_LENGTH)
    if not any(str(key).startswith('val') for key in opt.get('datasets') or ()):
        expanded.pop('val', None)  # it says how the test set is measured, after training
    paths = {'pretrain_network_g': entry.get('weights'), 'param_key_g': entry.get('param_key')}
    expanded['path'] = {key: value for key, value in paths.items() if value is not None}
    return expanded


def measured_dataset(opt: Mapping[str, Any]) -> str:
    """The key of the set that networks are compared on: the test set, or where there is none that of validation."""
    keys = [key for key in opt['datasets'] if key.startswith(('test', 'val'))]
    return next((key for key in keys if key.startswith('test')), keys[0])
