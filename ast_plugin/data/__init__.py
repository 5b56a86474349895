"""Datasets of degraded/clean image pairs: layouts, matching, image files, augmentation, synthesis and preparation."""
