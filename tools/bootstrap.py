"""Make .venv with the pinned versions if it is missing, then run the demonstration or the tests, or build docs/.

    python tools/bootstrap.py setup|demo|test|docs [--torch auto|cpu|cuda] [arguments of the demonstration or of pytest]

Needs nothing but Python >= 3.10. Everything is installed from constraints.txt, torch first: BasicSR's source build asks
for torch, and under pip's build isolation it would fetch a second one. On Linux without an NVIDIA GPU a CPU build of
torch is taken; the default build there brings gigabytes of CUDA packages. A stamp in .venv marks a finished
installation, so that the next start goes straight to work; an interrupted one is taken up where it stopped.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
PYTHON = VENV / ('Scripts/python.exe' if os.name == 'nt' else 'bin/python')
CONSTRAINTS = ROOT / 'constraints.txt'
STAMP = VENV / 'ast_plugin.stamp'
OLDEST_PYTHON = (3, 10)

if sys.version_info < OLDEST_PYTHON:  # here, before annotations that an old Python cannot read
    sys.exit(
        f'bootstrap: error: Python >= 3.10 is needed, this is {sys.version.split()[0]}; '
        'call this file with a newer one, or make with PYTHON=python3.12'
    )

NO_CPU_TORCH = """no CPU build of torch {version} was found, neither by pip nor, through uv, on PyTorch's own index.
  This machine shows no NVIDIA GPU, and the default build would bring gigabytes of CUDA packages. Either
  - point pip at an index or a folder that has it (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) and run this again,
  - or take the default build all the same: python tools/bootstrap.py setup --torch cuda"""


class BootstrapError(Exception):
    """What the user has to mend, in a sentence."""


def say(text: str) -> None:
    """Print a line of our own, told apart from pip's."""
    print(f'bootstrap: {text}', file=sys.stderr, flush=True)


def pinned(package: str) -> str:
    """The version that constraints.txt pins for a package that has one pin for all Pythons."""
    match = re.search(rf'^{re.escape(package)}==(\S+)$', CONSTRAINTS.read_text(encoding='utf-8'), re.MULTILINE)
    if match is None:
        raise BootstrapError(f'constraints.txt has no line {package}==VERSION')
    return match.group(1)


def pip_install() -> list:
    """The start of a command that installs into .venv."""
    return [PYTHON, '-m', 'pip', 'install', '--no-input', '--disable-pip-version-check', '-c', CONSTRAINTS]


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run pip in .venv under the constraints.

    Raises:
        BootstrapError: if pip does.
    """
    status = subprocess.run([*pip_install(), *arguments], cwd=ROOT, env=env).returncode
    if status:
        raise BootstrapError(
            f'pip stopped with status {status} (its reason stands above) at: pip install '
            f'{" ".join(arguments)}\n  The same command takes up the installation where it stopped.'
        )


def in_venv(code: str) -> subprocess.CompletedProcess:
    """Run a line of Python in .venv and catch what it prints."""
    return subprocess.run([PYTHON, '-c', code], cwd=VENV, capture_output=True, text=True)


def installed(package: str) -> str | None:
    """The version of a package in .venv, local part (`+cpu`) included."""
    result = in_venv(f'import importlib.metadata as m; print(m.version({package!r}))')
    return result.stdout.strip() if result.returncode == 0 else None


def has_nvidia_gpu() -> bool:
    """Whether a driver answers; nothing else tells before torch is there."""
    if Path('/proc/driver/nvidia/version').exists():
        return True
    tool = shutil.which('nvidia-smi')
    return tool is not None and subprocess.run([tool, '-L'], capture_output=True).returncode == 0


def make_venv() -> None:
    """Make .venv, or complete one that was left half made; what works in it stays."""
    if in_venv_python() is None:
        say(f'making {VENV.name} with Python {sys.version.split()[0]}')
        if subprocess.run([sys.executable, '-m', 'venv', VENV]).returncode:
            raise BootstrapError(
                f'Python could not make a virtual environment in {VENV.name}; on Debian and Ubuntu '
                'install python3-venv, then run this again'
            )
    version = in_venv_python()
    if version is None or version < OLDEST_PYTHON:
        raise BootstrapError(
            f'{VENV.name} holds no Python >= {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}; '
            'remove the folder and run this again'
        )
    has_pip = in_venv('import pip._internal.cli.main').returncode == 0
    if not has_pip and in_venv('import ensurepip; ensurepip.bootstrap(default_pip=True)').returncode:
        raise BootstrapError(
            f'{VENV.name} has no pip, and Python cannot install it; remove the folder and run this again'
        )


def in_venv_python() -> tuple[int, ...] | None:
    """The version of .venv's Python, None if there is none that runs."""
    if not PYTHON.exists():
        return None
    result = in_venv('import sys; print(*sys.version_info[:2])')
    return tuple(map(int, result.stdout.split())) if result.returncode == 0 else None


def install_torch(build: str) -> None:
    """Install the pinned torch.

    Args:
        build: `cpu`; `cuda`, the package index's default, which on Linux is CUDA's; or `auto`, which keeps a build that
            is there already and else takes `cpu` on Linux without an NVIDIA GPU, the default otherwise.
    """
    version = pinned('torch')
    present = installed('torch') or ''
    if build == 'auto':
        if present.split('+')[0] == version:
            return
        build = 'cuda' if has_nvidia_gpu() else 'cpu'
    if build == 'cuda' or not sys.platform.startswith('linux'):
        pip(f'torch==={version}' if build == 'cuda' else f'torch=={version}')  # === refuses local versions such as +cpu
        return
    # A local version is matched exactly, so this never ends in a CUDA build. Most indexes have none: no error then.
    result = subprocess.run([*pip_install(), f'torch=={version}+cpu'], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if result.returncode == 0:
        return
    if not any(reason in result.stderr for reason in ('No matching distribution', 'ResolutionImpossible')):
        sys.stderr.write(result.stderr)  # not merely absent, which was to be expected
    say("pip's indexes have no CPU build of torch; asking PyTorch's own index through uv")
    pip('uv')
    command = [PYTHON, '-m', 'uv', 'pip', 'install', '--python', PYTHON, '--torch-backend=cpu', '-c', CONSTRAINTS]
    if subprocess.run([*command, 'torch', 'torchvision'], cwd=ROOT).returncode:
        raise BootstrapError(NO_CPU_TORCH.format(version=version))


def install_basicsr() -> None:
    """Build BasicSR from its source as it is, against what is already installed."""
    paths = [str(ROOT / 'tools' / 'exec_fills_locals'), os.environ.get('PYTHONPATH')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    # Only with PEP 517 does setuptools leave BasicSR's setup_requires (torch again) alone.
    pip(f'basicsr=={pinned("basicsr")}', '--no-build-isolation', '--use-pep517', env=env)


def mend_opencv() -> None:
    """Exchange OpenCV for the same version without windows where the system lacks the libraries to draw them."""
    result = in_venv('import cv2')
    if result.returncode and '.so' in result.stderr:
        say(f'OpenCV lacks a system library ({result.stderr.strip().splitlines()[-1]}); taking its headless build')
        # The headless files go over the others: basicsr asks for opencv-python by name, so that one stays recorded.
        pip(f'opencv-python-headless=={pinned("opencv-python")}', '--no-deps', '--force-reinstall')


def install(build: str) -> None:
    """Install everything, in the order that fetches nothing twice."""
    make_venv()
    install_torch(build)
    torch = installed('torch')
    pip('torchvision', 'cython', 'numpy', 'setuptools', 'wheel')
    install_basicsr()
    pip('-e', '.[photos,test]', '--no-build-isolation')
    mend_opencv()
    if installed('torch') != torch:
        raise BootstrapError(f'torch {torch} was replaced by {installed("torch")} on the way; please report this')


def fingerprint() -> str:
    """Of what decides the installation."""
    digest = hashlib.sha256()
    for path in (CONSTRAINTS, ROOT / 'setup.py'):
        digest.update(path.read_bytes())
    return f'{digest.hexdigest()} {ROOT}'


def ensure_installed(build: str) -> None:
    """Install if .venv is not what constraints.txt and setup.py say, or a build of torch is asked for by name."""
    if build == 'auto' and STAMP.is_file() and STAMP.read_text(encoding='utf-8') == fingerprint():
        return
    STAMP.unlink(missing_ok=True)
    install(build)
    STAMP.write_text(fingerprint(), encoding='utf-8')


def run(*commands: list[str]) -> int:
    """Run modules in .venv from the project's root, all of them; the first failure is the answer."""
    statuses = [subprocess.run([PYTHON, '-m', *command], cwd=ROOT).returncode for command in commands]
    return next((status for status in statuses if status), 0)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('task', choices=['setup', 'demo', 'test', 'docs'], help='test is ruff, then pytest')
    parser.add_argument(
        '--torch',
        choices=['auto', 'cpu', 'cuda'],
        default='auto',
        help='cuda: the default build, even where no GPU is found (default: auto)',
    )
    arguments, rest = parser.parse_known_args()
    try:
        ensure_installed(arguments.torch)
    except BootstrapError as error:
        say(f'error: {error}')
        return 1
    if arguments.task == 'demo':
        return run(['ast_plugin', 'demo', *rest])
    if arguments.task == 'test':
        return run(['ruff', 'check', '.'], ['pytest', '-n', 'auto', '--dist', 'worksteal', *rest])
    if arguments.task == 'docs':
        return run(['sphinx', '-W', '--keep-going', 'docs', 'docs/_build/html', *rest])
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
