"""Other people's plugins: every installed distribution that names an entry point in the group `basicsr.plugins`.

An entry point names a module, which registers things in BasicSR's registries when it is imported, or a function,
which does so when it is called without arguments:

    entry_points={'basicsr.plugins': ['mine = my_package.registration']}

Option files come from the group `basicsr.options`, whose entry points name a package and, behind dots, a folder in it;
nothing of it is imported. `basicsr train -opt mine/recipe` then means recipe.yml in that folder:

    entry_points={'basicsr.options': ['mine = my_package.recipes']}
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from ast_plugin.errors import first_line
from ast_plugin.names import say

GROUP = 'basicsr.plugins'
OPTIONS_GROUP = 'basicsr.options'


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
            failures.append(f'{_description(point)} failed to load: {type(error).__name__}: {first_line(error)}')
            say(f'basicsr: warning: {failures[-1]}', file=sys.stderr)
    return tuple(failures)


def option_folders() -> dict[str, Path]:
    """The folders of option files that installed distributions bring, by the name of the entry point.

    A folder that is not there is a line on stderr.
    """
    folders = {}
    for point in sorted(entry_points(group=OPTIONS_GROUP), key=lambda point: point.name):
        package, *steps = point.value.split('.')
        spec = importlib.util.find_spec(package)
        roots = [Path(root, *steps) for root in (spec.submodule_search_locations or ())] if spec else []
        folder = next((root for root in roots if root.is_dir()), None)
        if folder is None:
            say(f'basicsr: warning: {_description(point)} has no folder {point.value}', file=sys.stderr)
        else:
            folders[point.name] = folder
    return folders


def _description(point: EntryPoint) -> str:
    distribution = f' of {point.dist.name} {point.dist.version}' if point.dist is not None else ''
    return f'plugin {point.name}{distribution}'
