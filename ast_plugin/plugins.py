"""Other people's plugins: every installed distribution that names an entry point in the group `basicsr.plugins`.

An entry point names a module, which registers things in BasicSR's registries when it is imported, or a function,
which does so when it is called without arguments:

    entry_points={'basicsr.plugins': ['mine = my_package.registration']}
"""

from __future__ import annotations

import functools
import inspect
import sys
from importlib.metadata import EntryPoint, entry_points

GROUP = 'basicsr.plugins'


@functools.cache
def load_plugins() -> tuple[str, ...]:
    """Load every installed plugin, once a process.

    A plugin that cannot be loaded hurts nobody but those who use what it registers: it is a line on stderr.

    Returns:
        A line for each plugin that failed, saying which, of what distribution, and why.
    """
    failures = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            loaded = point.load()
            if inspect.isroutine(loaded):
                loaded()
        except Exception as error:  # whatever a stranger's module raises
            failures.append(f'{_description(point)} failed to load: {type(error).__name__}: {_first_line(error)}')
            print(f'basicsr: warning: {failures[-1]}', file=sys.stderr)
    return tuple(failures)


def _description(point: EntryPoint) -> str:
    distribution = f' of {point.dist.name} {point.dist.version}' if point.dist is not None else ''
    return f'plugin {point.name}{distribution}'


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), '')
