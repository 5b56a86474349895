"""Comparison of networks: training, measurement and reports."""
