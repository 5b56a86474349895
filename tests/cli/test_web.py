"""The page of `basicsr web` in a real browser: downloads equal the files of `basicsr infer`, and no files remain."""

import importlib.util
import io
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ast_plugin.archs.ast_arch import AST
from ast_plugin.checkpoints import save_weights
from ast_plugin.data.image_files import read_image

from ..data.images import noise
from ..docs.pages import ROOT
from ..weights.helpers import TINY

SERVE = """
import os, signal, sys, tempfile, time
seen = open(sys.argv.pop(1), 'w', buffering=1)
def watch(event, args):
    if event == 'open' and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        print('wrote', os.path.abspath(args[0]), file=seen)
    elif event in ('socket.connect', 'socket.getaddrinfo'):
        address = args[1] if event == 'socket.connect' else args
        print('asked', address if isinstance(address, str) else address[0], file=seen)
import torch, matplotlib.font_manager  # these write their own caches
tempfile.gettempdir()  # tests whether the folder is writable
from ast_plugin.cli.main import main
from ast_plugin.evaluation import file_restorer
real = file_restorer.restore_files
def restore_files(jobs, *args, **kwargs):
    print('begins', file=seen)
    time.sleep(600 if 'endless' in str(jobs[0].source) else 1)
    yield from real(jobs, *args, **kwargs)
    print('ends', file=seen)
file_restorer.restore_files = restore_files
sys.addaudithook(watch)
sys.exit(main(['web', *sys.argv[1:]]))
"""


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Weights that change every image, and valid, large and broken images."""
    folder = tmp_path_factory.mktemp('files')
    torch.manual_seed(0)
    options = {key: value for key, value in TINY.items() if key != 'type'}
    save_weights(folder / 'weights.safetensors', AST(**options).state_dict(), TINY)
    exif = Image.Exif()
    exif[0x010F] = 'a camera'
    exif[0x0112] = 6  # rotated
    for name in ('photo.jpg', 'endless.jpg'):
        Image.fromarray(noise(90, 130, 3)).save(folder / name, exif=exif, dpi=(300, 300))
    Image.fromarray(noise(70, 50, 3)).save(folder / 'a <b>&.png')
    Image.fromarray(np.zeros((1000, 1100), np.uint8)).save(folder / 'large.png')
    (folder / 'huge.png').write_bytes((folder / 'large.png').read_bytes() + bytes(9_000_000))
    (folder / 'broken.png').write_bytes((folder / 'a <b>&.png').read_bytes()[:2000])
    return folder


class Server:
    """`basicsr web` in a separate process with its own folders, and a log of opened files and network requests."""

    def __init__(self, folder, weights):
        self.home, self.temporary, self.seen = folder / 'home', folder / 'temporary', folder / 'seen'
        for path in (self.home, self.temporary):
            path.mkdir()
        with socket.create_server(('127.0.0.1', 0)) as free:
            port = free.getsockname()[1]
        options = ['--weights', weights, '--port', str(port), '--max-megapixels', '1']
        self.process = subprocess.Popen(
            [sys.executable, '-c', SERVE, self.seen, *options],
            cwd=self.home,
            env={**os.environ, 'PYTHONPATH': str(ROOT), 'HOME': str(self.home), 'TMPDIR': str(self.temporary)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        first = self.process.stdout.readline()
        assert first.startswith('http://127.0.0.1:'), first + self.process.communicate()[0]
        self.address = first.split()[0]

    def lines(self, kind):
        rows = (line.partition(' ') for line in self.seen.read_text().splitlines())
        return [text for word, _, text in rows if word in kind]


@pytest.fixture(scope='module')
def server(files, tmp_path_factory):
    if importlib.util.find_spec('gradio') is None:
        pytest.skip('gradio is not installed: pip install "ast_plugin[web]"')
    server = Server(tmp_path_factory.mktemp('server'), files / 'weights.safetensors')
    yield server
    server.process.kill()


@pytest.fixture
def open_page(server, browser):
    """Open the page; `requests` lists the addresses that it requests."""
    contexts = []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.requests = []
        page.on('request', lambda request: page.requests.append(request.url))
        page.goto(server.address)
        page.locator('input[type=file]').wait_for(state='attached')
        return page

    yield open_page
    for context in contexts:
        context.close()


def drop(page, path):
    page.locator('input[type=file]').set_input_files(path)


def told(page):
    """Wait for the lines below the image and return them."""
    page.locator('#figures p').first.wait_for()
    return page.locator('#figures p').all_inner_texts()


def downloaded(page):
    with page.expect_download() as waiting:
        page.locator('#download').click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


@pytest.fixture
def inferred(basicsr, files, tmp_path):
    """Restore a file by `basicsr infer`, and return the path of the result."""
    more = ['-o', tmp_path, '--weights', files / 'weights.safetensors', '--device', 'cpu']
    return lambda name: basicsr('infer', '-i', files / name, *more) and tmp_path / name


def test_gives_what_infer_writes(server, open_page, files, inferred):
    page = open_page(viewport={'width': 420, 'height': 800}, color_scheme='dark')
    drop(page, files / 'photo.jpg')
    figures, *_ = told(page)
    assert figures.startswith('weights.safetensors: 90 × 130 pixels, ')  # upright
    expected = inferred('photo.jpg')
    assert downloaded(page) == ('photo.jpg', expected.read_bytes())
    for image, path in zip(page.locator('img').all(), (files / 'photo.jpg', expected), strict=True):
        answer = page.request.get(image.get_attribute('src'))
        np.testing.assert_array_equal(Image.open(io.BytesIO(answer.body())), read_image(path).color)
    assert page.evaluate('document.documentElement.scrollWidth') <= 420
    assert page.get_by_text('gradio', exact=False).count() == 0
    assert all(address.startswith((server.address, 'data:', 'blob:')) for address in page.requests)


def test_bad_files_are_named(open_page, files):
    page = open_page()
    for name, reason in (('broken.png', 'is damaged'), ('large.png', 'more than the 1 million allowed')):
        drop(page, files / name)
        (line,) = told(page)
        assert line.startswith(f'error: {name}: ') and reason in line
        assert page.locator('#download').count() == page.locator('img').count() == 0
        page.get_by_label('Clear').click()
        page.locator('#figures p').first.wait_for(state='detached')
    drop(page, files / 'huge.png')
    page.get_by_text('exceed the maximum allowed size').wait_for()
    with open(files / 'huge.png', 'rb') as file:  # checked on the server, too
        answer = page.request.post(
            f'{page.url}gradio_api/upload',
            multipart={'files': {'name': 'huge.png', 'mimeType': 'image/png', 'buffer': file.read()}},
        )
    assert answer.status == 413


def test_two_at_once(server, open_page, files, inferred):
    """Two pages get their own results, one after the other; names that are not valid text are preserved."""
    pages = {name: open_page() for name in ('photo.jpg', 'a <b>&.png')}
    for name, page in pages.items():
        drop(page, files / name)
    for name, page in pages.items():
        told(page)
        assert downloaded(page)[1] == inferred(name).read_bytes()
    turns = [line.split()[0] for line in server.seen.read_text().splitlines() if line in ('begins', 'ends')]
    assert turns[-4:] == ['begins', 'ends'] * 2


def test_ends_and_leaves_nothing(server, open_page, files):
    """Stops immediately during a restoration; it wrote only to its own folder and made no network requests."""
    page = open_page()
    drop(page, files / 'endless.jpg')
    page.get_by_text('processing').wait_for()
    (folder,) = server.temporary.glob('basicsr_web_*')
    server.process.send_signal(signal.SIGINT)
    output, _ = server.process.communicate(timeout=60)
    assert (output, server.process.returncode) == ('stopped\n', 0)
    assert not folder.exists()
    elsewhere = [path for path in server.lines({'wrote'}) if not path.startswith((str(folder), '/dev/'))]
    assert elsewhere == []
    assert set(server.lines({'asked'})) <= {'127.0.0.1', 'localhost'}


def test_port_taken(basicsr):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        _, err = basicsr('web', '--port', port, status=2)
    assert f'--port {port} (Address already in use): choose another --port' in err
