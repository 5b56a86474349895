"""`basicsr check`: all errors at once, the resolved options, the JSON schema; broken files are never run."""

import json
import random
import re
import shutil

import pytest
import yaml

from ast_plugin import options
from ast_plugin.cli.main import main
from ast_plugin.options import safe_yaml
from tests import tiny_run

STAGED = """\
_base_: tiny.yml
name: staged
val: {metrics: {psnr: {crop_border: '${AST_TEST_BORDER:1}'}}}
stages:
  - train: {total_epochs: 3}
    logger: {save_checkpoint_epochs: 1}
  - name: last
    train: {total_epochs: 2, optim_g: {lr: 5e-5}}
    val: {times_per_epoch: 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny_run.write(tmp_path)
    (tmp_path / 'staged.yml').write_text(STAGED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


def test_five_faults_give_five_lines(folder, basicsr):
    (folder / 'bad.yml').write_text(
        STAGED.replace('name: staged', 'nmae: staged\nnetwork_g: {num_feet: 3}')
        .replace('total_epochs: 3', 'total_epoch: 3')
        .replace('lr: 5e-5', 'lr: slow')
        .replace('crop_border', 'crop_boarder')
    )
    before = tree(folder)
    out, err = basicsr('check', '-opt', 'bad.yml', status=2)
    assert out == ''
    assert err.removeprefix('basicsr: error: ').splitlines() == [
        'bad.yml: network_g.num_feet: unknown key, did you mean num_feat?',
        'bad.yml: val.metrics.psnr.crop_boarder: unknown key, did you mean crop_border?',
        'bad.yml: nmae: unknown key, did you mean name?',
        'bad.yml: stages.0.train.total_epoch: unknown key, did you mean total_epochs?',
        "bad.yml: stages.1.train.optim_g.lr: expected a number, got the text 'slow'",
    ]
    assert tree(folder) == before


def test_resolved_options(folder, basicsr):
    before = tree(folder)
    out, err = basicsr('check', '-opt', 'staged.yml', '--force_yml', 'manual_seed=7')
    assert err == 'stage_1: valid, 6 iterations, 2 per epoch\nlast: valid, 4 iterations, 2 per epoch\n'
    resolved = yaml.safe_load(out)
    first, last = resolved['stages']
    assert (resolved['name'], first['name'], last['name']) == ('staged', 'stage_1', 'last')
    assert first['manual_seed'] == last['manual_seed'] == 7
    assert first['val']['metrics']['psnr']['crop_border'] == 1
    assert (last['val']['times_per_epoch'], last['train']['optim_g']['lr']) == (2, 5e-5)
    assert 'val_freq' not in last['val'] and 'total_iter' not in first['train']
    assert tree(folder) == before

    # The printed options are an option file that resolves to the same options.
    (folder / 'again.yml').write_text(out)
    assert basicsr('check', '-opt', 'again.yml') == (out, err)


def test_packaged_photos_are_data_that_is_there(folder, basicsr):
    pytest.importorskip('skimage', reason='scikit-image is not installed')
    _, err = basicsr('check', '-opt', 'AST_quickstart', '--force_yml', 'num_gpu=0', 'bit_depth=16', status=2)
    assert 'datasets.train: ' in err and 'has 8 bits, bit_depth is 16' in err


def test_a_file_without_stages_or_data(folder, basicsr):
    out, err = basicsr('check', '-opt', 'tiny.yml')
    assert err == 'tiny: valid, 4 iterations, 2 per epoch\n'
    assert safe_yaml.read_text(out, 'out') == options.load('tiny.yml')
    shutil.rmtree(folder / 'data')
    _, err = basicsr('check', '-opt', 'tiny.yml')
    assert 'tiny: valid; data not checked\n' in err
    assert 'data not usable on this machine: datasets.train: PairedImageDataset: No such file' in err
    # Everything else is checked without the data.
    _, err = basicsr('check', '-opt', 'tiny.yml', '--force_yml', 'network_g:act_type=unheard', status=2)
    assert 'network_g: SRVGGNetCompact cannot be built' in err


def test_a_file_for_testing_alone(folder, basicsr):
    opt = yaml.safe_load(tiny_run.OPTIONS)
    (folder / 'tiny.yml').write_text(yaml.safe_dump({key: opt[key] for key in opt if key not in ('train', 'logger')}))
    out, err = basicsr('check', '-opt', 'tiny.yml')
    assert err == 'tiny: valid\n'
    assert 'train' not in yaml.safe_load(out)
    (folder / 'tiny.yml').write_text('name: x\nstages: [3]\n')
    assert 'stages.0: expected a mapping' in basicsr('check', '-opt', 'tiny.yml', status=2)[1]


# ---- the JSON schema


@pytest.fixture(scope='module')
def json_schema():
    from ast_plugin.models import preflight
    from ast_plugin.options import sections

    return sections.json_schema(preflight.load_registered())


def test_schema_is_printed(basicsr, json_schema):
    out, _ = basicsr('check', '--schema')
    assert json.loads(out) == json_schema
    definitions = json_schema['$defs']
    assert set(re.findall(r'"#/\$defs/([^"]+)"', out)) <= set(definitions)
    assert list(json_schema['properties'])[:2] == ['name', 'model_type']
    assert {'_base_', 'stages', 'train', 'val'} <= set(json_schema['properties'])
    assert {'total_epochs', 'precision', 'mixing'} <= set(definitions['Train']['properties'])
    assert 'AST_B' in definitions['Network']['properties']['type']['anyOf'][0]['enum']
    assert json_schema['properties']['stages']['minItems'] == 1 and not json_schema['additionalProperties']


def accepts(schema, value, definitions):
    """Validate against the subset of JSON Schema that is used here."""

    def fits(part, item):
        return accepts(part, item, definitions)

    kinds = {'string': str, 'object': dict, 'array': list, 'boolean': bool, 'null': type(None)}
    kind = kinds.get(schema.get('type'), (int, float) if 'type' in schema else object)
    is_text, keys = isinstance(value, str), value if isinstance(value, dict) else {}
    patterns = {f'^{re.escape(key)}$': part for key, part in schema.get('properties', {}).items()}
    patterns |= schema.get('patternProperties', {})
    others = schema.get('additionalProperties', True)
    parts = {key: [part for pattern, part in patterns.items() if re.search(pattern, key)] for key in keys}
    return (
        ('$ref' not in schema or fits(definitions[schema['$ref'].removeprefix('#/$defs/')], value))
        and isinstance(value, kind)
        and (kind != (int, float) or not isinstance(value, bool))
        and ('anyOf' not in schema or any(fits(part, value) for part in schema['anyOf']))
        and value in schema.get('enum', [schema.get('const', value)])
        and (not is_text or bool(re.search(schema.get('pattern', ''), value)))
        and all(fits(part['then'], value) for part in schema.get('allOf', ()) if fits(part['if'], value))
        and all(fits(schema.get('items', {}), item) for item in (value if isinstance(value, list) else ()))
        and all(key in keys for key in (schema.get('required', ()) if isinstance(value, dict) else ()))
        and all(others is not False for key in keys if not parts[key])
        and all(fits(part, keys[key]) for key in keys for part in parts[key] or [others] if isinstance(part, dict))
    )


def test_schema_accepts_shipped_files(json_schema):
    files = {name: safe_yaml.read_file(options.find(name)) for name in options.shipped_files()}
    files['staged'] = safe_yaml.read_text(STAGED, 'staged')
    assert [name for name, value in files.items() if not accepts(json_schema, value, json_schema['$defs'])] == []


@pytest.mark.parametrize(
    'text',
    [
        'nmae: x',
        'train: {total_epochs: many}',
        'train: {precision: fp8}',
        'train: {optim_g: 3}',
        'datasets: {train: {type: PairsDataset, gt_sise: 3}}',
        'stages: [{train: {total_epoch: 3}}]',
        'network_g: AST',
    ],
)
def test_schema_underlines_faults(json_schema, text):
    assert not accepts(json_schema, safe_yaml.read_text(text, 'x'), json_schema['$defs'])


# ---- fuzz

HARMFUL = [
    *['!!python/object/apply:os.system ["touch ran"]', '!!python/object/new:os.system ["touch ran"]'],
    *['!!python/name:os.system', "{{ __import__('os').system('touch ran') }}", '{% import os %}'],
    *['${HOME}', '${ran', '${AST_NOT_THERE}', '${AST_NOT_THERE:[1, 2]}', '&a [*a]', '{<<: *x}', '<<: 3'],
    *['_base_: bad.yml', '_base_: ../../../../etc/passwd', '_base_: [tiny.yml, staged.yml]', '_delete_: 3'],
    *['custom_imports: {imports: [this]}', 'stages: [{}, {stages: []}]', 'stages: {a: 1}', 'network_x: 3', '../..'],
    *['.nan', '-.inf', '1e999', '9' * 400, '0', '-1', '3.5', 'true', '~', '[]', '[1]', '[[]]', '{}', '{a: 1}', '""'],
    *['{type: AST}', '{type: []}', '{type: ~}', '[{type: L1Loss}]', '{"": {}}', '"{{x}}"', 'x_opt', '!', '*', '&', '#'],
    *['\t', '\0', '\x85', '\ud800', '😀', '"', "'", '[', '}', ': ', '- ', '---', '...', '%YAML 3.0', '? ', '| ', '> '],
]


def mangled(text, draw):
    """Replace words, lines or indents of a file by others of it, by harmful text, twice themselves, or nothing."""
    for _ in range(draw.randint(1, 5)):
        spots = [*re.finditer(draw.choice((r'[\w.-]+', r'[\w.-]+', '\n.*', '\n *')), text)]
        if spots:
            spot = draw.choice(spots)
            new = draw.choice((draw.choice(HARMFUL), draw.choice(spots)[0], spot[0] * 2, spot[0][::-1], ''))
            text = text[: spot.start()] + new + text[spot.end() :]
    return text


@pytest.mark.parametrize('seed', range(4))
def test_broken_files_are_rejected(folder, capfd, monkeypatch, seed):
    """Four times sixty mutated files; most are broken, and some may be valid."""
    monkeypatch.setattr('os.system', lambda command: pytest.fail(f'{command} was run'))
    draw = random.Random(seed)
    own = tiny_run.OPTIONS.replace('SRModel', 'RestorationModel').replace('val_freq', 'protocol: tiled\n  val_freq')
    before = sorted([*tree(folder), 'bad.yml'])
    statuses = []
    for number in range(60):
        text = mangled(draw.choice((tiny_run.OPTIONS, own, STAGED, STAGED)), draw)
        (folder / 'bad.yml').write_bytes(text.encode('utf-8', 'surrogatepass'))
        statuses.append(main(['check', '-opt', 'bad.yml']))
        out, err = capfd.readouterr()
        assert statuses[-1] in (0, 2) and 'Traceback' not in out + err, (seed, number)
        assert statuses[-1] == 0 or err.startswith(('basicsr: error: ', 'stage_1: valid', 'last: valid')), err
        assert tree(folder) == before
    assert statuses.count(2) > 30
