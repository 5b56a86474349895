"""Restoration of images and measurement of the results: tiling, protocols, metrics and tables."""
