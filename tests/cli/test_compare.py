"""`basicsr compare`: bad input by table, and a tiny comparison that is killed, resumed, and has a failing network."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ast_plugin import options
from ast_plugin.archs.networks import build_network, load_network
from ast_plugin.checkpoints import save_weights
from ast_plugin.compare import child, measure
from ast_plugin.compare import run as compare_run
from ast_plugin.compare.child import ChildFailed
from ast_plugin.compare.run import make_plan
from ast_plugin.errors import PluginError
from ast_plugin.evaluation.cost import count_macs
from ast_plugin.models import preflight
from ast_plugin.options import safe_yaml, validation
from ast_plugin.options.reading import DELETE_KEY
from tests import tiny_run

ROOT = Path(__file__).parents[2]
COMPACT = {'type': 'SRVGGNetCompact', 'num_feat': 4, 'num_conv': 1, 'upscale': 1}
NETWORKS = [
    {'name': 'good', 'network_g': COMPACT},
    {'name': 'fast', 'network_g': {**COMPACT, 'num_conv': 2}, 'train': {'optim_g': {'lr': 1e-3}}},
]


def options_of(networks=NETWORKS, **changes):
    opt = safe_yaml.read_text(tiny_run.OPTIONS, 'tiny.yml')
    for key in ('network_g', 'path'):
        del opt[key]
    opt.update(name='tiny', model_type='RestorationModel', networks=networks)
    for key, value in changes.items():
        section, _, name = key.rpartition('__')
        (opt.setdefault(section, {}) if section else opt)[name] = value
    return opt


def write(folder: Path, opt) -> Path:
    tiny_run.write(folder)
    file = folder / 'compare.yml'
    file.write_text(safe_yaml.write_text(opt))
    return file


@pytest.fixture(scope='module')
def registered():
    return preflight.load_registered()


# ---- compare files


@pytest.mark.parametrize('name', [name for name in options.shipped_files() if name.startswith('compare/')])
def test_shipped_files_are_right(registered, name):
    if name != 'compare/quick':
        pytest.importorskip('spandrel_extra_arches', reason='the extra `baselines` is not installed')
    validation.check(options.load(options.find(name)), name, registered)


def test_networks_of_record_cost_alike(registered):
    pytest.importorskip('spandrel_extra_arches', reason='the extra `baselines` is not installed')
    for entry in options.load(options.find('compare/synthetic'))['networks']:
        # The cost per pixel is equal, except that these two pad the smallest feature maps of small images.
        side = 128 if entry['name'] in ('AST', 'Uformer') else 64
        count, _ = count_macs(build_network(entry['network_g']).eval(), torch.zeros(1, 3, side, side))
        assert 6e9 < count * (256 / side) ** 2 < 8e9, entry['name']


def one(**changes):
    """Return a compare file with one network, the first of `NETWORKS` with changes."""
    return options_of([{**NETWORKS[0], **changes}])


@pytest.mark.parametrize(
    ('opt', 'complaint'),
    [
        (options_of(train__total_iter=0), 'train.total_iter: expected 1 or more, got 0'),
        (one(train={'total_iter': 0}), 'networks.0.train.total_iter: expected 1 or more, got 0'),
        (options_of(compare={'minutes': 1}), 'train.total_iter: conflicts with compare.minutes'),
        (options_of([NETWORKS[0], {**NETWORKS[1], 'name': 'Good'}]), 'Good is already the name of networks.0'),
        (one(name='input'), 'input is reserved for the degraded images'),
        (one(name='Clean'), 'networks.0.name: Clean is reserved for the clean images'),
        (one(name='../x'), 'networks.0.name: expected a valid folder name'),
        (one(name='debug_it'), 'debug mode'),
        (one(network_g={'type': 'MSRResNett'}), 'no arch is registered as MSRResNett, did you mean MSRResNet?'),
        (one(network_g={**COMPACT, 'num_fet': 3}), 'networks.0.network_g.num_fet: unknown key, did you mean num_feat?'),
        (one(network_g={'type': 'EDSR', 'num_in_ch': 3}), 'networks.0.network_g.num_out_ch: required by EDSR'),
        (options_of([{'name': 'a'}]), 'networks.0.network_g: required, but missing (or weights'),
        (one(weight='x'), 'networks.0.weight: unknown key, did you mean weights?'),
        (options_of([]), 'networks: expected 1 items or more'),
        (options_of(['a']), 'networks.0: expected a mapping of keys to values'),
        (options_of(compare={'baseline': 'best'}), "compare.baseline: expected one of good, fast, got the text 'best'"),
        (options_of(compare={'sizes': [[256]]}), 'compare.sizes.0: expected 2 items or more'),
        (options_of(compare={'confidence': 1.0}), 'compare.confidence: expected less than 1'),
        (options_of(stages=[{}]), 'stages: not supported here; to compare staged runs'),
        (options_of(network_g=COMPACT), 'network_g: not supported here; each network is an entry of networks'),
        (options_of(datasets__test={'name': 't', 'type': 'Nothing'}), 'datasets.test.type: no dataset is registered'),
        (options_of(datasets__val_2={'name': 't', 'type': 'PairedImageDataset'}), 'is already val'),
        (options_of(val__metrics={'psnr': {'type': 'calculate_psn'}}), 'psnr.type: no metric is registered'),
    ],
)
def test_faults(registered, opt, complaint):
    faults = [str(fault) for fault in validation.find_faults(opt, registered)]
    assert any(complaint in fault for fault in faults), faults


def test_what_all_share_is_reported_once(registered):
    given = {'name': 'given', 'network_g': COMPACT, 'weights': 'w.pth'}
    for network in (given, {**given, 'network_g': None}):  # the weights name it
        assert validation.find_faults(options_of([*NETWORKS, network]), registered) == []
    opt = options_of([*NETWORKS, given], datasets__train={'type': 'x'}, scale='two', train__total_iter=0)
    faults = [str(fault) for fault in validation.find_faults(opt, registered)]
    assert len(faults) == len(set(faults)) and not any('networks.' in fault for fault in faults)
    assert {fault.partition(':')[0] for fault in faults} >= {'datasets.train.type', 'scale', 'train.total_iter'}


RAISES = {'name': 'raises', 'network_g': COMPACT, 'train': {'optim_g': {DELETE_KEY: 3}}}


def test_shared_fault_is_reported_where_written(registered):
    overriding = [*NETWORKS, {**NETWORKS[0], 'name': 'third'}]  # one of them overrides the faulty key
    for networks in (overriding, [NETWORKS[0], RAISES], [RAISES]):
        opt = options_of(networks)
        opt['train']['optim_g']['lr'] = 'high'
        faults = [str(fault) for fault in validation.find_faults(opt, registered)]
        assert [fault.partition(':')[0] for fault in faults if DELETE_KEY not in fault] == ['train.optim_g.lr'], faults
    own = {**NETWORKS[0], 'name': 'own', 'train': {'optim_g': {DELETE_KEY: True, 'type': 'Adam'}}}
    faults = [str(fault) for fault in validation.find_faults(options_of([*NETWORKS, own]), registered)]
    assert faults == ['networks.2.train.optim_g.lr: required, but missing']


def test_a_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / 'w.safetensors', load_network(COMPACT, None).state_dict(), COMPACT)
    networks = [*NETWORKS, {'name': 'given', 'weights': 'w.safetensors'}]
    networks.append({'name': 'tuned', 'weights': 'w.safetensors', 'train': {'total_iter': 2}})
    arguments = options_of(networks, manual_seed=None)
    plan = make_plan(str(write(tmp_path, arguments)), '.')
    good, fast, given, tuned = plan.networks
    assert plan.folder == tmp_path / 'comparisons' / 'tiny'
    assert good.train['manual_seed'] == fast.train['manual_seed'] == 0  # not sampled for each network
    assert good.train['train'] == options_of()['train']
    assert fast.train['train']['optim_g'] == {'type': 'AdamW', 'lr': 1e-3, 'betas': [0.9, 0.99]}
    assert given.train is None and given.network_g == COMPACT and given.weights == Path('w.safetensors')
    assert tuned.train['path'] == {'pretrain_network_g': 'w.safetensors'} and tuned.train['train']['total_iter'] == 2
    assert plan.dataset['name'] == 'val' and plan.dataset['phase'] == 'val'


def test_metrics_of_weights_are_tried(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    save_weights(tmp_path / 'w.safetensors', load_network(COMPACT, None).state_dict(), COMPACT)
    opt = options_of([{'name': 'given', 'weights': 'w.safetensors'}])
    opt['datasets'] = {'test': opt['datasets']['val']}
    file = write(tmp_path, opt)
    assert make_plan(str(file), '.').dataset['phase'] == 'test' and 'nothing is measured' not in caplog.text
    with pytest.raises(PluginError, match='no image is large enough for psnr'):
        make_plan(str(file), '.', ['val:metrics:psnr:crop_border=500'])


# ---- a comparison


def read_rows(table, *keys):
    """Return the rows of a CSV file by the values of these columns, or of the first one."""
    with table.open(newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    return {tuple(row[key] for key in keys) if keys else next(iter(row.values())): row for row in rows}


def run_and_kill(folder, file, wait_for):
    """Run the command in a separate process and kill it with SIGKILL as soon as `wait_for` is true."""
    process = subprocess.Popen(
        [sys.executable, '-m', 'ast_plugin', 'compare', '-opt', str(file), '--root', str(folder)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    end = time.monotonic() + 600
    while not wait_for():
        assert process.poll() is None and time.monotonic() < end, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.skipif(os.name != 'posix', reason='needs SIGKILL')
def test_killed_comparison_resumes(tmp_path, monkeypatch, basicsr):
    monkeypatch.chdir(tmp_path)
    broken = {'name': 'broken', 'network_g': COMPACT, 'train': {'optim_g': {'lr': 1e30}}}
    opt = options_of(
        [NETWORKS[0], broken],
        train__total_iter=60,
        val__val_freq=60,
        logger__save_checkpoint_freq=10,
        compare={'sizes': [[16, 24]], 'runs': 3, 'pictures': 2, 'resamples': 100},
    )
    file = write(tmp_path, opt)
    folder = tmp_path / 'comparisons' / 'tiny'
    states = folder / 'experiments' / 'good' / 'training_states'
    status = run_and_kill(tmp_path, file, lambda: states.is_dir() and any(states.glob('*.state')))
    assert status == -signal.SIGKILL
    assert json.loads((folder / 'journal' / 'good.training.json').read_text())['is_finished'] is False
    assert not (folder / 'report.html').exists()

    def measure_here(module, arguments, *_, **__):  # the first run measured in a separate process
        monkeypatch.setattr(sys, 'argv', ['measure', *arguments])
        assert measure.main() == 0

    monkeypatch.setattr(child, 'run_child', measure_here)
    out, err = basicsr('compare', '-opt', file, status=1)
    assert 'training good, resuming after' in out
    assert 'evaluating input' not in out  # reused from the first run
    assert 'basicsr: error: broken: training: ' in err
    assert 'Resuming training from epoch' in (folder / 'logs' / 'good.training.log').read_text()

    rows = read_rows(folder / 'table.csv')
    assert list(rows) == ['input', 'good', 'broken']
    assert rows['good']['iterations'] == '60'
    images = read_rows(folder / 'images.csv', 'network', 'image')
    psnrs = {image: float(row['psnr']) for (network, image), row in images.items() if network == 'good'}
    assert list(psnrs) == ['0', '1', '2', '3']
    assert float(rows['good']['psnr']) == pytest.approx(sum(psnrs.values()) / 4)
    assert 'nan' in rows['broken']['failed'].lower() or 'finite' in rows['broken']['failed'].lower()
    assert rows['broken']['psnr'] == ''
    report = (folder / 'report.html').read_text()
    assert '<b>broken</b> failed while training: ' in report
    assert (folder / 'plots' / 'training_loss.png').is_file()
    assert 'broken failed' in (folder / 'table.md').read_text()

    # Finished work is reused, and the failed network is retried.
    started = []

    def refuse(module, arguments, *_, **__):
        started.append(arguments)
        raise ChildFailed('refused')

    monkeypatch.setattr(child, 'run_child', refuse)
    monkeypatch.setattr(compare_run, 'run_child', refuse)
    assert 'broken: training: refused' in basicsr('compare', '-opt', file, status=1)[1]
    assert [Path(arguments[2]).stem for arguments in started] == ['broken']
    assert read_rows(folder / 'table.csv')['good'] == rows['good']


def test_check_prints_each_training(tmp_path, monkeypatch, basicsr):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, options_of())
    out, err = basicsr('check', '-opt', file)
    assert 'fast: valid, trained, then measured' in err
    runs = safe_yaml.read_text(out, 'output')
    assert list(runs) == ['good', 'fast'] and runs['fast']['train']['optim_g']['lr'] == 1e-3
    file.write_text(safe_yaml.write_text(runs['fast']))
    basicsr('check', '-opt', file)
