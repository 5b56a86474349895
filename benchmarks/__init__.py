"""Benchmarks of this project, beside their records; not part of the installed package."""

import ast_plugin
