"""Create .venv with the pinned versions if needed, then run the demo or the tests, or build docs/.

    python tools/bootstrap.py setup|demo|test|docs [--torch auto|cpu|cuda] [arguments of the demo or of pytest]

Requires only Python >= 3.10. All packages are pinned by constraints.txt. torch is installed first, because BasicSR's
source build requires it and pip's build isolation would download a second copy. On Linux without an NVIDIA GPU a CPU
build of torch is used; the default build would add gigabytes of CUDA packages. A stamp file in .venv marks a completed
installation, which later calls reuse; an interrupted installation is resumed.
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

if sys.version_info < OLDEST_PYTHON:  # checked before annotations that older versions cannot parse
    sys.exit(
        f'bootstrap: error: expected Python >= 3.10, got {sys.version.split()[0]}; '
        'run this file with a newer Python, or make with PYTHON=python3.12'
    )

NO_CPU_TORCH = """no CPU build of torch {version} was found by pip, nor by uv on PyTorch's own index.
  No NVIDIA GPU was detected, and the default build would install gigabytes of CUDA packages. Either
  - point pip at an index or a folder that has it (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) and run this again,
  - or install the default build anyway: python tools/bootstrap.py setup --torch cuda"""


class BootstrapError(Exception):
    """An error that the user can fix; the message is one sentence."""


def say(text: str) -> None:
    """Print a line with a prefix that distinguishes it from pip's output."""
    print(f'bootstrap: {text}', file=sys.stderr, flush=True)


def pinned(package: str) -> str:
    """Return the version pinned by constraints.txt for a package with a single pin for all Python versions."""
    match = re.search(rf'^{re.escape(package)}==(\S+)$', CONSTRAINTS.read_text(encoding='utf-8'), re.MULTILINE)
    if match is None:
        raise BootstrapError(f'constraints.txt has no line {package}==VERSION')
    return match.group(1)


def pip_install() -> list:
    """Return the start of a pip command that installs into .venv."""
    return [PYTHON, '-m', 'pip', 'install', '--no-input', '--disable-pip-version-check', '-c', CONSTRAINTS]


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run pip in .venv with the constraints.

    Raises:
        BootstrapError: if pip fails.
    """
    status = subprocess.run([*pip_install(), *arguments], cwd=ROOT, env=env).returncode
    if status:
        raise BootstrapError(
            f'pip stopped with status {status} (see its output above) for: pip install '
            f'{" ".join(arguments)}\n  Run the same command again to resume the installation.'
        )


def in_venv(code: str) -> subprocess.CompletedProcess:
    """Run a line of Python in .venv and capture its output."""
    return subprocess.run([PYTHON, '-c', code], cwd=VENV, capture_output=True, text=True)


def installed(package: str) -> str | None:
    """Return the version of a package in .venv, including the local part (`+cpu`); None if it is not installed."""
    result = in_venv(f'import importlib.metadata as m; print(m.version({package!r}))')
    return result.stdout.strip() if result.returncode == 0 else None


def has_nvidia_gpu() -> bool:
    """Return whether an NVIDIA driver responds; torch is not available yet to detect GPUs."""
    if Path('/proc/driver/nvidia/version').exists():
        return True
    tool = shutil.which('nvidia-smi')
    return tool is not None and subprocess.run([tool, '-L'], capture_output=True).returncode == 0


def make_venv() -> None:
    """Create .venv, or complete a partial one; a working environment is kept."""
    if in_venv_python() is None:
        say(f'creating {VENV.name} with Python {sys.version.split()[0]}')
        if subprocess.run([sys.executable, '-m', 'venv', VENV]).returncode:
            raise BootstrapError(
                f'Python could not create a virtual environment in {VENV.name}; on Debian and Ubuntu '
                'install python3-venv, then run this again'
            )
    version = in_venv_python()
    if version is None or version < OLDEST_PYTHON:
        raise BootstrapError(
            f'{VENV.name} has no Python >= {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]}; remove the folder and run this again'
        )
    has_pip = in_venv('import pip._internal.cli.main').returncode == 0
    if not has_pip and in_venv('import ensurepip; ensurepip.bootstrap(default_pip=True)').returncode:
        raise BootstrapError(
            f'{VENV.name} has no pip, and Python cannot install it; remove the folder and run this again'
        )


def in_venv_python() -> tuple[int, ...] | None:
    """Return the version of .venv's Python, or None if it does not exist or run."""
    if not PYTHON.exists():
        return None
    result = in_venv('import sys; print(*sys.version_info[:2])')
    return tuple(map(int, result.stdout.split())) if result.returncode == 0 else None


def install_torch(build: str) -> None:
    """Install the pinned torch.

    Args:
        build: `cpu`; `cuda`, the default build of the package index (CUDA on Linux); or `auto`, which keeps an existing
            build, and otherwise selects `cpu` on Linux without an NVIDIA GPU and the default elsewhere.
    """
    version = pinned('torch')
    present = installed('torch') or ''
    if build == 'auto':
        if present.split('+')[0] == version:
            return
        build = 'cuda' if has_nvidia_gpu() else 'cpu'
    if build == 'cuda' or not sys.platform.startswith('linux'):
        pip(f'torch==={version}' if build == 'cuda' else f'torch=={version}')  # === excludes local versions like +cpu
        return
    # A local version is matched exactly, so this never installs a CUDA build. Most indexes have none; that is no error.
    result = subprocess.run([*pip_install(), f'torch=={version}+cpu'], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if result.returncode == 0:
        return
    if not any(reason in result.stderr for reason in ('No matching distribution', 'ResolutionImpossible')):
        sys.stderr.write(result.stderr)  # a failure other than the expected absence
    say("pip's indexes have no CPU build of torch; trying PyTorch's own index through uv")
    pip('uv')
    command = [PYTHON, '-m', 'uv', 'pip', 'install', '--python', PYTHON, '--torch-backend=cpu', '-c', CONSTRAINTS]
    if subprocess.run([*command, 'torch', 'torchvision'], cwd=ROOT).returncode:
        raise BootstrapError(NO_CPU_TORCH.format(version=version))


def install_basicsr() -> None:
    """Build BasicSR from its unmodified source, against the installed packages."""
    paths = [str(ROOT / 'tools' / 'exec_fills_locals'), os.environ.get('PYTHONPATH')]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    # Without PEP 517 setuptools would install BasicSR's setup_requires (torch again).
    pip(f'basicsr=={pinned("basicsr")}', '--no-build-isolation', '--use-pep517', env=env)


def fix_opencv() -> None:
    """Replace OpenCV with the headless build of the same version if the system lacks its GUI libraries."""
    result = in_venv('import cv2')
    if result.returncode and '.so' in result.stderr:
        say(f'OpenCV lacks a system library ({result.stderr.strip().splitlines()[-1]}); installing the headless build')
        # The headless files overwrite the others; opencv-python stays installed by name because basicsr requires it.
        pip(f'opencv-python-headless=={pinned("opencv-python")}', '--no-deps', '--force-reinstall')


def install(build: str) -> None:
    """Install everything, in an order that downloads nothing twice."""
    make_venv()
    install_torch(build)
    torch = installed('torch')
    pip('torchvision', 'cython', 'numpy', 'setuptools', 'wheel')
    install_basicsr()
    pip('-e', '.[photos,test]', '--no-build-isolation')
    fix_opencv()
    if installed('torch') != torch:
        raise BootstrapError(f'torch {torch} was replaced by {installed("torch")} meanwhile; please report this')


def fingerprint() -> str:
    """Return a digest of everything that determines the installation."""
    digest = hashlib.sha256()
    for path in (CONSTRAINTS, ROOT / 'setup.py'):
        digest.update(path.read_bytes())
    return f'{digest.hexdigest()} {ROOT}'


def ensure_installed(build: str) -> None:
    """Install if constraints.txt or setup.py have changed, or if a build of torch is requested by name."""
    if build == 'auto' and STAMP.is_file() and STAMP.read_text(encoding='utf-8') == fingerprint():
        return
    STAMP.unlink(missing_ok=True)
    install(build)
    STAMP.write_text(fingerprint(), encoding='utf-8')


def run(*commands: list[str]) -> int:
    """Run all modules in .venv from the project root; return the first nonzero exit status, or 0."""
    statuses = [subprocess.run([PYTHON, '-m', *command], cwd=ROOT).returncode for command in commands]
    return next((status for status in statuses if status), 0)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('task', choices=['setup', 'demo', 'test', 'docs'], help='test runs ruff, then pytest')
    parser.add_argument(
        '--torch',
        choices=['auto', 'cpu', 'cuda'],
        default='auto',
        help='cuda: the default build, even if no GPU is found (default: auto)',
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
