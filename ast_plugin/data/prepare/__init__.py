"""Datasets as they are distributed: found, checked image by image, listed in manifests; photos gathered."""
