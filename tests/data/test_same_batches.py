"""Training gets the same batches, bit for bit, from files, their LMDB of PNG files and their LMDB of pixels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NUM_PAIRS, NUM_ITERATIONS = 200, 20


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='runs are forked')
def test_twenty_iterations_from_each(tmp_path):
    script = Path(__file__).with_name('trained_batches.py')
    arguments = [sys.executable, str(script), str(tmp_path), str(NUM_PAIRS), str(NUM_ITERATIONS)]
    environment = {**os.environ, 'PYTHONPATH': str(script.parents[2])}
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    files = report['files']
    assert len(files['batches']) == len(set(files['batches'])) == NUM_ITERATIONS
    assert set(files['dtypes']) == {'torch.uint8'}
    assert report['png'] == report['raw'] == files
