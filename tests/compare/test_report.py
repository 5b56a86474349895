"""Plots of a comparison without overlapping labels, and its self-contained HTML report in a browser."""

import html
import io
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ast_plugin.compare import report
from ast_plugin.compare.results import Results, Row

NAMES = ('AST', 'SwinIR', 'EDSR', 'RCAN', 'MSRResNet')
HOSTILE = '</script><script>alert(1)</script><img src=x onerror=alert(2)>"\'&'
COLOURS = {'input': (200, 30, 30), 'AST': (30, 200, 30), 'SwinIR': (30, 30, 200), 'clean': (230, 230, 230)}


def results(psnrs=(30.0, 29.9, 29.8, 29.7, 22.0), costs=(1e6, 1e6, 1e6, 2e6, 5e7)) -> Results:
    rows = [Row('input', values={'a': {'psnr': 22.0}, 'b': {'psnr': 23.0}})]
    for name, psnr, cost in zip(NAMES, psnrs, costs, strict=True):
        speed = {'macs': int(cost * 900), 'milliseconds': cost / 1e5, 'peak_bytes': 2**20, 'uncounted': {}}
        values = {'a': {'psnr': psnr - 1}, 'b': {'psnr': psnr + 1}}
        rows.append(Row(name, parameters=int(cost), speeds={(256, 256): speed}, values=values))
    return Results('test', rows)


def curves():
    iterations = np.arange(1, 301)
    return {
        name: {
            'l_pix': (iterations, 1 / iterations + 0.01 * number),
            'val/psnr': (np.array([100, 200, 300]), np.array([25.0, 27.0, 28.0 + 0.001 * number])),
        }
        for number, name in enumerate(NAMES)
    }


@pytest.fixture(scope='module')
def drawn():
    return report.draw_all(results(), curves(), 'val/psnr')


def test_all_drawings(drawn):
    costs = ('parameters', 'macs', 'latency', 'memory')
    names = [f'psnr_against_{cost}' for cost in costs] + ['training_loss', 'training_validation']
    assert [plot.name for plot in drawn] == names
    for plot in drawn:
        image = np.asarray(Image.open(io.BytesIO(plot.png)).convert('L'))
        assert image.shape[0] > 700 and 0.01 < (image < 128).mean() < 0.3
        assert plot.svg.count('<svg') == 1
        assert report.INK in plot.svg and report.GRID in plot.svg
        assert not re.search(r'20\d\d-\d\d-\d\d', plot.svg)
    found = results()
    for row in found.rows:
        row.speeds, row.parameters = {}, None
    validated = {name: {'val/psnr': columns['val/psnr']} for name, columns in curves().items()}
    assert report.draw_all(found, validated, 'val/psnr') == drawn[-1:]  # the same each time


@pytest.mark.parametrize('same', [False, True])
def test_names_do_not_cover_one_another(monkeypatch, same):
    boxes = []
    original = report._name_marks

    def spy(axis, marks, note):
        original(axis, marks, note)
        texts = [text for text in axis.texts if text.get_text() in NAMES]
        boxes.extend((text.get_text(), text.get_window_extent().shrunk(0.9, 0.9)) for text in texts)

    monkeypatch.setattr(report, '_name_marks', spy)
    found = results(psnrs=(30.0,) * 5, costs=(1e6,) * 5) if same else results()
    for row in found.rows:
        row.speeds = {}
    report.draw_all(found, {}, None)
    assert sorted(name for name, _ in boxes) == sorted(NAMES)
    assert not [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


def test_little_to_draw():
    assert report.draw_all(Results('none', [Row('input')]), {}, None) == []
    only_input = Results('one', [Row('input', values={'a': {'psnr': 22.0}})])
    assert report.draw_all(only_input, {}, None) == []
    one = results()
    one.rows = one.rows[:2]
    one.rows[1].speeds = {}
    assert [plot.name for plot in report.draw_all(one, {}, None)] == ['psnr_against_parameters']
    one.rows[1].values['a']['psnr'] = float('inf')  # a perfect result
    assert report.draw_all(one, {'AST': {'iter': (np.array([1]), np.array([1.0]))}}, 'val/psnr')


# ---- the report


class Page(HTMLParser):
    """Parser that collects tags and references and asserts that every tag is closed."""

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


def write(folder, drawn, size=(600, 400)):
    found = results()
    scenes = {}
    for number, name in enumerate(found.images):
        files = {source: folder / f'{source}_{number}.png' for source in COLOURS}
        for source, file in files.items():
            Image.fromarray(np.full((size[1], size[0], 3), COLOURS[source], np.uint8)).save(file)
        scenes[name] = files
    path = folder / 'report.html'
    path.write_text(report.render_page(found, scenes, drawn, [('Data', 'a & b <c>')]), encoding='utf-8')
    return path


@pytest.fixture(scope='module')
def file(tmp_path_factory, drawn):
    return write(tmp_path_factory.mktemp('report'), drawn)


def test_all_in_one_file(file):
    page = Page(file.read_text(encoding='utf-8'))
    assert page.open == []
    assert all(reference.startswith(('data:', '#')) for reference in page.refers)
    ids = [attributes['id'] for _, attributes in page.tags if 'id' in attributes]
    assert len(ids) == len(set(ids))
    used = {reference[1:] for reference in page.refers if reference.startswith('#')}
    assert used and used <= set(ids)


def test_names_are_escaped():
    found = Results(HOSTILE, [Row('input', values={HOSTILE: {HOSTILE: 1.0}}), Row(HOSTILE, HOSTILE, failed=HOSTILE)])
    text = report.render_page(found, {}, [], [(HOSTILE, HOSTILE)])
    page = Page(text)
    assert [tag for tag, _ in page.tags].count('script') == 2
    assert not any(name.startswith('on') for _, attributes in page.tags for name in attributes)
    assert html.unescape(text).count(HOSTILE) >= 7
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data)['pictures'] == []


def test_failures_stand_first():
    found = results()
    found.rows[-1].values, found.rows[-1].failed = {}, 'training: the loss is nan'
    text = report.render_page(found, {}, [], [])
    assert '<b>MSRResNet</b> failed while training: the loss is nan' in text[: text.index('<table')]
    assert '4 networks on 2 images. Best psnr: <b>AST</b>' in text


def test_networks_without_significant_difference():
    rows = [
        Row('A', values={'a': {'psnr': 30.0}, 'b': {'psnr': 31.0}}),
        Row('C', values={'a': {'psnr': 20.0}, 'b': {'psnr': 21.0}}),
        Row('B', values={'a': {'psnr': 31.0}, 'b': {'psnr': 29.9}}),
    ]
    assert 'Not significantly different on these images: B.' in report.render_page(Results('x', rows), {}, [], [])


# ---- in a browser


@pytest.fixture
def shown(browser, file, request):
    """Open the report in Chromium; `complaints` and `requests` collect its console messages and requests."""
    context = browser.new_context(**getattr(request, 'param', {'viewport': {'width': 1200, 'height': 900}}))
    page = context.new_page()
    page.complaints, page.requests = [], []
    page.on('pageerror', lambda error: page.complaints.append(str(error)))
    page.on('console', lambda message: page.complaints.append(message.text))
    page.on('request', lambda request: page.requests.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_function("document.getElementById('image-left').naturalWidth === 600")
    page.locator('#stage').scroll_into_view_if_needed()
    yield page
    context.close()


def split(page) -> float:
    return float(page.locator('#split').input_value())


def zoom(page) -> float:
    return float(page.locator('#zoom').text_content().removesuffix(' %'))


def placed(page, side) -> str:
    return page.locator(f'#image-{side}').get_attribute('style')


def drag(page, start, end):
    """Drag the mouse between two positions of the viewer, given as fractions of its width and height."""
    box = page.locator('#stage').bounding_box()
    (x, y), (to_x, to_y) = ((box['x'] + u * box['width'], box['y'] + v * box['height']) for u, v in (start, end))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(to_x, to_y)
    page.mouse.up()


def source_at(page, share) -> str:
    """Return the source that is visible at a fraction of the viewer's width."""
    image = Image.open(io.BytesIO(page.locator('#stage').screenshot())).convert('RGB')
    colour = np.array(image.getpixel((round(share * image.width), round(0.4 * image.height))), int)
    return min(COLOURS, key=lambda source: np.abs(colour - COLOURS[source]).max())


def test_images_are_compared(shown):
    """The divider moves by mouse and keys; both images zoom and pan together."""
    assert (source_at(shown, 0.2), source_at(shown, 0.8)) == ('input', 'AST')  # defaults: input, best
    drag(shown, (0.5, 0.3), (0.9, 0.3))
    assert split(shown) == pytest.approx(90, abs=1)
    assert source_at(shown, 0.8) == 'input'

    stage = shown.locator('#stage')
    stage.press('ArrowLeft')
    assert split(shown) == pytest.approx(88, abs=1)
    stage.press(' ')  # swaps
    assert source_at(shown, 0.2) == 'AST'
    shown.locator('#left').select_option('SwinIR')
    assert source_at(shown, 0.2) == 'SwinIR'

    whole = zoom(shown)
    stage.press('+')
    assert zoom(shown) == pytest.approx(1.5 * whole, rel=0.02)
    before = placed(shown, 'left')
    drag(shown, (0.5, 0.5), (0.4, 0.4))
    assert split(shown) == pytest.approx(88, abs=1)  # panned, the divider did not move
    assert placed(shown, 'left') != before and placed(shown, 'left') == placed(shown, 'right')
    stage.press('0')
    assert zoom(shown) == pytest.approx(whole, rel=0.02)
    assert shown.complaints == []
    assert all(address.startswith(('file:', 'data:')) for address in shown.requests)


def test_tables_are_sorted(shown):
    names = shown.locator('table').first.locator('tbody th')
    heading = shown.locator('table').first.locator('thead button', has_text=re.compile('^psnr$'))
    assert names.all_inner_texts()[:2] == ['input', 'AST']
    heading.click()
    assert names.all_inner_texts()[0] == 'MSRResNet'
    heading.click()
    assert names.all_inner_texts()[0] == 'AST'
    assert shown.locator('th[aria-sort]').get_attribute('aria-sort') == 'descending'


@pytest.mark.parametrize(
    'shown',
    [{'viewport': {'width': 400, 'height': 800}, 'color_scheme': 'dark', 'has_touch': True, 'is_mobile': True}],
    indirect=True,
)
def test_on_a_phone_in_the_dark(shown):
    """Touch moves the divider and zooms; the page fits the screen; dark mode until the button switches it."""
    box = shown.locator('#stage').bounding_box()
    fingers = shown.context.new_cdp_session(shown)

    def touch(*steps):
        for kind, shares in zip(
            ['touchStart', *['touchMove'] * (len(steps) - 1), 'touchEnd'], [*steps, []], strict=True
        ):
            points = [
                {'x': box['x'] + share * box['width'], 'y': box['y'] + 0.4 * box['height'], 'id': number}
                for number, share in enumerate(shares)
            ]
            fingers.send('Input.dispatchTouchEvent', {'type': kind, 'touchPoints': points})

    touch([0.5], [0.3], [0.2])
    assert split(shown) == pytest.approx(20, abs=2)
    whole = zoom(shown)
    touch([0.4, 0.6], [0.2, 0.8])
    assert zoom(shown) > 2 * whole
    assert shown.evaluate('document.documentElement.scrollWidth') <= 400
    background = 'getComputedStyle(document.body).backgroundColor'
    assert shown.evaluate(background) == 'rgb(21, 23, 26)'
    shown.get_by_role('button', name='Light or dark').click()
    assert shown.evaluate(background) == 'rgb(255, 255, 255)'
    assert shown.complaints == []


def test_every_control_has_a_name(shown):
    controls = shown.locator('button, select, input, [tabindex="0"], figure')
    snapshot = shown.locator('body').aria_snapshot()
    assert controls.count() > 10
    assert 'slider "Position of the divider"' in snapshot
    assert 'group "Two versions of one image, separated by a divider"' in snapshot
    nameless = re.findall(r'^ *- (?:button|combobox|slider|img|region)(?! ".+")\b.*$', snapshot, re.MULTILINE)
    assert not nameless
