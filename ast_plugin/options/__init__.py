"""Option files: safe reading, validation against registered names, and completion for BasicSR's pipelines."""

from ast_plugin.options.reading import find, known_files, load, shipped_files, shipped_folder
from ast_plugin.options.runs import Stage, expand, phase_of, prepare, run_name

__all__ = [
    'Stage',
    'expand',
    'find',
    'known_files',
    'load',
    'phase_of',
    'prepare',
    'run_name',
    'shipped_files',
    'shipped_folder',
]
