"""Packaging: four import packages from one tree, each named as the folder that holds it."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="megatron-copsd",
    version="0.1.0",
    description="Crosslingual on-policy self-distillation on Megatron-Core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    # Hugging Face publishes a package named "kernels" that transformers and SGLang look for, and "tools" and "launch"
    # are anybody's names: those folders are no packages, and hold one of a name of our own.
    package_dir={
        "copsd_kernels": "kernels/copsd_kernels",
        "copsd_launch": "launch/copsd_launch",
        "copsd_tools": "tools/copsd_tools",
    },
    packages=[
        *find_packages(include=["megatron_copsd", "megatron_copsd.*"]),
        *find_packages("kernels"),
        *find_packages("launch"),
        *find_packages("tools"),
    ],
    install_requires=[
        "accelerate>=1.0",
        "datasets>=4.0",
        "matplotlib>=3.8",
        "megatron-core>=0.16.1,<0.20",
        "nemo-run>=0.11",
        "httpx>=0.27",
        "leptonai<0.27",  # nemo-run imports leptonai.api.v1, which later releases removed
        "numpy>=1.26",
        "omegaconf>=2.3",
        "pyarrow>=16.0",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "regex>=2024.5",
        "rich>=13.7",
        "sacrebleu>=2.4",
        "safetensors>=0.4.3",
        "tensorboard>=2.16",
        "torch>=2.11",
        "transformers>=5.0",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        # Transformer Engine builds against the CUDA of the machine; Apex is not on PyPI (see README).
        "gpu": ["transformer-engine[pytorch]>=2.0"],
        "bench": ["cut-cross-entropy>=25.1", "liger-kernel>=0.8"],  # what copsd bench kernels compares with
        "wandb": ["wandb>=0.17"],
        "smollm2": ["gguf>=0.10"],
        "sdrrl": ["lingua-language-detector>=2.0", "cld3-py>=3.1", "ctranslate2>=4.5"],
        "test": [
            "pytest>=8.0",
            "pytest-cov>=6.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "mypy>=1.18",
            "types-PyYAML>=6.0",
            "psutil>=5.9",
            "cld3-py>=3.1",
            "ctranslate2>=4.5",
            "cut-cross-entropy>=25.1",
            "gguf>=0.10",
            "lingua-language-detector>=2.0",
            "liger-kernel>=0.8",
            "peft>=0.18",  # exported adapters are compared with it
        ],
    },
    entry_points={"console_scripts": ["copsd = copsd_tools.cli:main"]},
)
