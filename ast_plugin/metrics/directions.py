"""Which way a metric is better, where an option file does not say."""

from collections.abc import Mapping
from typing import Any

from ast_plugin.metrics.pyiqa_metric import lower_is_better

_LOWER = ('calculate_niqe', 'calculate_fid')


def better(options: Mapping[str, Any]) -> str:
    """Return 'higher' or 'lower' for the options of a metric: its `better`, else what is known of its `type`.

    Raises:
        BackendUnavailable, OptionError: if it is of pyiqa, and that is not there or has no such metric.
    """
    if options.get('better'):
        return options['better']
    if options['type'] == 'pyiqa':
        return 'lower' if lower_is_better(options['metric']) else 'higher'
    return 'lower' if options['type'] in _LOWER else 'higher'
