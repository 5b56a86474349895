"""Taking leave of the other processes."""

import subprocess
import sys

PROGRAM = """
import atexit, gc, tempfile, weakref
import torch.distributed as dist
from ast_plugin.models.processes import leave

gc.disable()
atexit.register(print, 'the interpreter ends')
with tempfile.TemporaryDirectory() as folder:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=0, world_size=1)
    class Cycle: pass
    holder = Cycle()
    holder.itself, holder.group = holder, dist.new_group([0])
    weakref.finalize(holder, print, 'its connection is gone').atexit = False
    leave()
    del holder
print(dist.is_initialized())
"""


def test_no_connection_outlives_the_interpreter():
    """Where gloo's threads do, now and then a process that has done its work ends by SIGABRT."""
    done = subprocess.run([sys.executable, '-c', PROGRAM], text=True, capture_output=True, timeout=120, check=True)
    assert done.stdout.split('\n')[:3] == ['False', 'its connection is gone', 'the interpreter ends']
