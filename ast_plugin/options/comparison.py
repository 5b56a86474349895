"""Compare files: an option file with a list of networks in the place of one, and what it stands for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ast_plugin.options.merging import merge

ENTRIES, SETTINGS = 'networks', 'compare'
INPUT = 'input'  # the row of the unrestored pictures
# Stands for a number of iterations that is found out by measuring, see `compare.minutes`.
UNKNOWN_LENGTH = 10**6

_OWN = (ENTRIES, SETTINGS)


def is_trained(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of `networks` is trained: where it has no weights, or says besides how."""
    return entry.get('weights') is None or entry.get('train') is not None


def expand_entry(opt: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The option file that an entry stands for: what all share, its network, and what its `train` changes.

    Args:
        opt: the options of a compare file.
        entry: one of its `networks`.
    Raises:
        OptionError: if what differs cannot be laid over what is shared.
    """
    shared = {key: value for key, value in opt.items() if key not in _OWN}
    expanded = merge(shared, {'train': entry['train']}) if entry.get('train') else copy.deepcopy(shared)
    expanded['name'] = entry.get('name')
    if entry.get('network_g') is not None:
        expanded['network_g'] = copy.deepcopy(entry['network_g'])
    settings = opt.get(SETTINGS)
    if isinstance(settings, Mapping) and settings.get('minutes') and isinstance(expanded.get('train'), dict):
        expanded['train'].setdefault('total_iter', UNKNOWN_LENGTH)
    paths = {'pretrain_network_g': entry.get('weights'), 'param_key_g': entry.get('param_key')}
    expanded['path'] = {key: value for key, value in paths.items() if value is not None}
    return expanded


def measured_dataset(opt: Mapping[str, Any]) -> str:
    """The key of the set that networks are compared on: the test set, or where there is none that of validation."""
    keys = [key for key in opt['datasets'] if key.startswith(('test', 'val'))]
    return next((key for key in keys if key.startswith('test')), keys[0])
