"""Child processes of a comparison: output, failure reasons, and termination with their parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from ast_plugin.compare.child import ChildFailed, run_child
from ast_plugin.files import lock_folder

ROOT = Path(__file__).parents[2]


def run(tmp_path, monkeypatch, code: str, **options):
    (tmp_path / 'job.py').write_text(textwrap.dedent(code))
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    return run_child('job', ['a', 'b c'], tmp_path / 'log', **options)


def test_it_runs_the_module_with_its_arguments(tmp_path, monkeypatch):
    code = "import os, sys; print(__name__, sys.argv[1:], os.environ['OMP_NUM_THREADS'])"
    assert 0 < run(tmp_path, monkeypatch, code, threads=3) < 60
    assert (tmp_path / 'log').read_text() == "__main__ ['a', 'b c'] 3\n"


@pytest.mark.parametrize(
    ('code', 'reason'),
    [
        ("import sys; print('basicsr: error: no data', file=sys.stderr); sys.exit(2)", 'no data'),
        ("raise RuntimeError('all is lost')", 'RuntimeError: all is lost'),
        ('import os; os.kill(os.getpid(), 9)', 'terminated by SIGKILL, possibly out of memory'),
        ('import sys; sys.exit(3)', 'exit status 3'),
    ],
)
def test_reasons(tmp_path, monkeypatch, code, reason):
    (tmp_path / 'log').write_text('basicsr: error: of an earlier process\n')
    with pytest.raises(ChildFailed) as failed:
        run(tmp_path, monkeypatch, code)
    assert str(failed.value) == reason and failed.value.seconds > 0


def test_an_interruption_stops_it_and_waits(tmp_path, monkeypatch):
    code = """
        import pathlib, signal, sys, time
        def leave(*_):
            time.sleep(0.3)
            print('saved')
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        print('ready')
        time.sleep(60)
    """

    def interrupt(seconds):
        if 'ready' in (tmp_path / 'log').read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, monkeypatch, code, on_wait=interrupt)
    assert (tmp_path / 'log').read_text() == 'ready\nsaved\n'


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only Linux signals a process when its parent exits')
def test_parent_killed_child_saves_and_keeps_lock(tmp_path):
    (tmp_path / 'job.py').write_text(
        textwrap.dedent("""
        import os, pathlib, signal, sys, time
        def leave(*_):
            time.sleep(0.5)
            pathlib.Path(sys.argv[1], 'saved').touch()
            sys.exit(0)
        signal.signal(signal.SIGTERM, leave)
        pathlib.Path(sys.argv[1], 'pid').write_text(str(os.getpid()))
        time.sleep(60)
        """)
    )
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        from ast_plugin.compare.child import run_child
        from ast_plugin.files import lock_folder
        folder = Path(sys.argv[1])
        with lock_folder(folder, 'busy') as descriptors:
            run_child('job', [str(folder)], folder / 'log', keep_open=descriptors)
    """)
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(tmp_path)])}
    parent = subprocess.Popen([sys.executable, '-c', code, str(tmp_path)], env=environment)
    until(lambda: (tmp_path / 'pid').exists() and (tmp_path / 'pid').read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    with lock_folder(tmp_path, 'busy', patience=30.0):  # waits for the orphaned child, which holds the lock
        assert (tmp_path / 'saved').exists()


def until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'timed out'
        time.sleep(0.05)
