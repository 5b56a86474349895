"""Pairs of degraded and clean images: where they lie, how they are read, cut and turned, and how they are made."""
