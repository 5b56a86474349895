"""Option files are checked here before anything starts: every fault at once, each with its key and what was meant."""

from ast_plugin.schema.checks import check, find_faults
from ast_plugin.schema.editors import json_schema
from ast_plugin.schema.registered import Registered

__all__ = ['Registered', 'check', 'find_faults', 'json_schema']
