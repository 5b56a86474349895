"""Serve a web page that restores an uploaded image and shows it next to the input.

Images are restored as by `basicsr infer`, one at a time. A downloaded result has the same name, size, format and
metadata. The page is accessible only from this machine unless --host is set, and makes no network requests. Its files
are kept in a temporary folder for at most two hours; the folder is deleted when the command ends (Ctrl-C).

    basicsr web                                                   # http://127.0.0.1:7860, bundled weights
    basicsr web --weights experiments/AST_derain/models/net_g_best.safetensors --port 8000

Requires the extra `web`: pip install "ast_plugin[web]".
"""

from __future__ import annotations

import argparse
import errno
import functools
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ast_plugin.cli.commands import DEVICES
from ast_plugin.errors import CheckpointError, DataError, OptionError, PluginError, one_line
from ast_plugin.names import printable, say

if TYPE_CHECKING:
    import numpy as np

    from ast_plugin.evaluation.restorer import Restorer

BYTES_A_PIXEL = 8  # 16-bit RGBA; image files do not exceed this
MAX_SHOWN = 2048  # longer side in pixels of the images on the page; downloads have the full size
SECONDS_KEPT = 7200
AT_WORK = threading.Lock()  # held while an image is restored
STYLE = """
.gradio-container { width: 100% !important; max-width: 960px !important; margin: auto; }
.fillable { padding: 8px !important; }
main { padding: 24px 8px !important; }
#figures { text-align: center; font-variant-numeric: tabular-nums; }
#figures p { margin: 4px 0; overflow-wrap: anywhere; }
#download { width: auto; min-width: 200px; margin: auto; }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `basicsr web`."""
    add = parser.add_argument
    add('--weights', metavar='FILE', help='weights file, .safetensors or .pth (default: bundled weights)')
    add('--device', default='auto', metavar='NAME', help=f'{DEVICES} (default: auto)')
    add(
        '--host',
        default='127.0.0.1',
        metavar='ADDRESS',
        help='address to listen on (default: 127.0.0.1); 0.0.0.0 makes the page accessible from the network',
    )
    add('--port', type=int, default=7860, metavar='N', help='port to listen on (default: 7860)')
    add(
        '--max-megapixels',
        type=float,
        default=50,
        metavar='N',
        help=f'reject larger images, and files of more than {BYTES_A_PIXEL} times N megabytes (default: 50)',
    )


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM."""
    max_pixels = int(args.max_megapixels * 1e6)
    if max_pixels < 1:
        raise OptionError(f'--max-megapixels is {args.max_megapixels}: expected more than 0')
    _check_address(args.host, args.port)
    networks = find_networks(args.weights, args.device)
    with tempfile.TemporaryDirectory(prefix='basicsr_web_', ignore_cleanup_errors=True) as folder:
        gradio = _import_gradio(folder, args.host)
        page = _build_page(gradio, networks, folder, max_pixels)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            page.launch(
                server_name=f'[{args.host}]' if ':' in args.host else args.host,
                server_port=args.port,
                max_file_size=max_pixels * BYTES_A_PIXEL,
                prevent_thread_lock=True,
                share=False,
                quiet=True,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                pwa=False,
                ssr_mode=False,
                mcp_server=False,
                theme=gradio.themes.Default(primary_hue='blue', font=['system-ui', 'sans-serif']),
                css=STYLE,
            )
            say(f'{page.local_url} (stop with Ctrl-C)')
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            say('stopped')
        finally:
            if page.is_running:
                # Browsers keep connections open; uvicorn logs each connection closed here as an error.
                logging.getLogger('uvicorn.error').disabled = page.server.force_exit = True
                page.close(verbose=False)
    if AT_WORK.locked():  # otherwise Python waits for the thread that is still restoring an image
        sys.stdout.flush()
        os._exit(0)
    return 0


def _check_address(host: str, port: int) -> None:
    """Raise OptionError if the address is unusable, before gradio is imported, which takes seconds.

    Gradio's own message does not state the reason.
    """
    if not 0 < port < 65536:
        raise OptionError(f'--port is {port}: expected 1 to 65535')
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except OSError as error:
        reason = (error.strerror or one_line(error)).partition(' (')[0]  # without the address
        advice = 'choose another --port' if error.errno == errno.EADDRINUSE else 'expected an address of this machine'
        raise OptionError(f'cannot listen on --host {host} --port {port} ({reason}): {advice}') from None


def find_networks(weights: str | None, device: str) -> dict[str, Callable[[], Restorer]]:
    """Return a function that builds the restorer, for each task or for the weights file, by name."""
    from ast_plugin.devices import find_device
    from ast_plugin.evaluation.restorer import Restorer
    from ast_plugin.weights import TASKS, find_weights, resolve_weights

    if weights is not None:
        restorer = Restorer.from_weights(resolve_weights(weights), device=device)
        for note in restorer.notes:
            say(f'note: {weights}: {note}', file=sys.stderr)
        return {Path(weights).name: lambda: restorer}
    find_device(device)
    networks = {}
    for task in TASKS:
        try:
            find_weights(task)
        except CheckpointError:
            continue  # `basicsr list weights` reports the reason
        networks[task] = functools.cache(functools.partial(Restorer.from_task, task, device=device))
    if not networks:
        raise OptionError('this installation has no bundled weights: expected --weights FILE')
    return networks


def _import_gradio(folder: str, host: str) -> ModuleType:
    """Import gradio with its files in `folder` and analytics disabled."""
    direct = ','.join(filter(None, [os.environ.get('no_proxy') or os.environ.get('NO_PROXY'), host, 'localhost']))
    os.environ |= {'no_proxy': direct, 'NO_PROXY': direct}  # gradio requests its own page at startup
    os.environ |= {'GRADIO_TEMP_DIR': folder, 'GRADIO_ANALYTICS_ENABLED': 'False'}
    try:
        import gradio
    except ImportError as error:
        raise OptionError(
            f'basicsr web requires gradio, which cannot be imported ({one_line(error)}): pip install "ast_plugin[web]"'
        ) from None
    return gradio


def _build_page(gradio: ModuleType, networks: dict[str, Callable[[], Restorer]], folder: str, max_pixels: int) -> Any:
    from ast_plugin.evaluation.file_restorer import FORMAT_OF

    nothing = gradio.update(visible=False)

    def update(image: str | None, network: str, progress=gradio.Progress()) -> tuple[Any, str, Any]:  # noqa: B008
        slider, download, lines = nothing, nothing, []
        try:
            if image is not None:
                with AT_WORK:
                    target, shown, lines = _restore(
                        Path(image),
                        folder,
                        networks[network](),
                        max_pixels,
                        lambda *tiles: progress(tiles, unit='tiles'),
                    )
                lines[0] = f'{network}: {lines[0]}'
                slider = gradio.update(value=shown, visible=True)
                download = gradio.update(value=str(target), visible=True)
        except PluginError as error:
            lines = [f'error: {error}']
        lines = [escape(printable(line.replace(image, Path(image).name))) for line in lines]
        return slider, ''.join(f'<p>{line}</p>' for line in lines), download

    with gradio.Blocks(title='Restore an image', analytics_enabled=False, delete_cache=(600, SECONDS_KEPT)) as page:
        gradio.Markdown('# Restore an image\nThe slider shows the input on the left and the result on the right.')
        network = gradio.Radio(
            list(networks),
            value=next(iter(networks)),
            visible=len(networks) > 1,
            label='Task',
            show_label=False,
            container=False,
        )
        image = gradio.File(file_types=list(FORMAT_OF), show_label=False, height=260)
        slider = gradio.ImageSlider(
            visible=False, format='png', show_label=False, buttons=['fullscreen'], max_height=520, interactive=False
        )
        figures = gradio.HTML(elem_id='figures')
        download = gradio.DownloadButton('Download', visible=False, variant='primary', elem_id='download')
        # Hide the previous result immediately: it does not belong to the new selection.
        gone = gradio.on(
            [image.change, network.input],
            lambda: (nothing, nothing),
            outputs=[slider, download],
            queue=False,
            show_progress='hidden',
            api_visibility='private',
        )
        gone.then(
            update,
            [image, network],
            [slider, figures, download],
            show_progress_on=figures,
            concurrency_limit=1,
            trigger_mode='always_last',
            api_visibility='private',
        )
    return page.queue(max_size=20, api_open=False)


def _restore(
    image: Path, folder: str, restorer: Restorer, max_pixels: int, on_tile: Callable[[int, int], None]
) -> tuple[Path, tuple[np.ndarray, ...], list[str]]:
    """Restore a file as `basicsr infer` does.

    Returns:
        The file of the result; image and result for display, uint8 RGB of equal size; lines of text about them.
    Raises:
        PluginError: if the image cannot be restored.
    """
    from ast_plugin.data.contact_sheet import make_thumbnails
    from ast_plugin.data.image_files import read_image
    from ast_plugin.evaluation.file_restorer import find_images, plan_jobs, restore_files

    output = Path(tempfile.mkdtemp(dir=folder))
    jobs = plan_jobs(find_images([image], output).images, output)
    (result,) = restore_files(jobs, restorer, max_pixels=max_pixels, on_tile=on_tile)
    if result.failure:
        raise DataError(result.failure)
    colors = [read_image(path, max_pixels=sys.maxsize).color for path in result.job]
    height, width = colors[0].shape[:2]
    eight_bits = [(color >> 8).astype('uint8') if color.dtype == 'uint16' else color for color in colors]
    change = '' if result.change is None else f', mean change {result.change.mean:.1f} of 255 levels'
    figures = f'{width} × {height} pixels, {result.seconds:.1f} s{change}'
    warnings = [f'warning: {line}' for line in result.warnings]
    notes = [f'note: {line}' for line in result.notes]
    return result.job.target, make_thumbnails(eight_bits, MAX_SHOWN), [figures, *warnings, *notes]
