"""Tests of the training state: content, independence of other files, and failing writes."""

import logging
import resource

import pytest

import ast_plugin  # noqa: F401 (before BasicSR)

# isort: split
import torch
from basicsr.models.base_model import BaseModel
from torch.utils.data import DataLoader

from ast_plugin.checkpoints import newest_whole, read_state
from ast_plugin.errors import CheckpointError, FileError
from ast_plugin.models import restoration_model, run_state
from ast_plugin.models.processes import RunStopped
from tests.models.test_restoration_model import Pairs, build, options, same, train, weights


def resumable(folder, **train_options):
    """Return options of a run that `load_resume_state` can resume."""
    opt = options(folder, ema_decay=0.5, **train_options)
    opt['path'].update(log=str(folder), experiments_root=str(folder))
    return {**opt, 'auto_resume': True}


def resume(opt):
    from basicsr.train import load_resume_state

    state = load_resume_state(opt)
    model = build(opt)
    model.resume_training(state)
    return model


@pytest.mark.parametrize(('weights_file', 'param_key'), [('missing', 'state_dict'), ('broken', 'params_ema')])
def test_a_state_needs_no_other_file(tmp_path, weights_file, param_key):
    opt = resumable(tmp_path)
    straight = build(opt)
    train(straight, 1, 3)
    straight.save(0, 3)
    train(straight, 4, 6)
    file = tmp_path / 'models' / 'net_g_3.pth'
    file.unlink() if weights_file == 'missing' else file.write_bytes(b'broken')
    # Options that the run was originally started with.
    opt['path'].update(param_key_g=param_key, pretrain_network_g='gone.pth')
    resumed = resume(opt)
    train(resumed, 4, 6)
    assert same(weights(resumed), weights(straight))
    assert same(resumed.net_g_ema.state_dict(), straight.net_g_ema.state_dict())
    assert not same(weights(resumed), resumed.net_g_ema.state_dict())


def test_state_of_another_experiment(tmp_path):
    first, second = (tmp_path / name for name in ('first', 'second'))
    for folder in (first, second):
        folder.mkdir()
    straight = build(resumable(first))
    train(straight, 1, 3)
    straight.save(0, 3)
    opt = {**resumable(second), 'auto_resume': False}
    for name in ('models', 'training_states'):
        (second / name).rmdir()
    opt['path']['resume_state'] = str(first / 'training_states' / '3.state')
    resumed = resume(opt)
    assert same(weights(resumed), weights(straight))
    train(resumed, 4, 4)
    resumed.save(0, 4)
    assert (second / 'training_states' / '4.state').is_file()


def test_networks_that_are_not_to_be_resumed(tmp_path):
    opt = resumable(tmp_path)
    model = build(opt)
    model.save(-1, -1)
    train(model, 1, 3)
    model.save(0, 3)
    opt['path'].update(
        ignore_resume_networks=['network_g'], pretrain_network_g=str(tmp_path / 'models' / 'net_g_latest.pth')
    )
    resumed = resume(opt)
    assert not same(weights(resumed), weights(model))
    assert resumed.optimizers[0].state_dict()['state']


def test_what_a_state_lacks_is_reported(tmp_path, caplog, monkeypatch):
    opt = resumable(tmp_path, precision='fp16')
    state = run_state.collect(build(opt), 0, 2)
    del state['random'], state['parts']
    monkeypatch.setattr(logging.getLogger('basicsr'), 'propagate', True)
    run_state.restore(build(opt), state)
    assert 'therefore reset: scaler, random state' in caplog.text
    state['optimizers'][0]['param_groups'][0]['params'].pop()
    with pytest.raises(CheckpointError, match='the state of iteration 2 does not fit'):
        run_state.restore(build(opt), state)


@pytest.mark.parametrize('kind', [restoration_model.RestorationModel, BaseModel])
def test_epochs_of_another_length(tmp_path, kind):
    model = build(resumable(tmp_path))
    train(model, 1, 7)
    model.save(6, 7)
    opt = resumable(tmp_path)
    opt['train']['iters_per_epoch'] = 3
    state = read_state(tmp_path / 'training_states' / '7.state')
    kind.resume_training(build(opt), state)
    assert state['epoch'] == 2


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob('*.*') if path.suffix in ('.pth', '.state')}


def test_full_disk_leaves_the_older_state(tmp_path):
    model = build(resumable(tmp_path))
    train(model, 1, 2)
    model.save(0, 2)
    train(model, 3, 3)
    before, limits = files(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (1000, 50_000, 1_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(FileError, match=r'4\.state cannot be written: File too large'):
                model.save_training_state(0, 4)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert files(tmp_path) == before
        assert [path.name for path in (tmp_path / 'training_states').iterdir()] == ['2.state']
    assert newest_whole(tmp_path / 'training_states') == tmp_path / 'training_states' / '2.state'


def test_request_to_stop_saves(tmp_path, monkeypatch):
    opt = resumable(tmp_path)
    opt['train']['iters_per_epoch'] = 2
    model = build(opt)
    train(model, 1, 3)
    monkeypatch.setattr(restoration_model, 'received_signal', lambda: 15)
    with pytest.raises(RunStopped) as stop:
        train(model, 4, 4)
    assert (stop.value.code, stop.value.iteration, stop.value.name) == (143, 3, 'SIGTERM')
    state = tmp_path / 'training_states' / '3.state'
    assert read_state(state)['epoch'] == 1
    state.unlink()
    with pytest.raises(RunStopped):
        train(model, 4, 4)
    assert not state.exists()  # already saved

    monkeypatch.setattr(restoration_model, 'received_signal', lambda: 2)
    with pytest.raises(RunStopped) as stop:
        train(build(opt), 1, 1)
    assert (stop.value.code, stop.value.iteration) == (130, 0)


def test_validation_leaves_generators_alone(tmp_path):
    model = build(resumable(tmp_path))
    before = torch.get_rng_state()
    model.validation(DataLoader(Pairs()), 1, None)
    assert torch.equal(torch.get_rng_state(), before)
