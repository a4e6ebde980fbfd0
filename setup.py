"""Packaging of megagate: plain pip is enough, and installing compiles nothing."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def _version() -> str:
    """The version in megagate/__init__.py, read as text: no dependency is installed yet."""
    text = (ROOT / "megagate" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError("megagate/__init__.py holds no line __version__ = \"...\"")
    return match[1]


def _readme() -> str:
    path = ROOT / "README.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


setup(
    name="megagate",
    version=_version(),
    description="Pretrain gated-attention mixture-of-experts language models, in any layout the same model",
    long_description=_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megagate", "megagate.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10,<2.14",
        "deepspeed==0.19.8",  # pinned: megagate.engine.zero uses private names of it
        "transformers>=5.5.4",  # what is exported may need a newer one: megagate/checkpoint/hf/targets.py
        "tokenizers",
        "datasets",
        "wandb",
        "safetensors",
        "jsonargparse",
        "numpy",
        "pyyaml",
        "tqdm",
        "matplotlib",
        "blake3",
        "zstandard",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "import-linter", "ruff", "megatron-core==0.16.1", "gigatoken", "lm-eval[hf]"],
        "te": ["transformer-engine[pytorch]==2.20.2"],  # built from source: --no-build-isolation, see README.md
        "fast": ["gigatoken"],  # tokenizing for tools/preprocess_data.py; the tests hold its ids to those of tokenizers
        "eval": ["lm-eval[hf]"],  # examples/evaluate
    },
)
