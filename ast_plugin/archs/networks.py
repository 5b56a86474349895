"""Networks that options or weights name, and the channels of the images that they take."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ast_plugin.archs.ast_arch import AST, AST_B, AST_T, AST_XS
from ast_plugin.archs.spandrel_arch import recognise
from ast_plugin.archs.state import infer_options
from ast_plugin.errors import (
    BackendUnavailable,
    CheckpointError,
    OptionError,
    PluginError,
    did_you_mean,
    one_line,
)
from ast_plugin.plugins import load_plugins

CHANNEL_KEYS = ('in_chans', 'num_in_ch', 'in_channels', 'in_ch', 'img_channel', 'inp_channels')
"""What networks call the number of channels that they take."""

_FALLBACK_SUFFIX = '_basicsr'  # under which BasicSR registers some of its own, and finds them without it


_OWN = {'AST': AST, 'AST_XS': AST_XS, 'AST_T': AST_T, 'AST_B': AST_B}  # found without importing BasicSR


def build_network(options: Mapping[str, Any]) -> nn.Module:
    """Build a registered network, without the toolbox's log lines.

    Args:
        options: `type`, the registered name, and the network's arguments.
    Raises:
        OptionError: if no such network is registered, or it does not take these arguments.
    """
    arguments = dict(options)
    name = arguments.pop('type', None)
    network = registered_network(name)
    try:
        return network(**arguments)
    except PluginError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AssertionError, RuntimeError) as error:
        # Networks of others check their arguments each in their own way.
        raise OptionError(f'the network {name} cannot be built with {arguments}: {one_line(error)}') from error


def registered_network(name: Any) -> Callable[..., nn.Module]:
    """Return what builds the network that is registered under a name, by BasicSR, by us or by a plugin.

    Raises:
        OptionError: if there is none; says what is near.
    """
    if isinstance(name, str) and name in _OWN:
        return _OWN[name]
    load_plugins()
    import basicsr.archs  # noqa: F401 - registers the toolbox's networks
    from basicsr.utils.registry import ARCH_REGISTRY

    for key in (name, f'{name}{_FALLBACK_SUFFIX}'):
        if key in ARCH_REGISTRY:
            return ARCH_REGISTRY.get(key)
    known = [key.removesuffix(_FALLBACK_SUFFIX) for key in ARCH_REGISTRY.keys()]  # noqa: SIM118 - not a dictionary
    raise OptionError(
        f'no network is registered as {name}{did_you_mean(str(name), known)} '
        '(is its plugin installed? `basicsr list arch` shows what there is)'
    )


def stated_channels(options: Mapping[str, Any], network: nn.Module | None = None) -> list[int]:
    """Channels of the pictures that a network takes, as its options or it itself say, the likeliest first."""
    given = [options[key] for key in CHANNEL_KEYS if isinstance(options.get(key), int)]
    own = [value for key in CHANNEL_KEYS if isinstance(value := getattr(network, key, None), int)]
    return [*given, *own]


def infer_network(state: Mapping[str, Tensor]) -> tuple[dict, list[str]]:
    """Read a network's options off the names and shapes of its weights.

    Returns:
        The options with their `type`, and a line for each that could not be told and was assumed. The network is an
        AST, or where spandrel is installed one that spandrel knows.
    Raises:
        CheckpointError: if the weights are of no such network.
    """
    try:
        options, assumed = infer_options(state)
    except CheckpointError:
        with suppress(OptionError, BackendUnavailable):
            return recognise(state)
        raise
    return {'type': 'AST', **options}, assumed
