"""The page of a comparison: all in one file, no name runs as a script, and in a real browser it does what it says."""

import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ast_plugin.compare import plots, report
from ast_plugin.compare.results import Results, Row
from tests.compare import browser
from tests.compare.test_plots import curves, results

HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>"\'&'
COLOURS = {'input': (200, 30, 30), 'AST': (30, 200, 30), 'SwinIR': (30, 30, 200), 'clean': (230, 230, 230)}


class Page(HTMLParser):
    """Gathers tags that open and what they refer to; complains of what is not closed."""

    VOID = {'meta', 'link', 'img', 'input', 'br', 'path', 'use'}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.refers = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.refers += [value for name, value in attributes if name in ('src', 'href', 'xlink:href') and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def write(folder, found=None, size=(600, 400)):
    found = found or results()
    pictures = []
    for name in found.images:
        files = {}
        for source, colour in COLOURS.items():
            path = folder / f'{source}_{len(pictures)}.png'
            array = np.full((size[1], size[0], 3), colour, np.uint8)
            Image.fromarray(array).save(path)
            files[source] = path
        pictures.append(report.ImageFile(name, files))
    drawn = plots.draw_all(found, curves(), 'val/psnr')
    path = folder / 'report.html'
    path.write_text(report.write_page(found, pictures, drawn, [('Data', 'a & b <c>')]), encoding='utf-8')
    return path


def test_all_in_one_file(tmp_path):
    page = Page(write(tmp_path).read_text(encoding='utf-8'))
    assert page.open == []
    assert all(reference.startswith(('data:', '#')) for reference in page.refers)
    ids = [attributes['id'] for _, attributes in page.tags if 'id' in attributes]
    assert len(ids) == len(set(ids))
    used = {reference[1:] for reference in page.refers if reference.startswith('#')}
    assert used and used <= set(ids)


def test_nothing_in_a_name_runs(tmp_path):
    found = Results(HOSTILE, [Row('input', values={HOSTILE: {HOSTILE: 1.0}}), Row(HOSTILE, HOSTILE, failed=HOSTILE)])
    text = report.write_page(found, [], [], [(HOSTILE, HOSTILE)])
    page = Page(text)
    assert [tag for tag, _ in page.tags].count('script') == 2
    assert not any(name.startswith('on') for _, attributes in page.tags for name in attributes)
    assert text.count(html.escape(HOSTILE)) >= 7
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data)['pictures'] == []


def test_what_failed_is_said_first(tmp_path):
    found = results()
    found.rows[-1].values, found.rows[-1].failed = {}, 'training: the loss is nan'
    text = write(tmp_path, found).read_text(encoding='utf-8')
    assert '<b>MSRResNet</b> failed, training: the loss is nan' in text[: text.index('<table')]
    assert '4 networks on 2 pictures. Best psnr: <b>AST</b>' in text


def test_networks_that_the_pictures_do_not_tell_apart_are_named():
    rows = [
        Row('A', values={'a': {'psnr': 30.0}, 'b': {'psnr': 31.0}}),
        Row('C', values={'a': {'psnr': 20.0}, 'b': {'psnr': 21.0}}),
    ]
    rows.append(Row('B', values={'a': {'psnr': 31.0}, 'b': {'psnr': 29.9}}))
    text = report.write_page(Results('x', rows), [], [], [])
    assert 'not to be told from it: B.' in text


@pytest.fixture
def shown(tmp_path, request):
    if browser.find() is None:
        pytest.skip('no Chromium here: apt-get install chromium')
    options = getattr(request, 'param', {})
    path = write(tmp_path)
    with browser.Browser(tmp_path / 'profile', **options) as window:
        window.open(path)
        window.wait("document.getElementById('image-left').naturalWidth === 600")
        yield window


def box(window, name):
    found = f"document.getElementById('{name}').getBoundingClientRect()"
    return [window.evaluate(f'{found}.{side}') for side in ('left', 'top', 'width', 'height')]


def placed(window, side) -> str:
    return window.evaluate(f"document.getElementById('image-{side}').style.transform")


def split(window) -> float:
    return float(window.evaluate("document.getElementById('split').value"))


def zoom(window) -> float:
    return float(window.evaluate("parseFloat(document.getElementById('zoom').textContent)"))


def colour_at(window, share) -> tuple[int, ...]:
    """What is to be seen in the middle of the stage's height, at a share of its width."""
    import io

    left, top, width, height = box(window, 'stage')
    x, y = window.evaluate('scrollX') + left + share * width, window.evaluate('scrollY') + top + 0.4 * height
    image = Image.open(io.BytesIO(window.screenshot())).convert('RGB')
    return image.getpixel((round(x), round(y)))


def is_near(colour, name) -> bool:
    return max(abs(a - b) for a, b in zip(colour, COLOURS[name], strict=True)) < 40


def test_in_a_browser(shown):
    """One picture left of the bar, another right of it, moved by mouse and by keys; it zooms; tables are sorted."""
    shown.evaluate("document.getElementById('stage').scrollIntoView({block: 'center'})")
    assert is_near(colour_at(shown, 0.2), 'input')  # the best network against the input
    assert is_near(colour_at(shown, 0.8), 'AST')
    left, top, width, height = box(shown, 'stage')
    shown.drag((left + 0.5 * width, top + 0.3 * height), (left + 0.9 * width, top + 0.3 * height))
    assert split(shown) == pytest.approx(90, abs=1)
    assert is_near(colour_at(shown, 0.8), 'input')

    shown.evaluate("document.getElementById('stage').focus()")
    shown.press('ArrowLeft')
    assert split(shown) == pytest.approx(88, abs=1)
    shown.press(' ', ' ')  # swaps
    assert is_near(colour_at(shown, 0.2), 'AST')

    whole = zoom(shown)
    shown.press('+', '+')
    assert zoom(shown) == pytest.approx(1.5 * whole, rel=0.02)
    before = placed(shown, 'left')
    shown.drag((left + 0.5 * width, top + 0.5 * height), (left + 0.4 * width, top + 0.4 * height))
    assert placed(shown, 'left') != before
    assert split(shown) == pytest.approx(88, abs=1)  # it was moved, not the bar
    assert placed(shown, 'left') == placed(shown, 'right')
    shown.press('0', '0')
    assert zoom(shown) == pytest.approx(whole, rel=0.02)

    cells = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[0]"
    names = f'{cells}.firstChild.textContent.trim())'
    assert shown.evaluate(names)[:2] == ['input', 'AST']
    shown.evaluate("[...document.querySelectorAll('thead button')].find(b => b.textContent === 'psnr').click()")
    assert shown.evaluate(names)[0] == 'MSRResNet'
    shown.evaluate("[...document.querySelectorAll('thead button')].find(b => b.textContent === 'psnr').click()")
    assert shown.evaluate(names)[0] == 'AST'
    assert shown.evaluate("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == 'descending'

    assert shown.complaints == []
    assert all(address.startswith(('file:', 'data:')) for address in shown.requests)


@pytest.mark.parametrize('shown', [{'width': 400, 'height': 800, 'dark': True}], indirect=True)
def test_on_a_phone_in_the_dark(shown):
    """Fingers move the bar and zoom; nothing is wider than the screen; dark is dark, until the button says light."""
    shown.evaluate("document.getElementById('stage').scrollIntoView({block: 'center'})")
    left, top, width, height = box(shown, 'stage')
    middle = top + 0.4 * height
    shown.touch([(left + 0.5 * width, middle)], [(left + 0.3 * width, middle)], [(left + 0.2 * width, middle)])
    assert split(shown) == pytest.approx(20, abs=2)
    whole = zoom(shown)
    near = [(left + 0.4 * width, middle), (left + 0.6 * width, middle)]
    far = [(left + 0.2 * width, middle), (left + 0.8 * width, middle)]
    shown.touch(near, far)
    assert zoom(shown) > 2 * whole
    assert shown.evaluate('document.documentElement.scrollWidth') <= 400
    background = 'getComputedStyle(document.body).backgroundColor'
    assert shown.evaluate(background) == 'rgb(21, 23, 26)'
    shown.evaluate("document.getElementById('theme').click()")
    assert shown.evaluate(background) == 'rgb(255, 255, 255)'
    assert shown.complaints == []


def test_every_control_has_a_name(shown):
    shown._send('Accessibility.enable')
    nodes = shown._send('Accessibility.getFullAXTree')['nodes']
    roles = ('button', 'combobox', 'slider', 'image', 'region')
    named = [(node['role']['value'], node.get('name', {}).get('value')) for node in nodes if node.get('role')]
    nameless = [role for role, name in named if role in roles and not name]
    assert [role for role, _ in named if role == 'slider'] and not nameless
    assert ('group', 'Two restorations of one picture, divided by a bar') in named
