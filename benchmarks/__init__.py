"""Benchmarks of this project and their records; not part of the installed package."""

import ast_plugin
