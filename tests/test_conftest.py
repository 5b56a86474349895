"""Tests of the test configuration."""

import socket

import pytest


def test_network_is_out_of_reach():
    with socket.socket() as plug, pytest.raises(AssertionError, match='asked for the network'):
        plug.connect(('192.0.2.1', 80))  # an address reserved for documentation


def test_loopback_is_open():
    with socket.create_server(('127.0.0.1', 0)) as server, socket.create_connection(server.getsockname()):
        pass
