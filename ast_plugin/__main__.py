"""Entry point of `python -m ast_plugin`, equivalent to the console script `basicsr`."""

import sys

from ast_plugin.cli.main import main

if __name__ == '__main__':
    sys.exit(main())
