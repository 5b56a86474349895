"""Restore the behaviour of `exec` before Python 3.13: names defined in a function become its local names.

tools/bootstrap.py puts this folder on the path for the build of BasicSR only. BasicSR's setup.py reads its version with
`exec(...)` followed by `locals()['__version__']`. Since Python 3.13 (PEP 667) `exec` works on a snapshot of the locals,
and the build fails with a KeyError (BasicSR#749). Passing the frame's write-through mapping to `exec` restores the
former behaviour without modifying BasicSR's source.
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
