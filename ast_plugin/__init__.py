"""AST, the Adaptive Sparse Transformer, as a plugin for BasicSR.

Importing this package registers its networks, models, datasets, losses and metrics with BasicSR, and makes BasicSR
1.4.2 run on current versions of torch and torchvision. Both happen when BasicSR is imported, or immediately if it
already is, so this package imports nothing heavy. `ast_plugin.ops` works without BasicSR.

`ast_plugin.load('rain')` calls `ast_plugin.weights.load`, which builds a network with bundled weights.
"""

from ast_plugin import registration

__version__ = '0.1.0'

registration.install()


def __getattr__(name):  # lazy: `load` needs torch, `import ast_plugin` does not
    if name == 'load':
        from ast_plugin.weights import load

        return load
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
