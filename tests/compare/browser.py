"""A real browser for tests: headless Chromium, spoken to through its debugging pipe."""

from __future__ import annotations

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = ('chromium', 'chromium-browser', 'google-chrome')
_SECONDS = 60.0


def find() -> str | None:
    """The program, if there is one."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One page in a window.

    Attributes:
        requests: every address that the page has asked for.
        complaints: what the page's scripts and the browser have said of it, warnings and errors.
    """

    def __init__(self, folder: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._numbers = itertools.count(1)
        self._buffer = b''
        command_read, self._write = os.pipe()
        self._read, answer_write = os.pipe()

        def connect() -> None:  # the browser reads commands from 3 and answers to 4
            os.dup2(command_read, 13)
            os.dup2(answer_write, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)

        self._process = subprocess.Popen(
            [
                find(),
                '--headless',
                '--no-sandbox',
                '--disable-gpu',
                '--hide-scrollbars',
                '--remote-debugging-pipe',
                f'--user-data-dir={folder}',
                f'--window-size={width},{height}',
                'about:blank',
            ],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(command_read)
        os.close(answer_write)
        target = self._send('Target.createTarget', url='about:blank')['targetId']
        self._session = None
        self._session = self._send('Target.attachToTarget', targetId=target, flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log'):
            self._send(f'{domain}.enable')
        size = {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': width < 600}
        self._send('Emulation.setDeviceMetricsOverride', **size)
        scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
        self._send('Emulation.setEmulatedMedia', features=[scheme])

    _session: str | None = None

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: Any) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def open(self, path: Path) -> None:
        """Show a file, and wait until it is there."""
        self._send('Page.navigate', url=path.as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self._send('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in answer, answer['exceptionDetails']
        return answer['result'].get('value')

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _SECONDS
        while not self.evaluate(expression):
            assert time.monotonic() < end, f'{expression} did not come true'
            time.sleep(0.05)

    def press(self, key: str, text: str = '') -> None:
        """Press and release a key."""
        for kind in ('keyDown', 'keyUp'):
            self._send(
                'Input.dispatchKeyEvent', type=kind, key=key, **({'text': text} if kind == 'keyDown' and text else {})
            )

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag the mouse from one place of the window to another."""
        for kind, (x, y) in (('mousePressed', start), ('mouseMoved', end), ('mouseReleased', end)):
            self._send('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', buttons=1, clickCount=1)

    def touch(self, *steps: list[tuple[float, float]]) -> None:
        """Put fingers down at the places of the first step, move them through the others, and lift them."""
        kinds = ['touchStart', *['touchMove'] * (len(steps) - 1)]
        for kind, places in zip(kinds, steps, strict=True):
            points = [{'x': x, 'y': y, 'id': number} for number, (x, y) in enumerate(places)]
            self._send('Input.dispatchTouchEvent', type=kind, touchPoints=points)
        self._send('Input.dispatchTouchEvent', type='touchEnd', touchPoints=[])

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self._send('Page.captureScreenshot', captureBeyondViewport=True)['data'])

    def _send(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {'id': number, 'method': method, 'params': parameters}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        end = time.monotonic() + _SECONDS
        while True:
            answer = self._receive(end)
            if answer.get('id') == number:
                assert 'error' not in answer, f'{method}: {answer["error"]}'
                return answer['result']
            self._note(answer)

    def _receive(self, end: float) -> dict[str, Any]:
        while b'\0' not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, 'the browser does not answer'
            chunk = os.read(self._read, 2**16)
            assert chunk, 'the browser has ended'
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b'\0')
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, content = event.get('method'), event.get('params', {})
        if method == 'Network.requestWillBeSent':
            self.requests.append(content['request']['url'])
        elif method == 'Runtime.exceptionThrown':
            self.complaints.append(content['exceptionDetails']['text'])
        elif method == 'Log.entryAdded' and content['entry']['level'] in ('warning', 'error'):
            self.complaints.append(content['entry']['text'])
        elif method == 'Runtime.consoleAPICalled' and content['type'] in ('warning', 'error'):
            self.complaints.append(str(content['args']))
