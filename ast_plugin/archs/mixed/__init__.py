"""Replacing modules of any registered network by blocks, according to rules."""
