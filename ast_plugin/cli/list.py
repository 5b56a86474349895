"""List the registered names that an option file can use, per registry, with module and package.

basicsr list              all registries
basicsr list arch loss    networks and losses only
basicsr list weights      bundled weights, for `basicsr infer --task`
"""

from __future__ import annotations

import argparse
from importlib.metadata import packages_distributions, version

from ast_plugin.errors import CheckpointError, OptionError, did_you_mean
from ast_plugin.names import say, to_columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr list`."""
    parser.add_argument('registry', nargs='*', help='arch, dataset, loss, metric, model or weights (default: all)')


def run(args: argparse.Namespace) -> int:
    """Print the registries."""
    if args.registry == ['weights']:  # without BasicSR
        _say('weights', _weights())
        return 0
    from ast_plugin.models import preflight

    known = (*preflight.KINDS, 'weights')
    kinds = [_kind(name, known) for name in args.registry] or known
    registered = preflight.load_registered()
    for number, kind in enumerate(kinds):
        if number:
            say('')
        _say(kind, _weights() if kind == 'weights' else _rows(registered.by_kind[kind]))
    return 0


def _say(kind: str, rows: list[tuple[str, str, str]]) -> None:
    say(f'{kind} ({len(rows)})', *to_columns(rows, indent='  '))


def _weights() -> list[tuple[str, str, str]]:
    """Return a row per task: task, network, and size, results and origin of the bundled weights, or the error."""
    from ast_plugin import weights

    rows = []
    for task in weights.TASKS:
        try:
            size, card = weights.find_weights(task).stat().st_size, weights.read_card(task)
        except CheckpointError as error:
            rows.append((task, '-', str(error)))
            continue
        figures = ''.join(f', {name} {value:{"+" * ("gain" in name)}.1f} dB' for name, value in card['results'].items())
        origin = f'{card["recipe"]}, {card["steps"]} steps, {card["date"]}'
        rows.append((task, card['network']['type'], f'{size / 1e6:.1f} MB{figures} ({origin})'))
    return rows


def _kind(name: str, kinds: tuple[str, ...]) -> str:
    """Return the registry for a name such as `arch`, `archs`, `ARCH_REGISTRY` or `losses`."""
    wanted = name.lower().removesuffix('_registry')
    for kind in kinds:
        if wanted in (kind, f'{kind}s', f'{kind}es'):
            return kind
    raise OptionError(f'unknown registry {name}{did_you_mean(wanted, kinds)} (available: {", ".join(kinds)})')


def _rows(registry: dict[str, object]) -> list[tuple[str, str, str]]:
    """Return name, module and distribution of each entry."""
    distributions = packages_distributions()
    rows = []
    for name, item in sorted(registry.items(), key=lambda pair: pair[0].lower()):
        module = getattr(item, '__module__', '')
        # A distribution that is installed twice is listed twice.
        owners = dict.fromkeys(distributions.get(module.split('.')[0], ()))
        rows.append((name, module, ', '.join(f'{owner} {version(owner)}' for owner in owners)))
    return rows
