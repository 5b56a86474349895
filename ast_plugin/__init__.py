"""AST, the Adaptive Sparse Transformer, as a plugin for BasicSR.

Importing this package makes its networks, models, datasets and losses known to BasicSR's registries, and makes
BasicSR 1.4.2 run on today's torch and torchvision. Nothing heavy is imported for that: both happen when BasicSR is
imported, or at once if it already is. `ast_plugin.ops` works without BasicSR.
"""

from ast_plugin import import_hook

__version__ = '0.1.0'

import_hook.install()
