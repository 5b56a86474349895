"""Third-party plugins, found by the entry points of installed distributions.

An entry point in the group `basicsr.plugins` names a module that registers objects with BasicSR when it is imported,
or a function without arguments that does so when it is called:

    entry_points={'basicsr.plugins': ['mine = my_package.registration']}

An entry point in the group `basicsr.options` names a package and a folder in it, separated by dots; the package is not
imported. `basicsr train -opt mine/recipe` then reads recipe.yml in that folder:

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
    """Load every installed plugin, once per process.

    A plugin that fails to load is reported on stderr and does not stop the program.

    Returns:
        One line for each plugin that failed: its name, its distribution and the reason.
    """
    failures = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            loaded = point.load()
            if inspect.isroutine(loaded):
                loaded()
        except Exception as error:  # third-party code may raise anything
            failures.append(f'{_description(point)} failed to load: {type(error).__name__}: {first_line(error)}')
            say(f'basicsr: warning: {failures[-1]}', file=sys.stderr)
    return tuple(failures)


def option_folders() -> dict[str, Path]:
    """Return the folders of option files of installed distributions by the name of their entry point.

    A missing folder is reported on stderr.
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
