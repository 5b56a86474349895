"""`--force_yml key:sub=value`: options changed from the command line, in a file's stages too."""

from __future__ import annotations

from typing import Any

from ast_plugin.errors import OptionError, did_you_mean
from ast_plugin.options import safe_yaml
from ast_plugin.options.merging import DELETE_KEY, rivals


def override(opt: dict[str, Any], text: str) -> None:
    """Change `opt` in place as `key:sub=value` says; the value is read as YAML, a list's item is named by its number.

    Every section on the way must be there, the last key need not be. What is set so wins over what stages say of it:
    `train:total_epochs=1` cuts every stage. One stage alone is addressed by its place, the first being 0:
    `stages:0:train:total_epochs=1`.

    Raises:
        OptionError: if there is no such section, or the value is not plain YAML.
    """
    source = f'--force_yml {text}'
    keys, equals, written = text.partition('=')
    steps = [step.strip() for step in keys.split(':')]
    if not equals or not all(steps):
        raise OptionError(f'{source}: expected key:sub=value')
    value = None if written.strip() in ('None', 'none') else safe_yaml.read_text(written, source)
    changed = [_override_stage(stage, steps, value) for stage in _stages(opt, steps)]
    try:
        _set(opt, steps, value, source)
    except OptionError:
        # A section that stages alone have is none of the file's.
        if not any(changed):
            raise


def _stages(opt: dict[str, Any], steps: list[str]) -> list[dict[str, Any]]:
    stages = opt.get('stages')
    # A run of stages is named by its file; a stage's name is another thing.
    if not isinstance(stages, list) or steps in (['name'], ['stages']) or steps[0] == 'stages':
        return []
    return [stage for stage in stages if isinstance(stage, dict)]


def _override_stage(stage: dict[str, Any], steps: list[str], value: Any) -> bool:
    """Set what a stage says itself of the key. Whatever it does not, it takes from the file."""
    section: Any = stage
    for step in steps[:-1]:
        if isinstance(section, list) and step.isdecimal() and int(step) < len(section):
            section = section[int(step)]
        elif isinstance(section, dict) and step in section:
            section = section[step]
        else:
            return False
    last = steps[-1]
    if isinstance(section, list) and last.isdecimal() and int(last) < len(section):
        section[int(last)] = value
        return True
    if not isinstance(section, dict):
        return False
    others = [key for key in rivals(tuple(steps[:-1]), last) if key in section and value is not None]
    if last not in section and not others and not section.get(DELETE_KEY):
        return False
    for key in others:
        del section[key]
    section[last] = {**value, DELETE_KEY: True} if isinstance(value, dict) else value
    return True


def _set(opt: dict[str, Any], steps: list[str], value: Any, source: str) -> None:
    in_stage = steps[0] == 'stages'
    section: Any = opt
    for depth, step in enumerate(steps[:-1]):
        key = _step(section, step, source)
        if isinstance(section, dict) and key not in section:
            if not in_stage or not isinstance(_at(opt, steps[2 : depth + 1]), dict):
                where = ':'.join(steps[:depth]) or 'the file'
                raise OptionError(f'{source}: {where} has no section {key}{did_you_mean(key, section)}')
            section[key] = {}  # a stage that has said nothing of a section of the file
        if section[key] is None:
            section[key] = {}
        section = section[key]
    section[_step(section, steps[-1], source)] = value
    for key in rivals(tuple(steps[2 * in_stage : -1]), steps[-1]) if value is not None else ():
        section.pop(key, None)


def _at(opt: Any, steps: list[str]) -> Any:
    for step in steps:
        opt = opt.get(step) if isinstance(opt, dict) else None
    return opt


def _step(section: Any, step: str, source: str) -> str | int:
    """The key or index that `step` names in `section`, which must have room for it."""
    if isinstance(section, dict):
        return step
    if not isinstance(section, list):
        raise OptionError(f'{source}: {step} would lie inside {section!r}, which is neither a section nor a list')
    if not step.isdecimal() or int(step) >= len(section):
        raise OptionError(f'{source}: expected a number from 0 to {len(section) - 1} to pick from a list, got {step}')
    return int(step)
