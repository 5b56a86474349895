"""AST, the Adaptive Sparse Transformer, as a plugin for BasicSR.

Importing this package makes its networks, models, datasets and losses known to BasicSR's registries, and makes
BasicSR 1.4.2 run on today's torch and torchvision. Nothing heavy is imported for that: both happen when BasicSR is
imported, or at once if it already is. `ast_plugin.ops` works without BasicSR.

`ast_plugin.load('rain')` is `ast_plugin.weights.load`: a network with the weights that come along.
"""

from ast_plugin import registration

__version__ = '0.1.0'

registration.install()


def __getattr__(name):  # `load` needs torch, which `import ast_plugin` does without
    if name == 'load':
        from ast_plugin.weights import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
