"""The check of stages: each of them with all that it takes from the file, its faults named where they were written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ast_plugin.errors import OptionError
from ast_plugin.options import stages
from ast_plugin.schema.faults import Fault, Where, shown
from ast_plugin.schema.keys import FolderName

_NAME = TypeAdapter(FolderName)


def staged_faults(opt: Mapping[str, Any], run_faults: Callable[[Mapping[str, Any]], list[Fault]]) -> list[Fault]:
    """Every fault of options with stages.

    Args:
        opt: the options of a file.
        run_faults: finds the faults of one stage with all its options.
    """
    entries = opt[stages.KEY]
    base = {key: value for key, value in opt.items() if key != stages.KEY}
    if not isinstance(entries, list) or not entries:
        message = f'expected a list of mappings, each of what differs in a stage, got {shown(entries)}'
        return [*run_faults(base), Fault((stages.KEY,), message)]
    faults = _name_faults(entries)
    if isinstance(base.get('path'), dict) and base['path'].get('resume_state') is not None:
        message = f'a state is of one stage: put it into {stages.KEY}.0.path or another, or use --auto_resume'
        faults.append(Fault(('path', 'resume_state'), message))
    inherited: dict[Fault, list[int]] = {}
    checked = 0
    for number, entry in enumerate(entries):
        place = (stages.KEY, number)
        if not isinstance(entry, dict):
            faults.append(Fault(place, f'expected a mapping of what differs in this stage, got {shown(entry)}'))
            continue
        if stages.KEY in entry:
            faults.append(Fault((*place, stages.KEY), 'stages have no stages of their own'))
        try:
            merged = stages.merged(base, {key: value for key, value in entry.items() if key != stages.KEY})
        except OptionError as error:
            where, _, message = str(error).partition(': ')
            faults.append(Fault((*place, *where.split('.')), message))
            continue
        checked += 1
        for fault in run_faults(merged):
            if _says(entry, fault.where):
                faults.append(Fault((*place, *fault.where), fault.message, fault.unknown_key))
            else:
                inherited.setdefault(fault, []).append(number)
    for fault, numbers in inherited.items():
        # What is wrong in all of them is wrong in what they share; else only this stage makes it wrong.
        if len(numbers) == checked:
            faults.append(fault)
        else:
            faults += [Fault((stages.KEY, number, *fault.where), fault.message) for number in numbers]
    return faults if checked else [*faults, *run_faults(base)]


def _name_faults(entries: list[Any]) -> list[Fault]:
    faults = []
    taken: dict[str, int] = {}
    for number, entry in enumerate(entries):
        where: Where = (stages.KEY, number, 'name')
        if not isinstance(entry, dict):
            continue
        if entry.get('name') is not None:
            try:
                _NAME.validate_python(entry['name'], strict=True)
            except ValidationError:
                faults.append(Fault(where, f'expected a name that can name a folder, got {shown(entry["name"])}'))
                continue
        name = stages.name_of(number + 1, entry)
        if name in taken:
            faults.append(Fault(where, f'{name} is the name of {stages.KEY}.{taken[name]} already'))
        taken[name] = number
    return faults


def _says(entry: Any, where: Where) -> bool:
    """Whether a stage itself has the key."""
    for step in where:
        keys = entry if isinstance(entry, dict) else range(len(entry)) if isinstance(entry, list) else ()
        if step not in keys:
            return False
        entry = entry[step]
    return True
