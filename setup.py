"""Metadata and dependencies; the exact versions that CI ran are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "ddp_ssl/__init__.py").read_text())
assert VERSION is not None

setup(
    name="ddp_ssl",
    version=VERSION.group(1),
    description="Self-supervised visual pretraining on many GPUs: losses over the global batch, "
    "DALI input, AdaDim, any number of views, exact at any world size and on resume",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    # A checkout has its configs beside the package, a wheel inside it: config/files.py finds both.
    packages=[*find_packages(include=["ddp_ssl", "ddp_ssl.*"]), "ddp_ssl.configs"],
    package_dir={"ddp_ssl.configs": "configs"},
    package_data={"": ["py.typed", "**/*.yaml", "**/*.txt", "**/*.csv"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "torch>=2.8",
        "torchvision>=0.23",
        "timm>=1.0.15",
        "pydantic>=2.10,<3",
        "pyyaml>=6.0.1",
        "numpy>=1.26",
        "pillow>=10",
        "tensorboard>=2.16",
        "submitit>=1.5",
        "scikit-learn>=1.4",  # the handwritten digits of the embedded default
        "scipy>=1.11",  # intervals of accuracies
        "torchmetrics>=1.4",
        "safetensors>=0.4",
    ],
    extras_require={
        # DALI is built per CUDA major version and runs without a GPU too.
        "cuda12": ["nvidia-dali-cuda120>=2.2"],
        "cuda13": ["nvidia-dali-cuda130>=2.2"],
        "plots": ["matplotlib>=3.9"],
        "onnx": ["onnx>=1.17", "onnxscript>=0.7", "onnxruntime>=1.20"],
        "parquet": ["pyarrow>=15"],
        "remote": ["obstore>=0.8"],
        "wandb": ["wandb>=0.31"],
        # lightly: an independent implementation of several losses, for the tests alone.
        "dev": [
            *("pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "mypy>=1.14", "types-PyYAML"),
            *("lightly==1.6.*", "pyarrow>=15", "obstore>=0.8", "webdataset>=1.0"),
        ],
    },
    entry_points={"console_scripts": ["ddp-ssl = ddp_ssl.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
