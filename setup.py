"""Packaging, with version ranges. Pinned versions that are known to work together are in constraints.txt."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithOptionFiles(build_py):
    """Copy the top-level folder options/ into the wheel as ast_plugin/option_files.

    In a checkout, including editable installs, the files are read from options/ directly.
    """

    def run(self):
        super().run()
        if not self.editable_mode and (ROOT / 'options').is_dir():
            target = Path(self.build_lib, 'ast_plugin', 'option_files')
            shutil.rmtree(target, ignore_errors=True)  # remove files that were renamed since an earlier build
            shutil.copytree(ROOT / 'options', target)


def version() -> str:
    """Return the package's `__version__` without importing it."""
    text = (ROOT / 'ast_plugin' / '__init__.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE).group(1)


def description() -> str:
    """Return the text of README.md, or an empty string for source trees without it."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


metrics = ['pyiqa>=0.1.14']
# The second package contains networks with restrictive licences, such as Restormer.
baselines = ['spandrel>=0.4.2', 'spandrel_extra_arches>=0.2']
onnx = ['onnx>=1.16', 'onnxruntime>=1.18']
optimizers = ['pytorch-optimizer>=4.0']
docs = [f'{package}; python_version >= "3.11"' for package in ('sphinx>=8.1', 'myst-parser>=5.0', 'furo>=2024.8')]
hub = ['huggingface_hub>=0.26']
photos = ['scikit-image>=0.25', 'scikit-learn>=1.5']  # both include the colour photographs of the demo

setup(
    name='ast_plugin',
    version=version(),
    description='AST, the Adaptive Sparse Transformer for image restoration, as a plugin for BasicSR',
    long_description=description(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['ast_plugin', 'ast_plugin.*']),
    package_data={
        'ast_plugin.compare': ['report_template.html'],
        'ast_plugin.weights': ['*.safetensors', 'SHA256SUMS'],
    },
    # Use a path in a .pth file: with an import finder, the clone itself would be found first as an empty namespace
    # package when the working directory is its parent folder.
    options={'editable_wheel': {'mode': 'compat'}},
    cmdclass={'build_py': BuildWithOptionFiles},
    python_requires='>=3.10',
    install_requires=[
        'basicsr==1.4.2',
        'einops>=0.7',
        'Jinja2>=3.1',
        'lmdb>=1.4',
        'matplotlib>=3.8',
        'mmengine>=0.10.7',
        'numpy>=1.26',
        'opencv-python>=4.8',
        'Pillow>=10.1',
        'pydantic>=2.7',
        'PyYAML>=6.0',
        'safetensors>=0.4.3',
        'scipy>=1.15',
        'setuptools<82',  # last with pkg_resources, needed by the TensorBoard nightly build that BasicSR requires
        'tifffile>=2024.8',
        'torch>=2.6',
        'torchvision>=0.21',
        'tqdm>=4.66',
        'typing_extensions>=4.12',  # TypedDict as pydantic requires it before Python 3.12
    ],
    extras_require={
        'metrics': metrics,
        'baselines': baselines,
        'onnx': onnx,
        'optimizers': optimizers,
        'hub': hub,
        'photos': photos,
        'triton': ['triton>=3.2; sys_platform == "linux"'],  # CUDA builds of PyTorch install the matching version
        'wandb': ['wandb>=0.16'],
        'web': ['gradio>=6.31,<7'],
        'docs': docs,
        'test': [
            *baselines,
            *docs,
            *hub,
            *onnx,
            *optimizers,
            *photos,
            'playwright>=1.50',
            'pytest>=8.0',
            'pytest-xdist>=3.6',
            'ruff>=0.9',
            'wheel',
        ],
    },
    entry_points={
        'console_scripts': ['basicsr = ast_plugin.__main__:main'],
        'basicsr.plugins': ['ast_plugin = ast_plugin'],
    },
    classifiers=[
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Topic :: Scientific/Engineering :: Image Processing',
    ],
)
