"""torch.hub entry points: networks with the bundled weights.

network = torch.hub.load('OWNER/REPOSITORY', 'rain')    # or raindrop, haze; device=, dtype= as in ast_plugin.load
"""

from ast_plugin import load as _load

dependencies = ['torch', 'einops', 'numpy', 'safetensors']


def rain(**options):
    """Return the network that removes rain streaks: RGB [B, 3, H, W] in [0, 1], any size; see `ast_plugin.load`."""
    return _load('rain', **options)


def raindrop(**options):
    """Return the network that removes raindrops on a window or lens; see `ast_plugin.load`."""
    return _load('raindrop', **options)


def haze(**options):
    """Return the network that removes haze; see `ast_plugin.load`."""
    return _load('haze', **options)
