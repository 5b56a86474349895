"""Losses of image restoration, see `restoration_loss`."""
