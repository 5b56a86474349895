"""Fixtures for the tests of networks."""

import pytest


@pytest.fixture
def registered(monkeypatch):
    """Register networks for one test."""
    from basicsr.utils.registry import ARCH_REGISTRY

    def register(**networks):
        for name, network in networks.items():
            monkeypatch.setitem(ARCH_REGISTRY._obj_map, name, network)

    return register
