"""What is registered, handed in by whoever imported it: this package checks names without importing BasicSR."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ast_plugin.errors import did_you_mean

# BasicSR registers some of its own under NAME_basicsr, and falls back to that when NAME is not taken.
_FALLBACK_SUFFIX = '_basicsr'


@dataclass(frozen=True)
class Registered:
    """Registered classes and functions by kind (`arch`, `dataset`, `loss`, `metric`, `model`) and name.

    Attributes:
        by_kind: the contents of each registry.
        schedulers: classes that `train.scheduler.type` can name with every model.
        own_schedulers: further ones that this package's models know.
        protocols: names of each validation protocol's own metrics, by the protocol's name.
        find_optimizer: the class that `train.optim_g.type` names; OptionError if there is none. Not checked without.
        failed_plugins: one line for each plugin that could not be loaded.
    """

    by_kind: Mapping[str, Mapping[str, object]]
    schedulers: Mapping[str, type] = field(default_factory=dict)
    own_schedulers: Mapping[str, type] = field(default_factory=dict)
    protocols: Mapping[str, Sequence[str]] = field(default_factory=dict)
    failed_plugins: Sequence[str] = ()
    find_optimizer: Callable[[str], type] | None = None

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
