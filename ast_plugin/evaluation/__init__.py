"""Restore images with a network and measure the results: tiling, protocols, metrics, tables."""
