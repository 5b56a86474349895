"""Entry points of torch.hub: networks with the weights that come with the package.

network = torch.hub.load('OWNER/REPOSITORY', 'rain')    # or raindrop, haze; device=, dtype= as ast_plugin.load
"""

from ast_plugin import load as _load

dependencies = ['torch', 'einops', 'numpy', 'safetensors']


def rain(**options):
    """Return the network against rain streaks: RGB [B, 3, H, W] in [0, 1], of any size; see `ast_plugin.load`."""
    return _load('rain', **options)


def raindrop(**options):
    """Return the network against drops on a pane before the lens; see `ast_plugin.load`."""
    return _load('raindrop', **options)


def haze(**options):
    """Return the network against haze; see `ast_plugin.load`."""
    return _load('haze', **options)
