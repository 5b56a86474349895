"""Losses of image restoration: functions that do the mathematics, and thin Modules that BasicSR builds by name."""
