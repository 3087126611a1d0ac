"""The stand-ins refuse what the real modules lack; the lists are what the recorder writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tensorrt_record
from tensorrt_stand_in import VERSIONS, Library, read_record

every_release = pytest.mark.parametrize("library", VERSIONS, indirect=True)

# What a release has (True) or refuses; the design's table, and what moved between releases.
NAMES = {
    "BuilderFlag.FP16": {"10.3": True, "10.16": True, "11.4": False},
    "BuilderFlag.INT8": {"10.3": True, "10.16": True, "11.4": False},
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH": {"10.3": True, "10.16": True, "11.4": False},
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": {"10.3": True, "10.16": True, "11.4": True},
    "IInt8EntropyCalibrator2": {"10.3": True, "10.16": True, "11.4": False},
    "ITensor.set_dynamic_range": {"10.3": True, "10.16": True, "11.4": False},
    "ICudaEngine.num_bindings": {"10.3": False, "10.16": False, "11.4": False},
    "IExecutionContext.execute_async_v2": {"10.3": False, "10.16": False, "11.4": False},
    "IExecutionContext.execute_async_v3": {"10.3": True, "10.16": True, "11.4": True},
    "ICudaEngine.create_runtime_config": {"10.3": False, "10.16": True, "11.4": True},
    "IBuilderConfig.max_workspace_size": {"10.3": False, "10.16": False, "11.4": False},
    "IProgressMonitor.step_complete": {"10.3": True, "10.16": True, "11.4": True},
    "ComputeCapability": {"10.3": False, "10.16": False, "11.4": False},
    "DataType.UINT8": {"10.3": True, "10.16": True, "11.4": True},
    "float16": {"10.3": True, "10.16": True, "11.4": True},
}


def has(module: Any, dotted: str) -> bool:
    owner, _, name = dotted.rpartition(".")
    return hasattr(getattr(module, owner) if owner else module, name)


@every_release
@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_release(library: Library, name: str) -> None:
    release = ".".join(library.module.__version__.split(".")[:2])
    assert has(library.module, name) is NAMES[name][release]


@pytest.mark.parametrize("library", ["11.4"], indirect=True)
def test_flag_that_11_dropped_is_refused_where_it_is_used(library: Library) -> None:
    config = library.new("IBuilderConfig", flags=set())
    with pytest.raises(AttributeError, match="FP16"):
        config.set_flag(library.module.BuilderFlag.FP16)


# Each breaks one rule of a recorded signature.
REFUSED: dict[str, Callable[[Library, Any, Any], object]] = {
    "an argument too many": lambda lib, trt, config: config.clear_flag(trt.BuilderFlag.TF32, 1),
    "an argument too few": lambda lib, trt, config: config.clear_flag(),
    "another keyword": lambda lib, trt, config: config.clear_flag(which=trt.BuilderFlag.TF32),
    "a number for an enum": lambda lib, trt, config: config.clear_flag(7),
    "another enum": lambda lib, trt, config: config.clear_flag(trt.MemoryPoolType.WORKSPACE),
    "text for a number": lambda lib, trt, config: config.set_memory_pool_limit(
        trt.MemoryPoolType.WORKSPACE, "1 GiB"
    ),
    "None for an object": lambda lib, trt, config: trt.Builder(None),
    "a class without a constructor": lambda lib, trt, config: trt.IBuilderConfig(),
    "the name of an unnamed argument": lambda lib, trt, config: lib.new(
        "Dims", shape=(1,)
    ).__getitem__(arg0=0),
    "a logger whose base was not made": lambda lib, trt, config: trt.Builder(
        trt.ILogger.__new__(trt.ILogger)
    ),
    "an enum by a name in brackets": lambda lib, trt, config: trt.DataType["HALF"],
    "an enum in a loop": lambda lib, trt, config: list(trt.DataType),
    "a property of another type": lambda lib, trt, config: setattr(
        config, "profiling_verbosity", "detailed"
    ),
}


@every_release
@pytest.mark.parametrize("what", REFUSED)
def test_call_that_pybind_would_refuse(library: Library, what: str) -> None:
    config = library.new("IBuilderConfig", flags=set())
    with pytest.raises(TypeError):
        REFUSED[what](library, library.module, config)


@every_release
def test_attributes_that_are_not_there_cannot_be_set(library: Library) -> None:
    config = library.new("IBuilderConfig", flags=set())
    config.progress_monitor = library.module.IProgressMonitor()
    with pytest.raises(AttributeError):
        config.max_workspace_size = 1 << 30
    with pytest.raises(AttributeError):
        config.num_optimization_profiles = 2  # to be read only


@every_release
def test_call_without_a_script_is_said(library: Library) -> None:
    config = library.new("IBuilderConfig", flags=set())
    with pytest.raises(AssertionError, match=r"no script for IBuilderConfig\.reset"):
        config.reset()


def test_enum_values_are_those_of_the_release() -> None:
    """The bit of one flag moved; whoever writes a number instead of its name is wrong on one."""
    flags = [
        read_record(f"tensorrt-{version}")["enums"]["NetworkDefinitionCreationFlag"]
        for version in VERSIONS
    ]
    assert [flag["STRONGLY_TYPED"] for flag in flags] == [1, 1, 0]


def test_recorded_list_is_that_of_the_installed_module() -> None:
    """The recorder against a module that runs."""
    installed = pytest.importorskip(
        "tensorrt_rtx", reason="needs tensorrt_rtx", exc_type=ImportError
    )
    recorded = read_record("tensorrt_rtx-1.7")
    found = tensorrt_record.list_module("tensorrt_rtx")
    if installed.__version__ != recorded["version"]:
        pytest.skip(f"the list is of {recorded['version']}, not {installed.__version__}")
    assert found == recorded


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        (
            "set_flag(self: tensorrt.IBuilderConfig, flag: tensorrt.BuilderFlag) -> None\n\nSets.",
            ["(flag: BuilderFlag) -> None"],
        ),
        (
            "load(*args, **kwargs)\nOverloaded function.\n\n"
            "1. load(self: t.Runtime, plan: typing_extensions.Buffer) -> t.ICudaEngine\n\n"
            "2. load(self: t.Runtime, reader: t.IStreamReader) -> t.ICudaEngine\n",
            ["(plan: Buffer) -> ICudaEngine", "(reader: IStreamReader) -> ICudaEngine"],
        ),
        (
            "f(self: a.B, kind: a.Kind = <Kind.X: 0>, n: typing.SupportsInt = 3) -> list[a.Dims]",
            ["(kind: Kind = ..., n: SupportsInt = ...) -> list[Dims]"],
        ),
        ("(arg0: a.B) -> nvinfer1::Level", ["(arg0: B) -> Level"]),
        ("add_x(self: a.B) -> a.IPoolingLayer", []),
        ("A sentence (with brackets) -> and an arrow", []),
        ("", []),
    ],
)
def test_signatures_are_read_from_docstrings(docstring: str, expected: list[str]) -> None:
    assert tensorrt_record._signatures(docstring) == expected
