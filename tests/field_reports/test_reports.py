"""Situations from public issue trackers of restoration toolboxes, trainers and image tools."""

import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ast_plugin.cli.main import main
from ast_plugin.data.matching import list_images
from ast_plugin.errors import DataError, OptionError, TrainingError
from ast_plugin.models import training_run
from ast_plugin.models.restoration_model import RestorationModel
from ast_plugin.options import safe_yaml
from tests import tiny_run
from tests.data.images import touch
from tests.models import test_restoration_model as model_tests


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a working directory with the tiny run of RestorationModel."""
    file = tiny_run.write(tmp_path)
    file.write_text(file.read_text().replace('SRModel', 'RestorationModel'))
    monkeypatch.chdir(tmp_path)
    from basicsr.utils import logger

    monkeypatch.setattr(logger, 'initialized_logger', {})
    return tmp_path


def complaint(capfd, *arguments):
    capfd.readouterr()
    assert main(list(arguments)) == 2
    return capfd.readouterr().err


class Unpaired(Dataset):
    """Degraded images without clean ones, of the size of the training patches."""

    opt = {'name': 'unpaired'}

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {'lq': torch.full((3, 16, 16), 0.5), 'lq_path': f'{index}.png'}


def test_validation_without_gt(tmp_path):
    """XPixelGroup/BasicSR#547: metrics never use the gt of the preceding training batch."""
    model = model_tests.build(model_tests.options(tmp_path))
    model_tests.train(model, 1, 1)
    batch = model_tests.batch()
    model.feed_data({key: image[:1] for key, image in batch.items()})
    results = model.measure(DataLoader(Unpaired()))
    assert len(results.restored) == 2 and not results.mean()
    model.feed_data(batch)
    notes = []
    model.note = notes.append
    model.validation(DataLoader(Unpaired()), 1, None, False)
    assert notes == ['unpaired is restored but not measured: it has no gt']


@pytest.mark.parametrize(
    ('old', 'new', 'expected'),
    [
        ('\nval:\n', '\nlater:\n', 'val: required to measure datasets.val'),
        ('\n  val:\n    name: val\n', '\n  test:\n    name: val\n', 'datasets.val: required by the section val'),
    ],
)
def test_validation_that_never_runs(folder, capfd, old, new, expected):
    """neosr-project/neosr#3, XPixelGroup/BasicSR#623: an incomplete configuration of validation is an error."""
    text = (folder / 'tiny.yml').read_text()
    assert old in text
    (folder / 'tiny.yml').write_text(text.replace(old, new))
    for command in ('check', 'train'):
        assert expected in complaint(capfd, command, '-opt', 'tiny.yml')
    assert not (folder / 'experiments').exists()


def test_torchrun_without_launcher(folder, capfd, monkeypatch):
    """XPixelGroup/HAT#114: processes without a common group would all write to one folder."""
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    for command in ('train', 'test'):
        assert 'add `--launcher pytorch`' in complaint(capfd, command, '-opt', 'tiny.yml')
    assert not (folder / 'experiments').exists()


def test_damaged_training_image_saves(folder, capfd):
    """XPixelGroup/BasicSR#254: progress before a damaged image is saved, and training resumes bit-exactly."""
    arguments = ['train', '-opt', 'tiny.yml', '--force_yml', 'datasets:train:type=PairsDataset', 'val:val_freq=9']
    arguments.append('logger:save_checkpoint_freq=9')
    assert main(arguments) == 0
    expected = torch.load('experiments/tiny/models/net_g_latest.pth', weights_only=True)['params']
    for number in (1, 2, 3):  # one of them, or two, are of the second iteration; the first image is tried beforehand
        path = folder / 'data' / 'gt' / f'{number}.png'
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        message = complaint(capfd, *arguments)
        path.write_bytes(whole)
        if 'Iteration 1 is saved' in message:
            break
    assert f'{number}.png' in message and 'resume with --auto_resume' in message
    assert (folder / 'experiments' / 'tiny' / 'training_states' / '1.state').is_file()
    assert main([*arguments, '--auto_resume']) == 0
    resumed = torch.load('experiments/tiny/models/net_g_latest.pth', weights_only=True)['params']
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        (r'a: "D:\train\lq"', "unknown escape character 'l'"),
        (r'a: "D:\train\new"', r"contains '\t'"),
        (r'a: "C:\Users\me"', 'expected escape sequence'),
    ],
)
def test_backslashes_in_double_quotes(text, expected):
    """SYSU-SAIL/DASR#57: a Windows path in double quotes contains escape sequences."""
    with pytest.raises(OptionError, match='write paths with / or in single quotes') as caught:
        safe_yaml.read_text(text, 'my.yml')
    assert expected in str(caught.value)
    assert safe_yaml.read_text(text.replace('"', "'"), 'my.yml') == {'a': text[4:-1]}


def test_training_beside_another(folder, capfd, monkeypatch):
    """XPixelGroup/HAT#114: a second training of the same name would rename the folder of the running one."""
    experiment = folder / 'experiments' / 'tiny'
    experiment.mkdir(parents=True)
    monkeypatch.setattr(training_run, '_PATIENCE', 0.0)
    module = SimpleNamespace(build_model=str)
    with training_run._lock_and_save_on_error(module, experiment):
        module.build_model({})
        for more in ((), ('--auto_resume',)):
            message = complaint(capfd, 'train', '-opt', 'tiny.yml', *more)
            assert 'another training with this name is running there' in message
    assert [path.name for path in experiment.parent.iterdir()] == ['tiny'] and not list(experiment.iterdir())


def test_killed_worker_is_explained():
    """XPixelGroup/BasicSR#59: advice for low shared memory in containers, not a traceback from the backward pass."""
    explained = pytest.raises(TrainingError, match=r'num_worker_per_gpu.*--shm-size')
    with explained, training_run._lock_and_save_on_error(SimpleNamespace(build_model=str), None):
        raise RuntimeError('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible')


def test_killed_worker_saves(folder, capfd, monkeypatch):
    """XPixelGroup/BasicSR#59: a worker killed during an iteration is reported after it, and the state is saved."""
    monkeypatch.setattr(signal_handling, '_SIGCHLD_handler_set', False)
    list(DataLoader([0], num_workers=1))  # has torch set its handler of dead workers, as once a process
    step = RestorationModel.optimize_parameters

    def optimize_parameters(self, current_iter):
        for process in multiprocessing.active_children():
            process.kill()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # not join, which would take the news
        step(self, current_iter)

    monkeypatch.setattr(RestorationModel, 'optimize_parameters', optimize_parameters)
    arguments = ['datasets:train:num_worker_per_gpu=1', 'val:val_freq=9', 'logger:save_checkpoint_freq=9']
    message = complaint(capfd, 'train', '-opt', 'tiny.yml', '--force_yml', *arguments)
    assert 'a data worker is gone' in message and 'Iteration 1 is saved' in message
    assert (folder / 'experiments' / 'tiny' / 'training_states' / '1.state').is_file()


def test_folder_of_more_than_images(tmp_path):
    """xinntao/Real-ESRGAN#499: folders named like an image are no images; victorca25/traiNNer#70: nor is an LMDB."""
    touch(tmp_path, 'a.png', 'more.png/b.png')
    assert list_images(str(tmp_path), 'train') == ['a.png']
    with pytest.raises(DataError, match='is an LMDB: set io_backend'):
        list_images(str(touch(tmp_path / 'lq.lmdb', 'data.mdb')), 'train')
