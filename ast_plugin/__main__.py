"""`python -m ast_plugin`, the same as the console script `basicsr`."""

import sys

from ast_plugin.cli.main import main

if __name__ == '__main__':
    sys.exit(main())
