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


def check(capfd, *arguments):
    """Return exit status, stdout and stderr."""
    capfd.readouterr()
    status = main(['check', *map(str, arguments)])
    captured = capfd.readouterr()
    assert 'Traceback' not in captured.out + captured.err
    return status, captured.out, captured.err


def test_five_faults_give_five_lines(folder, capfd):
    (folder / 'bad.yml').write_text(
        STAGED.replace('name: staged', 'nmae: staged\nnetwork_g: {num_feet: 3}')
        .replace('total_epochs: 3', 'total_epoch: 3')
        .replace('lr: 5e-5', 'lr: slow')
        .replace('crop_border', 'crop_boarder')
    )
    before = tree(folder)
    status, out, err = check(capfd, '-opt', 'bad.yml')
    assert (status, out) == (2, '')
    assert err.removeprefix('basicsr: error: ').splitlines() == [
        'bad.yml: network_g.num_feet: unknown key, did you mean num_feat?',
        'bad.yml: val.metrics.psnr.crop_boarder: unknown key, did you mean crop_border?',
        'bad.yml: nmae: unknown key, did you mean name?',
        'bad.yml: stages.0.train.total_epoch: unknown key, did you mean total_epochs?',
        "bad.yml: stages.1.train.optim_g.lr: expected a number, got the text 'slow'",
    ]
    assert tree(folder) == before


def test_resolved_options(folder, capfd):
    before = tree(folder)
    status, out, err = check(capfd, '-opt', 'staged.yml', '--force_yml', 'manual_seed=7')
    assert status == 0
    assert err.splitlines() == [
        'stage_1: valid, 6 iterations, 2 per epoch',
        'last: valid, 4 iterations, 2 per epoch',
    ]
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
    assert check(capfd, '-opt', 'again.yml') == (0, out, err)


def test_packaged_photos_are_data_that_is_there(folder, capfd):
    pytest.importorskip('skimage', reason='scikit-image is not installed')
    status, _, err = check(capfd, '-opt', 'AST_quickstart', '--force_yml', 'num_gpu=0', 'bit_depth=16')
    assert status == 2 and 'datasets.train: ' in err and 'has 8 bits, bit_depth is 16' in err


def test_a_file_without_stages_or_data(folder, capfd):
    status, out, err = check(capfd, '-opt', 'tiny.yml')
    assert (status, err) == (0, 'tiny: valid, 4 iterations, 2 per epoch\n')
    assert safe_yaml.read_text(out, 'out') == options.load('tiny.yml')
    shutil.rmtree(folder / 'data')
    status, out, err = check(capfd, '-opt', 'tiny.yml')
    assert status == 0
    assert 'tiny: valid; data not checked\n' in err
    assert 'data not usable on this machine: datasets.train: PairedImageDataset: No such file' in err
    # Everything else is checked without the data.
    status, _, err = check(capfd, '-opt', 'tiny.yml', '--force_yml', 'network_g:act_type=unheard')
    assert status == 2 and 'network_g: SRVGGNetCompact cannot be built' in err


def test_a_file_for_testing_alone(folder, capfd):
    opt = yaml.safe_load(tiny_run.OPTIONS)
    (folder / 'tiny.yml').write_text(yaml.safe_dump({key: opt[key] for key in opt if key not in ('train', 'logger')}))
    status, out, err = check(capfd, '-opt', 'tiny.yml')
    assert (status, err) == (0, 'tiny: valid\n')
    assert 'train' not in yaml.safe_load(out)
    (folder / 'tiny.yml').write_text('name: x\nstages: [3]\n')
    assert 'stages.0: expected a mapping' in check(capfd, '-opt', 'tiny.yml')[2]
    assert check(capfd) == (2, '', 'basicsr: error: check: expected -opt FILE, or --schema\n')


# ---- the JSON schema


@pytest.fixture(scope='module')
def json_schema():
    from ast_plugin.models import preflight
    from ast_plugin.options import sections

    return sections.json_schema(preflight.load_registered())


def test_schema_is_printed(capfd, json_schema):
    status, out, _ = check(capfd, '--schema')
    assert status == 0 and json.loads(out) == json_schema
    definitions = json_schema['$defs']
    assert set(re.findall(r'"#/\$defs/([^"]+)"', out)) <= set(definitions)
    assert list(json_schema['properties'])[:2] == ['name', 'model_type']
    assert {'_base_', 'stages', 'train', 'val'} <= set(json_schema['properties'])
    assert {'total_epochs', 'precision', 'mixing'} <= set(definitions['Train']['properties'])
    assert 'AST_B' in definitions['Network']['properties']['type']['anyOf'][0]['enum']
    assert json_schema['properties']['stages']['minItems'] == 1 and not json_schema['additionalProperties']


def accepts(schema, value, definitions):
    """Validate against the subset of JSON Schema that is used here."""
    schema = dict(schema)
    if '$ref' in schema and not accepts(definitions[schema['$ref'].removeprefix('#/$defs/')], value, definitions):
        return False
    kinds = {'string': str, 'object': dict, 'array': list, 'boolean': bool, 'null': type(None)}
    kinds |= dict.fromkeys(('number', 'integer'), (int, float))
    kind = schema.get('type')
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ('number', 'integer'))):
        return False
    if 'anyOf' in schema and not any(accepts(part, value, definitions) for part in schema['anyOf']):
        return False
    if ('enum' in schema and value not in schema['enum']) or ('const' in schema and value != schema['const']):
        return False
    if isinstance(value, str) and not re.search(schema.get('pattern', ''), value):
        return False
    for part in schema.get('allOf', []):
        if accepts(part['if'], value, definitions) and not accepts(part['then'], value, definitions):
            return False
    if isinstance(value, list):
        return all(accepts(schema.get('items', {}), item, definitions) for item in value)
    if not isinstance(value, dict):
        return True
    if any(key not in value for key in schema.get('required', ())):
        return False
    patterns = {f'^{re.escape(key)}$': part for key, part in schema.get('properties', {}).items()}
    patterns |= schema.get('patternProperties', {})
    for key, item in value.items():
        parts = [part for pattern, part in patterns.items() if re.search(pattern, key)]
        parts = parts or [schema.get('additionalProperties', {})]
        if not all(part is True or (part and accepts(part, item, definitions)) or part == {} for part in parts):
            return False
    return True


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

NASTY = [
    *['!!python/object/apply:os.system ["touch ran"]', '!!python/object/new:os.system ["touch ran"]'],
    *['!!python/name:os.system', "{{ __import__('os').system('touch ran') }}", '{% import os %}'],
    *['${HOME}', '${ran', '${AST_NOT_THERE}', '${AST_NOT_THERE:[1, 2]}', '&a [*a]', '{<<: *x}', '<<: 3'],
    *['_base_: bad.yml', '_base_: ../../../../etc/passwd', '_base_: [tiny.yml, staged.yml]', '_delete_: 3'],
    *['custom_imports: {imports: [this]}', 'stages: [{}, {stages: []}]', 'stages: {a: 1}'],
    *['.nan', '-.inf', '1e999', '9' * 400, '\t', '\0', '\x85', '\ud800', '😀', '"', "'", '[', '}', ': ', '- '],
    *['---', '...', '%YAML 3.0', '? ', '| ', '> ', '!', '*', '&', '#'],
]


def mangled(text, generator):
    """Mutate the text of a file in one to six places: cut, duplicate, swap or replace by harmful text."""
    for _ in range(generator.randint(1, 6)):
        lines = text.split('\n')
        number = generator.randrange(len(lines))
        place = generator.randrange(len(text) + 1)
        action = generator.randrange(8)
        if action == 0:
            del lines[number]
        elif action == 1:
            lines.insert(generator.randrange(len(lines)), lines[number])
        elif action == 2:
            lines[number] = ' ' * generator.randint(0, 5) + lines[number].strip()
        elif action == 3:
            key = lines[number].partition(':')[0]
            lines[number] = f'{key}: {generator.choice(NASTY)}'
        elif action == 4:
            lines.insert(number, generator.choice(NASTY))
        else:
            lines = None
        if lines is not None:
            text = '\n'.join(lines)
        elif action == 5:
            text = text[:place] + generator.choice(NASTY) + text[place:]
        elif action == 6:
            text = text[:place] + text[place + generator.randint(1, 20) :]
        else:
            words = re.findall(r'\w+', text) or ['x']
            text = text.replace(generator.choice(words), generator.choice(words), 1)
    return text


@pytest.mark.parametrize('seed', range(4))
def test_broken_files_are_rejected(folder, capfd, monkeypatch, seed):
    """Four times fifty mutated files; most are broken, and some may be valid."""
    monkeypatch.setattr('os.system', lambda command: pytest.fail(f'{command} was run'))
    generator = random.Random(seed)
    sources = [tiny_run.OPTIONS, STAGED, STAGED]
    before = tree(folder)
    statuses = []
    for number in range(50):
        text = mangled(generator.choice(sources), generator)
        (folder / 'bad.yml').write_bytes(text.encode('utf-8', 'surrogatepass'))
        status, _, err = check(capfd, '-opt', 'bad.yml')
        statuses.append(status)
        assert status in (0, 2), (seed, number)
        assert status == 0 or err.startswith(('basicsr: error: ', 'stage_1: valid', 'last: valid')), err
        assert tree(folder) == sorted([*before, 'bad.yml'])
    assert statuses.count(2) > 25
