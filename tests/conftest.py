"""Fixtures of all tests: fixed seeds, no network access, the selected device, and one table of tolerances."""

import importlib.util
import os
import random
import shutil
import signal
import socket

import numpy as np
import pytest

# With small tensors, a second thread gains a tenth on an idle machine and is many times slower on a busy one. Set
# before torch is imported, and inherited by child processes.
os.environ.setdefault('OMP_NUM_THREADS', '1')

import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # inherited by background jobs of a shell, and by child processes
    signal.signal(signal.SIGINT, signal.default_int_handler)

if importlib.util.find_spec('triton') and not torch.cuda.is_available():
    # Triton's functions are interpreted only if the variable is set at its first import, such as by torch._dynamo.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TRITON_INTERPRET', '1')
        importlib.import_module('triton.language')

SEED = 20240617
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
TOLERANCES = {  # of ‖got − want‖ / ‖want‖, by the dtype of the computation
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 3e-2,
}


def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', help='where the tests of tensors run: cpu (default), cuda, cuda:1 …')


@pytest.fixture(scope='session')
def device(request) -> torch.device:
    """Return the device selected by `--device`."""
    return torch.device(request.config.getoption('--device'))


@pytest.fixture(scope='session')
def browser():
    """Yield Debian's Chromium, controlled by playwright."""
    playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    if CHROMIUM is None:
        pytest.skip('no Chromium here: apt-get install chromium')
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])


@pytest.fixture(scope='session')
def tolerances() -> dict[torch.dtype, float]:
    """Return relative tolerances, ‖got − want‖ / ‖want‖, by dtype."""
    return dict(TOLERANCES)


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 (BasicSR draws from the global generator)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Block all sockets except loopback, which distributed runs need."""

    def guarded(connect):
        def check(self, address):
            local = self.family == getattr(socket, 'AF_UNIX', None) or address[0] in ('localhost', '::1')
            if not local and not str(address[0]).startswith('127.'):
                raise AssertionError(f'a test asked for the network: {address}')
            return connect(self, address)

        return check

    monkeypatch.setattr(socket.socket, 'connect', guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, 'connect_ex', guarded(socket.socket.connect_ex))
