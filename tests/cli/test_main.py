"""The command `basicsr`: help, subcommands, listings, plugins, and a run with training, resuming and testing."""

import argparse
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ast_plugin import options, plugins
from ast_plugin.cli import main as command
from ast_plugin.errors import OptionError
from tests import tiny_run

ROOT = Path(__file__).parents[2]


def basicsr(*arguments, cwd, **environment):
    """Run the command in a separate process."""
    return subprocess.run(
        [sys.executable, '-m', 'ast_plugin', *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **environment},
    )


def test_help_is_quick(tmp_path):
    before = sum(os.times()[2:4])
    result = basicsr('--help', cwd=tmp_path)
    assert result.returncode == 0
    assert all(f'  {name} ' in result.stdout for name in command.COMMANDS)
    assert sum(os.times()[2:4]) - before < 1


@pytest.mark.parametrize('name', command.COMMANDS)
def test_help_of_every_command_has_an_example(capsys, name):
    with pytest.raises(SystemExit) as caught:
        command.main([name, '--help'])
    assert caught.value.code == 0
    assert f'basicsr {name}' in capsys.readouterr().out.split('\n\n', 1)[1]


@pytest.mark.parametrize(
    ('arguments', 'complaint'),
    [
        (['tran'], 'unknown command tran, did you mean train?'),
        (['xyz'], 'unknown command xyz (available: train'),
        (['--flag'], 'unrecognized arguments: --flag'),
        (['train'], 'the following arguments are required: -opt'),
        (['train', '-opt', 'x', '--auto'], 'unrecognized arguments: --auto'),
        (['train', '-opt', 'x', '--launcher', 'mpi'], 'invalid choice'),
        (['test', '-opt'], 'expected one argument'),
        (['infer', '--tile', 'big'], 'expected a tile size in pixels, or auto, got big'),
    ],
)
def test_wrong_usage(capsys, arguments, complaint):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize('own', [{}, {'GOMP_SPINCOUNT': '7'}, {'OMP_WAIT_POLICY': 'ACTIVE'}])
def test_waiting_threads_spin_briefly_by_default(monkeypatch, capsys, own):
    for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    command.main(['options'])
    expected = own or {'GOMP_SPINCOUNT': '30000'}
    assert {name: os.environ[name] for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY') if name in os.environ} == expected


def test_without_arguments_it_helps(capsys):
    assert command.main([]) == 2
    assert 'commands:' in capsys.readouterr().err


def test_closed_stdout(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', None)
    assert command.main(['options']) == 0


def test_errors_become_lines_but_bugs(monkeypatch, capsys):
    raised = [OptionError('wrong'), KeyboardInterrupt(), ZeroDivisionError()]

    def run(args: argparse.Namespace) -> int:
        raise raised.pop(0)

    monkeypatch.setattr('ast_plugin.cli.options.run', run)
    assert [command.main(['options']) for _ in range(2)] == [2, 130]
    assert capsys.readouterr().err == 'basicsr: error: wrong\nbasicsr: interrupted\n'
    with pytest.raises(ZeroDivisionError):
        command.main(['options'])


def test_a_reader_that_leaves_is_no_error(tmp_path):
    # More than the capacity of a pipe, so that writing fails at the closed end.
    for number in range(2000):
        (tmp_path / f'{"long" * 20}{number}.yml').write_text('# what it is\n')
    code = (
        'import sys; from pathlib import Path\n'
        'from ast_plugin import options; from ast_plugin.cli.main import main\n'
        'options.reading._SHIPPED_FOLDERS = (Path("."),); sys.exit(main(["options"]))'
    )
    process = subprocess.Popen(
        [sys.executable, '-c', code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read() == ''
    process.stderr.close()


# ---- options


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / 'shipped'
    (folder / '_base_').mkdir(parents=True)
    (folder / 'AST_a.yml').write_text('# The first one.\nname: a\n')
    (folder / 'AST_longer.yml').write_bytes(b'name: \xff\n')
    (folder / '_base_' / 'part.yml').write_text('c: d\n')
    monkeypatch.setattr(options.reading, '_SHIPPED_FOLDERS', (folder,))
    monkeypatch.chdir(tmp_path)
    return folder


def test_shipped_files_have_a_sentence(capsys):
    assert command.main(['options']) == 0
    for line in capsys.readouterr().out.splitlines():
        assert line.endswith(('.', '?')), line


def test_options_are_copied_and_edited_ones_kept(shipped, capsys):
    assert command.main(['options']) == 0
    assert capsys.readouterr().out == 'AST_a       The first one.\nAST_longer\n'
    copy = Path('new/folder')
    assert command.main(['options', str(copy)]) == 0
    assert (copy / '_base_' / 'part.yml').read_text() == 'c: d\n'
    assert command.main(['options', str(copy)]) == 0
    assert '0 option files copied' in capsys.readouterr().out

    (copy / 'AST_a.yml').write_text('mine')
    (copy / 'AST_longer.yml').unlink()
    assert command.main(['options', str(copy)]) == 2
    assert 'AST_a.yml: already exists and differs' in capsys.readouterr().err
    assert (copy / 'AST_a.yml').read_text() == 'mine'
    assert not (copy / 'AST_longer.yml').exists()

    assert command.main(['options', str(copy), '--force']) == 0
    assert (copy / 'AST_a.yml').read_text() == '# The first one.\nname: a\n'
    assert command.main(['options', str(copy / 'AST_a.yml')]) == 2
    assert 'expected a folder' in capsys.readouterr().err


# ---- list and plugins


def test_list(capsys):
    assert command.main(['list', 'arch', 'losses']) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ['AST_T', 'ast_plugin.archs.ast_arch'] in [line[:2] for line in lines]
    assert ['L1Loss', 'basicsr.losses.basic_loss', 'basicsr', '1.4.2'] in lines
    assert 'SRModel' not in out
    names = [line for line in out.splitlines() if line.startswith('  ')]
    assert len({line.index(line.split()[1]) for line in names if '_arch ' in line}) == 1
    assert command.main(['list', 'ach']) == 2
    assert 'unknown registry ach, did you mean arch?' in capsys.readouterr().err


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Install plugins by name and object reference; return the folder for their modules."""
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_plugins.cache_clear()

    def install(**references):
        points = [EntryPoint(name, reference, plugins.GROUP) for name, reference in references.items()]
        monkeypatch.setattr(plugins, 'entry_points', lambda group: points if group == plugins.GROUP else [])
        return tmp_path

    yield install
    plugins.load_plugins.cache_clear()


def test_plugins_are_modules_or_functions(installed, capsys):
    folder = installed(absent='no_such_module', broken='plugin_that_breaks', one='module', two='function:register')
    (folder / 'plugin_that_breaks.py').write_text('raise RuntimeError("first line\\nsecond")')
    (folder / 'module.py').write_text('print("one imported")')
    (folder / 'function.py').write_text('def register():\n    print("two called")')
    failures = plugins.load_plugins()
    assert plugins.load_plugins() == failures
    assert [failure.split(' failed')[0] for failure in failures] == ['plugin absent', 'plugin broken']
    assert failures[1].endswith('RuntimeError: first line')
    captured = capsys.readouterr()
    assert captured.out == 'one imported\ntwo called\n'
    assert captured.err.splitlines() == [f'basicsr: warning: {failure}' for failure in failures]


# ---- a complete run


def test_training_resuming_and_testing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    tiny_run.write(tmp_path)
    result = basicsr('train', '-opt', 'tiny.yml', '--root', 'out', cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    experiment = tmp_path / 'out' / 'experiments' / 'tiny'
    weights = sorted(path.name for path in (experiment / 'models').iterdir())
    assert weights == ['net_g_2.pth', 'net_g_4.pth', 'net_g_latest.pth']
    assert tiny_run.OPTIONS in (experiment / 'tiny.yml').read_text()
    assert 'psnr' in next(experiment.glob('train_tiny_*.log')).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'out', 'tiny.yml']

    # The copy of the file in the experiment folder is equivalent.
    more = '--root out --auto_resume --local-rank 0 --force_yml train:total_iter=6 logger:use_tb_logger=true'
    assert command.main(['train', '-opt', str(experiment / 'tiny.yml'), *more.split()]) == 0
    logs = [path.read_text() for path in experiment.glob('train_tiny_*.log')]
    assert sum('Resuming training from epoch: 1, iter: 4' in log for log in logs) == 1
    assert (experiment / 'models' / 'net_g_6.pth').is_file()

    assert command.main(['test', '-opt', 'tiny.yml', '--root', 'out', '--force_yml', 'val:save_img=true']) == 0
    assert f'Testing weights {experiment}/models/net_g_latest.pth' in capfd.readouterr().out
    assert len(list((tmp_path / 'out' / 'results' / 'tiny' / 'visualization' / 'val').iterdir())) == 4
    assert [path.name for path in (tmp_path / 'out' / 'experiments').iterdir()] == ['tiny']


def test_wrong_name_is_reported_without_basicsr():
    code = (
        'import sys; from ast_plugin.cli.main import main; '
        "print([main([name, '-opt', 'AST_derian']) for name in ('train', 'test', 'check')], 'basicsr' in sys.modules)"
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.stdout.strip() == '[2, 2, 2] False'
    assert result.stderr.count('did you mean AST_derain?') == 3
