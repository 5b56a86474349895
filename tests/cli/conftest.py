"""Fixtures shared by the tests of commands."""

import pytest
import yaml

from ast_plugin.cli.main import main

from .. import tiny_run


@pytest.fixture
def basicsr(capfd):
    """Run the command in this process, check its exit status, and return what it writes to stdout and stderr."""

    def run(*arguments, status=0):
        capfd.readouterr()
        found = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert found == status, out + err
        assert 'Traceback' not in out + err
        return out, err

    return run


@pytest.fixture
def run_on_network(basicsr, tmp_path):
    """Run a command on an option file with the given network, and return its output and errors."""

    def run(command, network, *arguments, status=0):
        path = tmp_path / 'options.yml'
        opt = {**yaml.safe_load(tiny_run.OPTIONS), 'network_g': network}
        path.write_text(yaml.safe_dump(opt, sort_keys=False), encoding='utf-8')
        return basicsr(command, '-opt', path, *arguments, status=status)

    return run
