"""Let a plain `exec` in a function define local names again.

On the path of one build only, by tools/bootstrap.py. BasicSR's setup.py reads its version by `exec(...)` followed by
`locals()['__version__']`. Since Python 3.13 (PEP 667) `exec` works on a snapshot of the locals, and the build ends in a
KeyError (BasicSR#749). Handing `exec` the frame's own write-through mapping gives it its former meaning, and leaves
BasicSR's source as it is.
"""

import builtins
import functools
import sys

_exec = builtins.exec


@functools.wraps(_exec)
def _exec_in_frame(source, globals=None, locals=None, /, **options):
    if globals is None and locals is None:
        frame = sys._getframe(1)
        globals, locals = frame.f_globals, frame.f_locals
    elif globals is None:
        globals = sys._getframe(1).f_globals
    elif locals is None:
        locals = globals
    _exec(source, globals, locals, **options)


if sys.version_info >= (3, 13):
    builtins.exec = _exec_in_frame
