"""Show what can be named in an option file, registry by registry, and where each thing comes from.

basicsr list              everything
basicsr list arch loss    networks and losses only
"""

from __future__ import annotations

import argparse

from ast_plugin.errors import OptionError, did_you_mean


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr list`."""
    parser.add_argument('registry', nargs='*', help='arch, dataset, loss, metric or model; all if none is given')


def run(args: argparse.Namespace) -> int:
    """Print the registries."""
    from ast_plugin.models import registries

    kinds = [_kind(name, registries.KINDS) for name in args.registry] or list(registries.KINDS)
    registered = registries.load_registered()
    for number, kind in enumerate(kinds):
        rows = _rows(registered.by_kind[kind])
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        print(('\n' if number else '') + f'{kind} ({len(rows)})')
        for name, module, distribution in rows:
            print(f'  {name:{widths[0]}}  {module:{widths[1]}}  {distribution}'.rstrip())
    return 0


def _kind(name: str, kinds: tuple[str, ...]) -> str:
    """The registry meant by `arch`, `archs`, `ARCH_REGISTRY` or `losses`."""
    wanted = name.lower().removesuffix('_registry')
    for kind in kinds:
        if wanted in (kind, f'{kind}s', f'{kind}es'):
            return kind
    raise OptionError(f'no registry {name}{did_you_mean(wanted, kinds)} (there are {", ".join(kinds)})')


def _rows(registry: dict[str, object]) -> list[tuple[str, str, str]]:
    """Name, module and distribution of each entry."""
    from importlib.metadata import packages_distributions, version

    distributions = packages_distributions()
    rows = []
    for name, item in sorted(registry.items(), key=lambda pair: pair[0].lower()):
        module = getattr(item, '__module__', '')
        # A distribution that was installed twice is named twice.
        owners = dict.fromkeys(distributions.get(module.split('.')[0], ()))
        rows.append((name, module, ', '.join(f'{owner} {version(owner)}' for owner in owners)))
    return rows
