"""Fixtures shared by the tests of commands."""

import pytest
import yaml

from ast_plugin.cli import main

from .. import tiny_run


@pytest.fixture
def run_on_network(tmp_path, capsys):
    """Run a command on an option file with the given network, and return status, output and errors."""
    opt = yaml.safe_load(tiny_run.OPTIONS)

    def run(command, network, *arguments):
        opt['network_g'] = network
        path = tmp_path / 'options.yml'
        path.write_text(yaml.safe_dump(opt, sort_keys=False), encoding='utf-8')
        status = main.main([command, '-opt', str(path), *arguments])
        return status, *capsys.readouterr()

    return run
