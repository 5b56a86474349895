"""Commands that are modules of this package: listing them, and running one on what is left of the command line."""

import argparse
import importlib
from collections.abc import Mapping, Sequence

from ast_plugin.errors import did_you_mean


def listed(commands: Mapping[str, str]) -> str:
    """A line for each command with what it is for, as helps end with."""
    width = max(map(len, commands))
    return 'commands:\n' + '\n'.join(f'  {name:{width}}  {text}' for name, text in commands.items())


def unknown(name: str, commands: Mapping[str, str]) -> str:
    """Why there is no such command, and which there are."""
    return f'no command {name}{did_you_mean(name, commands)} (there are {", ".join(commands)})'


def run_module(module_name: str, prog: str, arguments: Sequence[str]) -> int:
    """Run a command's module, which has `add_arguments` and `run`; return its exit status.

    Args:
        module_name: below `ast_plugin.cli`; imported only now.
        prog: what the user has typed so far.
        arguments: what is left of it.
    """
    module = importlib.import_module(f'ast_plugin.cli.{module_name}')
    parser = argparse.ArgumentParser(
        prog=prog,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    return module.run(parser.parse_args(arguments))
