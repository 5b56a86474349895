"""The command `basicsr`: help, subcommands, listings, plugins, and a run with training, resuming and testing."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from ast_plugin import options, plugins
from ast_plugin.cli import data
from ast_plugin.cli import main as command
from ast_plugin.errors import OptionError
from tests import tiny_run

from ..docs.pages import ROOT


def run_python(*arguments, cwd=None):
    """Run Python in a separate process."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


def test_help_is_quick():
    before = sum(os.times()[2:4])
    result = run_python('-m', 'ast_plugin', '--help')
    assert result.returncode == 0
    assert all(f'  {name} ' in result.stdout for name in command.COMMANDS)
    assert sum(os.times()[2:4]) - before < 1


@pytest.mark.parametrize('name', [*command.COMMANDS, *(f'data {name}' for name in data.COMMANDS)])
def test_help_of_every_command_has_an_example(capsys, name):
    with pytest.raises(SystemExit) as caught:
        command.main([*name.split(), '--help'])
    assert caught.value.code == 0
    assert f'basicsr {name}' in capsys.readouterr().out.split('\n\n', 1)[1]


@pytest.mark.parametrize(('arguments', 'known'), [([], command.COMMANDS), (['data'], data.COMMANDS)])
def test_without_a_command_it_helps(basicsr, arguments, known):
    _, err = basicsr(*arguments, status=2)
    assert all(f'\n  {name} ' in err for name in known)


def test_help_without_docstrings():
    assert '  check ' in run_python('-OO', '-m', 'ast_plugin', 'data', '--help').stdout


@pytest.mark.parametrize('own', [{}, {'GOMP_SPINCOUNT': '7'}, {'OMP_WAIT_POLICY': 'ACTIVE'}])
def test_waiting_threads_spin_briefly_by_default(monkeypatch, own):
    for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, 'stdout', None)  # a closed one
    assert command.main(['options']) == 0
    expected = own or {'GOMP_SPINCOUNT': '30000'}
    assert {name: os.environ[name] for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY') if name in os.environ} == expected


def test_errors_become_lines_but_bugs(basicsr, monkeypatch):
    def fail(args):
        raise raised.pop()

    raised = [ZeroDivisionError(), KeyboardInterrupt(), OptionError('wrong')]
    monkeypatch.setattr('ast_plugin.cli.options.run', fail)
    assert basicsr('options', status=2) == ('', 'basicsr: error: wrong\n')
    assert basicsr('options', status=130) == ('', 'basicsr: interrupted\n')
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
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    with subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, text=True, **pipes) as process:
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ('', 1)


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


def test_shipped_files_have_a_sentence(basicsr):
    assert [line for line in basicsr('options')[0].splitlines() if not line.endswith(('.', '?'))] == []


def test_options_are_copied_and_edited_ones_kept(shipped, basicsr):
    assert basicsr('options')[0] == 'AST_a       The first one.\nAST_longer\n'
    copy = Path('new/folder')
    basicsr('options', copy)
    assert (copy / '_base_' / 'part.yml').read_text() == 'c: d\n'
    assert '0 option files copied' in basicsr('options', copy)[0]

    (copy / 'AST_a.yml').write_text('mine')
    (copy / 'AST_longer.yml').unlink()
    assert 'AST_a.yml: already exists and differs' in basicsr('options', copy, status=2)[1]
    assert (copy / 'AST_a.yml').read_text() == 'mine'
    assert not (copy / 'AST_longer.yml').exists()

    basicsr('options', copy, '--force')
    assert (copy / 'AST_a.yml').read_text() == '# The first one.\nname: a\n'


# ---- list and plugins


def test_list(basicsr):
    out, _ = basicsr('list', 'arch', 'losses')
    lines = [line.split() for line in out.splitlines()]
    assert ['AST_T', 'ast_plugin.archs.ast_arch'] in [line[:2] for line in lines]
    assert ['L1Loss', 'basicsr.losses.basic_loss', 'basicsr', '1.4.2'] in lines
    assert 'SRModel' not in out
    names = [line for line in out.splitlines() if line.startswith('  ')]
    assert len({line.index(line.split()[1]) for line in names if '_arch ' in line}) == 1


def test_plugins_are_modules_or_functions(tmp_path, monkeypatch, capsys):
    references = {
        'absent': 'no_such_module',
        'broken': 'plugin_that_breaks',
        'one': 'plugin_module',
        'two': 'plugin_function:register',
    }
    (tmp_path / 'plugin_that_breaks.py').write_text('raise RuntimeError("first line\\nsecond")')
    (tmp_path / 'plugin_module.py').write_text('print("one imported")')
    (tmp_path / 'plugin_function.py').write_text('def register():\n    print("two called")')
    points = [EntryPoint(name, reference, plugins.GROUP) for name, reference in references.items()]
    monkeypatch.setattr(plugins, 'entry_points', lambda group: points if group == plugins.GROUP else [])
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_plugins.cache_clear()
    failures = plugins.load_plugins()
    assert plugins.load_plugins() == failures
    plugins.load_plugins.cache_clear()
    assert [failure.split(' failed')[0] for failure in failures] == ['plugin absent', 'plugin broken']
    assert failures[1].endswith('RuntimeError: first line')
    captured = capsys.readouterr()
    assert captured.out == 'one imported\ntwo called\n'
    assert captured.err.splitlines() == [f'basicsr: warning: {failure}' for failure in failures]


# ---- a complete run


def test_training_resuming_and_testing(tmp_path, monkeypatch, basicsr):
    monkeypatch.chdir(tmp_path)
    tiny_run.write(tmp_path)
    result = run_python('-m', 'ast_plugin', 'train', '-opt', 'tiny.yml', '--root', 'out', cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    experiment = tmp_path / 'out' / 'experiments' / 'tiny'
    weights = sorted(path.name for path in (experiment / 'models').iterdir())
    assert weights == ['net_g_2.pth', 'net_g_4.pth', 'net_g_latest.pth']
    assert tiny_run.OPTIONS in (experiment / 'tiny.yml').read_text()
    assert 'psnr' in next(experiment.glob('train_tiny_*.log')).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'out', 'tiny.yml']

    # The copy of the file in the experiment folder is equivalent.
    more = '--root out --auto_resume --local-rank 0 --force_yml train:total_iter=6 logger:use_tb_logger=true'
    basicsr('train', '-opt', experiment / 'tiny.yml', *more.split())
    logs = [path.read_text() for path in experiment.glob('train_tiny_*.log')]
    assert sum('Resuming training from epoch: 1, iter: 4' in log for log in logs) == 1
    assert (experiment / 'models' / 'net_g_6.pth').is_file()

    out, _ = basicsr('test', '-opt', 'tiny.yml', '--root', 'out', '--force_yml', 'val:save_img=true')
    assert f'Testing weights {experiment}/models/net_g_latest.pth' in out
    assert len(list((tmp_path / 'out' / 'results' / 'tiny' / 'visualization' / 'val').iterdir())) == 4
    assert [path.name for path in (tmp_path / 'out' / 'experiments').iterdir()] == ['tiny']


def test_wrong_name_is_reported_without_basicsr():
    code = (
        'import sys; from ast_plugin.cli.main import main; '
        "print([main([name, '-opt', 'AST_derian']) for name in ('train', 'test', 'check')], 'basicsr' in sys.modules)"
    )
    result = run_python('-c', code)
    assert result.stdout.strip() == '[2, 2, 2] False'
    assert result.stderr.count('did you mean AST_derain?') == 3


def test_data_commands_do_not_import_torch():
    result = run_python('-c', 'import sys; import ast_plugin.cli.data; print(*sys.modules)')
    assert 'ast_plugin.cli.data' in result.stdout.split() and 'torch' not in result.stdout.split()
