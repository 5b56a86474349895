"""Weights files and what they are of: `ast_plugin.weights_files`, and the network told by names and shapes."""

from collections.abc import Mapping
from contextlib import suppress

from torch import Tensor

from ast_plugin.archs.ast_state import infer_options
from ast_plugin.archs.spandrel_arch import recognise
from ast_plugin.errors import BackendUnavailable, CheckpointError, OptionError
from ast_plugin.weights_files import (
    TEMPORARY_SUFFIX,
    Checkpoint,
    load_into,
    read_checkpoint,
    save_torch,
    save_weights,
    write_atomically,
)

__all__ = [
    'TEMPORARY_SUFFIX',
    'Checkpoint',
    'infer_network',
    'load_into',
    'read_checkpoint',
    'save_torch',
    'save_weights',
    'write_atomically',
]


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
