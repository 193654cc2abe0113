import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
INIT = (ROOT / "dreamprm_dist" / "__init__.py").read_text("utf-8")
GENERATE = ["openai>=2.0"]
SERVE = ["fastapi>=0.115", "uvicorn>=0.30"]
TRACK = ["tensorboard", "wandb"]

setup(
    name="dreamprm_dist",
    version=re.search(r'__version__ = "(.+)"', INIT)[1],
    description="Distributed trainer for multimodal process reward models with noisy labels",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[
        *find_packages(include=["dreamprm_dist*", "data_tools*"]),
        "dreamprm_dist.ds_configs",
    ],
    package_dir={"dreamprm_dist.ds_configs": "ds_configs"},
    package_data={
        "dreamprm_dist.ds_configs": ["*.json"],
        "dreamprm_dist.report": ["page.html"],
        "dreamprm_dist.serving": ["docs.html", "page.html"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9,<3",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.24,<6",
        "accelerate>=1.8,<2",
        "huggingface-hub>=1.31",
        "datasets>=3.0",
        "pillow>=10.3",
        "pyyaml>=6.0",
        "mpi4py>=4.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pandas>=2.1",
        "pyarrow>=16",
        "safetensors>=0.8",
        "tqdm>=4.66.3",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.6"],
        "generate": GENERATE,
        "serve": SERVE,
        "track": TRACK,
        "dev": [
            *GENERATE,
            *SERVE,
            *TRACK,
            "codespell[toml]==2.4.*",
            "hypothesis",
            "mypy==2.4.*",
            "pandas-stubs",
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "ruff==0.17.*",
            "scikit-learn>=1.4",
            "types-PyYAML",
            "types-tqdm",
        ],
    },
)
