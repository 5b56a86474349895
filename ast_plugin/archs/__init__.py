"""Network architectures, their blocks, and weights files."""
