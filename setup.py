"""Packaging. Exact versions that are known to work together are in constraints.txt; here are the ranges."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithOptionFiles(build_py):
    """Put the top-level folder options/ into the wheel as ast_plugin/option_files.

    In a checkout, editable installs included, the files are read from options/ itself.
    """

    def run(self):
        super().run()
        if not self.editable_mode and (ROOT / 'options').is_dir():
            target = Path(self.build_lib, 'ast_plugin', 'option_files')
            shutil.rmtree(target, ignore_errors=True)  # files renamed since an earlier build must not travel
            shutil.copytree(ROOT / 'options', target)


def version() -> str:
    """`__version__` of the package, read without importing it."""
    text = (ROOT / 'ast_plugin' / '__init__.py').read_text(encoding='utf-8')
    return re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE).group(1)


def description() -> str:
    """README.md where it is; source trees without it can be built too."""
    readme = ROOT / 'README.md'
    return readme.read_text(encoding='utf-8') if readme.is_file() else ''


metrics = ['pyiqa>=0.1.14']
# The second holds networks whose licences restrict their use, Restormer among them.
baselines = ['spandrel>=0.4.2', 'spandrel_extra_arches>=0.2']
onnx = ['onnx>=1.16', 'onnxruntime>=1.18']
optimizers = ['pytorch-optimizer>=4.0']
docs = [f'{package}; python_version >= "3.11"' for package in ('sphinx>=8.1', 'myst-parser>=5.0', 'furo>=2024.8')]
hub = ['huggingface_hub>=0.26']
photos = ['scikit-image>=0.25', 'scikit-learn>=1.5']  # both carry the colour photographs of the demonstration

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
    # A path in a .pth file: a finder of its own would come behind an empty namespace package, which Python makes of the
    # clone itself where the working directory is the folder that holds it.
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
        'setuptools<82',  # the last with pkg_resources, which TensorBoard's nightly builds import: BasicSR asks for one
        'tifffile>=2024.8',
        'torch>=2.6',
        'torchvision>=0.21',
        'tqdm>=4.66',
        'typing_extensions>=4.12',  # TypedDict that pydantic takes before Python 3.12
    ],
    extras_require={
        'metrics': metrics,
        'baselines': baselines,
        'onnx': onnx,
        'optimizers': optimizers,
        'hub': hub,
        'photos': photos,
        'triton': ['triton>=3.2; sys_platform == "linux"'],  # PyTorch for CUDA brings the version that goes with it
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
