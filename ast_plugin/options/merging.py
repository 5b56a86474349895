"""How one set of options is laid over another: files over their bases, stages over their file, overrides over both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ast_plugin.errors import OptionError

DELETE_KEY = '_delete_'
# Of these keys of a section one says what the others would: giving one takes the inherited others away.
RIVALS: dict[tuple[str, ...], tuple[tuple[str, str], ...]] = {
    ('train',): (('total_iter', 'total_epochs'), ('warmup_iter', 'warmup_epochs')),
    ('train', 'scheduler'): (('warmup_iter', 'warmup_epochs'),),
    ('val',): (('val_freq', 'times_per_epoch'),),
    ('logger',): (('save_checkpoint_freq', 'save_checkpoint_epochs'),),
}


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `changes` over `base`; both stay as they are.

    Sections are merged key by key, anything else is replaced as a whole, lists too. A section with `_delete_: true`
    replaces the one below it. A length in epochs takes away the inherited one in iterations, and so on: see `RIVALS`.

    Raises:
        OptionError: if a `_delete_` is neither true nor false.
    """
    # Config.fromfile of mmengine is no way in: it reads YAML with a loader that makes objects, fills in templates and
    # runs custom_imports. Its merging of plain values is what is wanted, so files are read by safe_yaml first.
    from mmengine.config import ConfigDict

    _check_marks(changes, ())
    base = copy.deepcopy(dict(base))
    for where, pairs in RIVALS.items():
        _drop_rivals(_section(base, where), _section(changes, where), pairs)
    merged = ConfigDict(base)
    merged.merge(dict(changes))
    return _without_marks(merged.to_dict())


def rivals(where: tuple[str, ...], key: str) -> list[str]:
    """The keys of the section at `where` that give way when `key` is set."""
    return [other for pair in RIVALS.get(where, ()) if key in pair for other in pair if other != key]


def _drop_rivals(base: dict | None, changes: Mapping | None, pairs: tuple[tuple[str, str], ...]) -> None:
    for pair in pairs if base and changes else ():
        if any(changes.get(key) is not None for key in pair):
            for key in pair:
                if key not in changes:
                    base.pop(key, None)


def _section(opt: Any, where: tuple[str, ...]) -> Any:
    for key in where:
        opt = opt.get(key) if isinstance(opt, Mapping) else None
    return opt if isinstance(opt, Mapping) else None


def _check_marks(value: Any, where: tuple[str, ...]) -> None:
    if isinstance(value, Mapping):
        if not isinstance(value.get(DELETE_KEY, True), bool):
            raise OptionError(f'{".".join((*where, DELETE_KEY))}: expected true or false')
        for key, item in value.items():
            _check_marks(item, (*where, str(key)))


def _without_marks(value: Any) -> Any:
    """ConfigDict leaves the marks of sections that had nothing below them."""
    if isinstance(value, dict):
        return {key: _without_marks(item) for key, item in value.items() if key != DELETE_KEY}
    return [_without_marks(item) for item in value] if isinstance(value, list) else value
