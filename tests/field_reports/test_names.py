"""User-given names are displayed, drawn and passed on correctly; failures of plots and logs never stop a run."""

import ast
import csv
import io
import json
import logging
import os
import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

import ast_plugin
from ast_plugin import errors, names
from ast_plugin.cli.main import main
from ast_plugin.compare import measure, report
from ast_plugin.data.contact_sheet import Cell, draw_contact_sheet
from ast_plugin.evaluation.results import ImageResult, Ranking, ValidationResults
from ast_plugin.models import run_log
from ast_plugin.models.run_log import RunLog, draw_curve
from ast_plugin.names import MOST_BYTES, to_columns
from ast_plugin.options.sections import FolderName
from ast_plugin.toolbox.repairs import SparedWriter
from tests.compare.test_report import curves, results

ODD = {
    'mathematics': 'AST_$EXP_$SEED',
    'tex': r'$\frac{1}{2$ a^_{b} \alpha',
    'underscore': '_hidden_',
    'no_font': '\u96e8\U0001f327',
    'no_text': os.fsdecode(b'mu\xf1oz'),
    'lines': 'one\ntwo\r\u2028three',
    'controls': 'a\x1b[31mred\x07\x00\x7f\x85',
    'reordered': 'photo\u202egnp.exe',
    'markup': '</svg><script>alert(1)</script>&amp;|`*[a](b)',
    'long': 'x' * 255,
    'path': '../a/b\\c',
    'option': '--rm -rf',
    'noncharacter': 'a\uffffb\ufdd0',
}


@pytest.fixture(params=ODD.values(), ids=ODD)
def odd(request):
    return request.param


@pytest.fixture(autouse=True)
def _told_nothing():
    errors.warned.clear()
    names._warn_of_fonts.cache_clear()


def write_pair(folder, name, side=16):
    """Add a pair to folder/lq and folder/gt; return the paths."""
    pair = folder / 'lq' / name, folder / 'gt' / name
    for value, path in enumerate(pair, 80):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode('.png', np.full((side, side, 3), value, np.uint8))[1].tobytes())
    return pair


def is_clean(text: str) -> bool:
    return text.encode() and '\n' not in text and not any(map(re.compile(r'[\x00-\x1f\x7f-\x9f\u202e]').search, text))


def test_name_as_text_and_file(odd):
    assert is_clean(names.printable(odd))
    assert names.printable('Grün 雨 é ñ') == 'Grün 雨 é ñ'
    lines = names.to_markdown([['name', 'psnr'], [odd, '30.00']]).split('\n')
    assert len(lines) == 3 and all(len(re.findall(r'(?<!\\)\|', line)) == 3 for line in lines)
    assert not re.search(r'(?<!\\)[<`*$]', lines[2])
    name = names.file_name(odd, '_20000.png')
    assert len(os.fsencode(name)) <= 255 and name.endswith('_20000.png')
    assert names.file_name(odd + 'y', '_20000.png') != name
    assert 0 <= names.seed_of(odd) < 2**32
    assert names.seed_of('grün') == names.zlib.crc32('grün'.encode())  # pairs made before stay as they are


def test_curve_is_drawn():
    iterations, values = np.arange(1, 5), np.array([4.0, 3.0, 2.0, 1.0])
    columns = {name.replace('/', '_'): (iterations, values) for name in ['lr', *ODD.values()]}
    columns |= {f'{name}/{ODD["tex"]}': (iterations, values) for name in ODD.values()}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert draw_curve(columns, ODD['mathematics'], ODD['tex']).startswith(b'\x89PNG')


@pytest.mark.parametrize('first', [0, 5, 8])
def test_comparison_is_drawn(first, caplog):
    odd = list(ODD.values())[first : first + 5]
    found, lines = results(), curves()
    lines = dict(zip(odd, lines.values(), strict=True))
    for row, name in zip(found.rows[1:], odd, strict=True):
        row.name = name
        row.speeds = {}
    for row in found.rows:
        row.values = {image: {odd[0]: value['psnr']} for image, value in row.values.items()}
    for columns in lines.values():
        columns[f'{odd[1]}/{odd[0]}'] = columns['val/psnr']
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter('always')
        drawn = report.draw_all(found, lines, f'{odd[1]}/{odd[0]}')
    assert len(drawn) == 3 and not raised and 'not drawn' not in caplog.text
    for drawing in drawn:
        assert re.fullmatch(r'[\w-]+', drawing.name)
        ElementTree.fromstring(drawing.svg)
        report._inline_svg(drawing).encode()


def test_sheet_is_drawn(odd):
    cell = Cell(np.zeros((20, 40, 3), np.uint8), odd)
    assert draw_contact_sheet([odd], [[cell]]).size[0] > 480


def test_name_that_no_font_has(monkeypatch, caplog):
    usual = names._fonts()[:1]
    monkeypatch.setattr(names, '_fonts', lambda: usual)
    assert names.drawable('a雨b')[0] == r'a\u96e8b' == names.drawable('a雨b')[0]
    assert names.drawable('grün $x$')[0] == 'grün $x$'
    assert caplog.text.count('No installed font') == 1
    assert names.drawable('a' * 80 + 'b')[0] == 'a' * 39 + '…' + 'a' * 19 + 'b'


def test_name_that_another_font_has(monkeypatch):
    usual, other = names._fonts()[0], names._fonts()[0].replace('DejaVuSans', 'STIXGeneral')
    monkeypatch.setattr(names, '_fonts', lambda: (usual, other))
    symbols = frozenset(map(chr, range(0x2190, 0x2B00)))
    special = min(names._missing(usual, symbols) - names._missing(other, symbols))
    assert names.drawable(f'a{special}') == (f'a{special}', other)


def test_legend_names_what_begins_with_underscore():
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    run_log.draw_legend(axis, axis.plot([1, 2]), ['_run $a'])
    (text,) = axis.get_legend().get_texts()
    assert text.get_text() == '_run $a' and not text.get_parse_math()


@pytest.mark.parametrize('error', [ValueError, MemoryError])
def test_curve_that_fails_ends_no_run(tmp_path, monkeypatch, caplog, error):
    def fail(*_):
        raise error('no')

    monkeypatch.setattr(run_log, 'draw_curve', fail)
    log = RunLog(tmp_path, 'run')
    for iteration in (1, 2):
        log.add_iteration(iteration, 1.0, {'l_pix': 1.0})
        log.draw(at_once=True)
    assert caplog.text.count('curve.png cannot be drawn: no') == 1
    assert (tmp_path / 'metrics.csv').read_text().count('\n') == 3


@pytest.mark.parametrize('content', [b'', b'\xff\xfe', b'a,b\n1,2\n', b'iter,epoch,lr\nx,0,1\n', b'iter,epoch,lr'])
def test_damaged_table_ends_no_run(tmp_path, caplog, content):
    (tmp_path / 'metrics.csv').write_bytes(content)
    log = RunLog(tmp_path, 'run')
    log.add_iteration(5, 1.0, {'l_pix': 1.0})
    log.flush()
    assert list(csv.DictReader(io.StringIO((tmp_path / 'metrics.csv').read_text())))[-1]['iter'] == '5'
    aside = tmp_path / 'metrics.csv.damaged'
    assert ('and restarted' in caplog.text) == aside.exists()
    assert not aside.exists() or aside.read_bytes() == content


def test_measured_is_written_before_drawn(tmp_path, monkeypatch, caplog):
    plan = SimpleNamespace(folder=tmp_path, networks=[], settings=SimpleNamespace(pictures=1))
    monkeypatch.setattr(report, 'describe_method', lambda *_: [])
    monkeypatch.setattr(report, 'draw_all', lambda *_: 1 / 0)
    page = report.write_outputs(plan, results())
    assert page.is_file() and 'not drawn: division by zero' in caplog.text
    monkeypatch.setattr(report, 'render_page', lambda *_: 1 / 0)
    assert report.write_outputs(plan, results()).name == 'table.md' and 'report.html not written' in caplog.text
    assert {'table.md', 'table.csv', 'images.csv'} <= {path.name for path in tmp_path.iterdir()}


def test_image_that_is_damaged_is_not_shown(tmp_path, caplog):
    (tmp_path / 'a.png').write_bytes(b'no image')
    page = report.render_page(results(), {'a': {'input': tmp_path / 'a.png'}}, [], [])
    assert 'a is not shown' in caplog.text and '</html>' in page


def test_tables_of_a_test_are_written(tmp_path, odd, monkeypatch, caplog):
    shown = (np.zeros((4, 4, 3), np.uint8),) * 3
    found = ValidationResults.collect('rain', [ImageResult(0, odd, {odd: 30.0}, {}, shown)], Ranking(odd, count=1))
    assert found.write(tmp_path).is_file()
    assert len(list(csv.reader((tmp_path / 'rain.csv').open(encoding='utf-8')))) == 3
    monkeypatch.setattr('ast_plugin.evaluation.results.draw_contact_sheet', lambda *_: 1 / 0)
    assert found.write(tmp_path) is None and 'not drawn' in caplog.text


def test_tensorboard_that_fails_ends_no_run(caplog):
    writer = SparedWriter(SimpleNamespace(add_scalar=lambda *_: 1 / 0, log_dir='here'))
    for step in range(3):
        writer.add_scalar('loss', 1.0, step)
    assert caplog.text.count('TensorBoard logs are not written: division by zero') == 1
    assert writer.log_dir == 'here'
    SparedWriter(None).add_scalar('loss', 1.0, 1)


def test_comparison_measures_any_image(tmp_path):
    for name in (b'mu\xf1oz.png', b'a\nb.png', b'y' * 251 + b'.png'):
        lq, gt = write_pair(tmp_path, os.fsdecode(name))
    dataset = {'name': 'val', 'type': 'PairsDataset', 'layout': 'folders', 'phase': 'val', 'scale': 1}
    dataset |= {'dataroot_lq': str(lq.parent), 'dataroot_gt': str(gt.parent)}
    job = {'network': None, 'dataset': dataset, 'protocol': None, 'device': 'cpu', 'kept': 3}
    job['metrics'] = {'mse': {'type': 'calculate_psnr', 'crop_border': 0}}
    record = measure.measure_quality({**job, 'folder': str(tmp_path / 'pictures')})
    assert sorted(record['values']) == [r'a\nb', r'mu\udcf1oz', 'y' * 251]
    json.dumps(record, ensure_ascii=False).encode()
    assert all(measure.image_path(tmp_path / 'pictures', name).is_file() for name in record['kept'])


def test_synthesis_of_any_name(tmp_path, capfd):
    found = [b'mu\xf1oz.png', b'a\nb.png', b'y' * 251 + b'.png', b'-x.png', b'$a_$.png']
    photos = [write_pair(tmp_path, os.fsdecode(name), side=48)[1] for name in found]
    arguments = ['data', 'synth', '--task', 'rain', '-i', str(tmp_path / 'gt')]
    assert main([*arguments, '-o', str(tmp_path / 'out')]) == 0, capfd.readouterr().err
    assert len(list((tmp_path / 'out' / 'lq').iterdir())) == len(photos)
    recorded = json.loads((tmp_path / 'out' / 'synthesis.json').read_text())
    assert sorted(recorded['photographs'].values()) == sorted(photo.name for photo in photos)
    assert main([*arguments, '--sheet', str(tmp_path / 'new' / 'sheet.jpg')]) == 0


def test_name_longer_than_files_can_have():
    with pytest.raises(ValidationError, match='at most 100 bytes, got 102'):
        TypeAdapter(FolderName).validate_python('雨' * 34)
    # what a run, a stage, its log and the debug mode make of the longest
    assert len(f'train_debug_{"x" * 100}_{"x" * 100}_20261127_120000.log') <= MOST_BYTES


def test_folder_of_the_longest_name(tmp_path, capfd):
    write_pair(tmp_path, 'a.png')
    commands = ['synth', '--task', 'rain', '-i', str(tmp_path / 'gt'), '-o'], ['lmdb', str(tmp_path)]
    for number, command in enumerate(commands):
        folder = tmp_path / f'{chr(0x1F327) * 63}{number}'  # 253 bytes
        assert main(['data', *command, str(folder)]) == 0, capfd.readouterr().err
        assert folder.is_dir()


def test_message_with_controls(tmp_path, capfd):
    assert main(['infer', '-i', str(tmp_path / ODD['controls'].replace('\x00', '')), '-o', str(tmp_path / 'out')]) == 2
    assert r'a\x1b[31mred\x07' in capfd.readouterr().err


def test_all_output_is_printable():
    package = Path(ast_plugin.__file__).parent
    found = {
        str(file.relative_to(package))
        for file in package.rglob('*.py')
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8')))
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'print'
    }
    assert found == {'names.py', 'cli/check.py'}  # which prints a file: JSON and YAML have escapes of their own


@pytest.mark.parametrize('name', ['lines', 'controls', 'reordered', 'no_text'])
def test_folder_in_messages(tmp_path, capfd, name):
    folder = tmp_path / ODD[name].replace('\x00', '') / 'pairs'
    lq, _ = write_pair(folder, os.fsdecode(b'mu\xf1oz.png'))
    prepared, shown = folder.parent / 'prepared', names.printable(str(folder.parent))
    assert main(['data', 'prepare', 'folders', str(folder), str(prepared), '--lq', 'lq', '--gt', 'gt']) == 0
    assert main(['data', 'lmdb', str(folder), str(folder / 'packed')]) == 0
    lq.unlink()
    assert main(['data', 'check', str(prepared)]) == 1
    assert main(['options', str(folder.parent / 'options')]) == 0
    lines = capfd.readouterr().out.split('\n')
    for line in (
        f'in {shown}/pairs',
        f'{shown}/prepared/train.jsonl: 1 pairs: 1 missing',
        f'copied to {shown}/options',
    ):
        assert any(line in each for each in lines)


def test_names_in_the_log_are_printable(odd, caplog):
    with caplog.at_level(logging.INFO, 'basicsr'):
        logging.getLogger('basicsr').info('\t # of %s', odd)
    (record,) = caplog.records
    assert record.getMessage() == '\t # of ' + '\n'.join(map(names.printable, odd.split('\n')))


def test_columns():
    rows = [('a', '1', 'x'), ('long', '100', '')]
    assert to_columns(rows, '<><', indent=' ') == [' a       1  x', ' long  100']
    assert to_columns(rows) == ['a     1    x', 'long  100']
    assert to_columns([]) == []
