"""Datasets as they are distributed: found, checked picture by picture, listed in manifests; photographs gathered."""
