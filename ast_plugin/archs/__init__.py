"""The network, its blocks, and what its weights files tell."""
