"""Stand-ins for TensorRT, made from the recorded lists of what each release's module has.

A stand-in has the classes, methods, properties, enum members and constants of its list and nothing
else, so that Python itself refuses every other name; each call is held against the recorded
signatures, overload by overload. What the calls do is scripted below, and only for what building an
engine from an ONNX file and running it take: a call that is in the list but not scripted fails the
test. An "engine" is the ONNX file behind a line of JSON; ONNX Runtime computes what it computes.
"""

from __future__ import annotations

import enum
import functools
import importlib.machinery
import inspect
import json
import re
import sys
import threading
import time
import types
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_cuda import FakeCuda

FOLDER = Path(__file__).parent
VERSIONS = ("10.3", "10.16", "11.4")

MEMORY_BYTES = 1000  # what a context needs for its intermediate results

_MAGIC = b"stand-in "
_NUMPY_TYPES = {"FLOAT": np.float32, "UINT8": np.uint8}

# What refers to something of the library's that it does not keep alive in every release.
_RELEASED = ("IExecutionContext", "IRuntimeConfig", "IRuntimeCache", "ICudaEngine", "Runtime")

# What a scripted call does with the library, the object, and the call's arguments.
_SCRIPT: dict[str, Callable[..., Any]] = {}


def read_record(name: str) -> dict[str, Any]:
    """The list that ``tensorrt_record.py`` wrote, e.g. ``tensorrt-10.3``."""
    record: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return record


class Library:
    """A stand-in, and what a test may set or read.

    Args:
        record: As :func:`read_record` returns it.
        cuda: Where its engines' tensors lie.

    Attributes:
        module: The stand-in; it has the names of the list alone.
        failing: Calls that fail as the library's do, e.g. ``Builder.build_serialized_network``,
            and the errors that they log.
        listing: What the builder's log says of the engine's layers, where a test wants another.
        timing_threads: How many threads of the builder tell its monitor at once.
        parser_errors: What the parser finds: (description, operator, name of the node).
        said: All that was logged.
        batches: The batch of every inference.
        limits: Workspaces that were set, in bytes.
        caches: What timing caches were made from.
        capturable: Whether what engines do can be recorded on a captured stream.
        compiled: How many times TensorRT for RTX had to compile an engine's kernels.
        invalid: Why TensorRT for RTX calls an engine invalid: an ``EngineInvalidityDiagnostics``.
        released: Classes of the objects of a runtime, in the order in which they went.
        recorded: Shapes and addresses that contexts of TensorRT for RTX made CUDA graphs of.
    """

    def __init__(self, record: dict[str, Any], cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.failing: dict[str, Sequence[str]] = {}
        self.listing = ""
        self.timing_threads = 0
        self.parser_errors: list[tuple[str, str, str]] = []
        self.said: list[str] = []
        self.batches: list[int] = []
        self.limits: list[int] = []
        self.caches: list[bytes] = []
        self.capturable = True
        self.compiled = 0
        self.invalid = ""
        self.released: list[str] = []
        self.recorded: list[Any] = []
        self.module: Any = types.ModuleType(record["module"])
        self.module.__version__ = record["version"]
        self.module.__spec__ = importlib.machinery.ModuleSpec(record["module"], None)
        self._enums = {
            name: _Enum(name.rpartition(".")[2], members)  # type: ignore[call-arg, arg-type]
            for name, members in record["enums"].items()
        }
        self._classes: dict[str, type] = {}
        for name, content in record["classes"].items():
            self._make_class(name, content, record["classes"])
        for name, value in (self._enums | self._classes).items():
            if "." not in name:
                setattr(self.module, name, value)
        for name, value in record["constants"].items():
            kind, _, member = value.rpartition(".")
            setattr(self.module, name, getattr(self._enums[kind], member))

    def new(self, name: str, /, **state: Any) -> Any:
        """An object as the library makes it, whether its class has a constructor or not."""
        this = self._classes[name].__new__(self._classes[name])
        this._ = state
        return this

    def _make_class(self, name: str, content: dict[str, Any], classes: dict[str, Any]) -> type:
        if name in self._classes:
            return self._classes[name]
        bases = [base for base in content["bases"] if base in classes]
        parents = tuple(self._make_class(base, classes[base], classes) for base in bases)
        # Slots: what is not in the list cannot be set, but for a subclass, as in pybind11.
        members: dict[str, Any] = {"__slots__": () if parents else ("_",)}
        inner = {key.rpartition(".")[2]: k for key, k in self._enums.items() if f"{name}." in key}
        members |= inner
        for constant, member in content["constants"].items():
            members[constant] = next(getattr(kind, member) for kind in inner.values())
        for method, overloads in content["methods"].items():
            members[method] = self._make_method(name, method, overloads)
        for key, (annotation, writable) in content["properties"].items():
            members[key] = self._make_property(name, key, annotation, bool(writable))
        if "__init__" not in members:
            members["__init__"] = _no_constructor
        if name in _RELEASED:
            members["__del__"] = lambda this: self.released.append(name)
        if name == "IHostMemory":  # it has Python's buffer protocol, which no list shows
            members["__bytes__"] = lambda this: this._["data"]
        self._classes[name] = type(name, parents or (object,), members)
        return self._classes[name]

    def _make_method(self, owner: str, name: str, overloads: list[str]) -> Callable[..., Any]:
        signatures = [_parse(overload) for overload in overloads]
        call_name = f"{owner}.{name}"

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            if name == "__init__":
                this._ = {}
            for signature in signatures:
                try:
                    bound = signature.bind(*args, **kwargs)
                except TypeError:
                    continue
                types_of = {key: p.annotation for key, p in signature.parameters.items()}
                if all(self._accepts(types_of[key], v) for key, v in bound.arguments.items()):
                    return self._answer(call_name, this, bound)
            raise TypeError(
                f"{call_name}(): incompatible arguments {args} {kwargs}, expected {overloads}"
            )

        return call

    def _make_property(self, owner: str, name: str, annotation: str, writable: bool) -> property:
        key = f"{owner}.{name}"

        def read(this: Any) -> Any:
            if key in _SCRIPT:
                return _SCRIPT[key](self, this)
            assert name in this._, f"the stand-in has no script for {key}"
            return this._[name]

        def write(this: Any, value: Any) -> None:
            if not self._accepts(annotation, value):
                raise TypeError(f"{key} cannot be {value!r}, expected {annotation}")
            this._[name] = value

        return property(read, write if writable else None)

    def _answer(self, name: str, this: Any, call: inspect.BoundArguments) -> Any:
        if name not in self.failing:
            if name.endswith("__init__"):
                this._ |= call.arguments
                return None
            assert name in _SCRIPT, f"the stand-in has no script for {name}"
            return _SCRIPT[name](self, this, *call.args)
        if name.endswith("__init__"):
            for line in self.failing[name]:
                call.arguments["logger"].log(self.module.ILogger.ERROR, line)
            raise TypeError("pybind11::init(): factory function returned nullptr")
        for line in self.failing[name]:
            self.say(this, "ERROR", line)
        return False if call.signature.return_annotation == "bool" else None

    def say(self, this: Any, severity: str, message: str) -> None:
        """Log as an object of the library does."""
        self.said.append(message)
        this._["logger"].log(getattr(self.module.ILogger, severity), message)

    def _accepts(self, annotation: str, value: Any) -> bool:
        """Whether pybind11 would convert the value; types that we never pass are let by."""
        if annotation in ("int", "SupportsInt"):
            return hasattr(value, "__index__")
        if annotation in ("buffer", "Buffer"):
            host_memory = self._classes["IHostMemory"]
            return isinstance(value, (bytes, bytearray, memoryview, np.ndarray, host_memory))
        if annotation == "Dims":
            return isinstance(value, (tuple, list, self._classes["Dims"]))
        plain = {"str": str, "bool": bool, "tuple": tuple, "list": list}
        if annotation in plain:
            return isinstance(value, plain[annotation])
        if annotation in self._classes:
            # pybind11 wants the constructor of a subclass to have called that of its base.
            return isinstance(value, self._classes[annotation]) and hasattr(value, "_")
        if annotation in self._enums:
            return isinstance(value, self._enums[annotation])
        return True


class _EnumType(enum.EnumMeta):
    def __getitem__(cls, name: str) -> Any:
        raise TypeError(f"type {cls.__name__!r} is not subscriptable")

    def __iter__(cls) -> Any:
        raise TypeError("'pybind11_type' object is not iterable")


class _Enum(enum.Enum, metaclass=_EnumType):
    """An enum as pybind11 makes it: it can be asked for ``__members__`` and attributes alone.

    Its members are no numbers, but convert to them.
    """

    _value_: int

    def __int__(self) -> int:
        return self._value_

    __index__ = __int__


def _no_constructor(this: Any, *args: Any, **kwargs: Any) -> None:
    raise TypeError(f"{type(this).__name__}: No constructor defined!")


@functools.cache
def _parse(text: str) -> inspect.Signature:
    """``(flags: SupportsInt = ...) -> INetworkDefinition`` as a signature.

    What pybind11 calls ``arg0`` has no name that a caller could use.
    """
    body, _, returned = text.rpartition(" -> ")
    parameters = []
    for match in re.finditer(r"(\w+): ((?:[^,\[(=]|\[.*?\])+?)( = \.\.\.)?(?:, |$)", body[1:-1]):
        name, annotation, default = match.groups()
        unnamed = re.fullmatch(r"arg\d+", name)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.POSITIONAL_ONLY
                if unnamed
                else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                annotation=annotation.strip(),
                default=... if default else inspect.Parameter.empty,
            )
        )
    return inspect.Signature(parameters, return_annotation=returned)


def _does(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What a call or a property of the stand-ins does."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        _SCRIPT[name] = function
        return function

    return add


# --- building ------------------------------------------------------------------------------------


@_does("Builder.create_network")
def _create_network(library: Library, this: Any, flags: int = 0) -> Any:
    strongly_typed = int(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert flags == 1 << strongly_typed, "precision is the graph's alone"
    return library.new("INetworkDefinition")


@_does("Builder.create_builder_config")
def _create_builder_config(library: Library, this: Any) -> Any:
    state = {"flags": {"TF32"}, "profiles": [], "progress_monitor": None}
    return library.new("IBuilderConfig", logger=this._["logger"], **state)


@_does("Builder.create_optimization_profile")
def _create_optimization_profile(library: Library, this: Any) -> Any:
    return library.new("IOptimizationProfile", shapes={})


@_does("IOptimizationProfile.set_shape")
def _set_shape(library: Library, this: Any, name: str, *sizes: Any) -> None:
    shapes = [tuple(size) for size in sizes]  # smallest, typical, largest
    assert shapes == sorted(shapes)
    this._["shapes"][name] = shapes


@_does("IBuilderConfig.add_optimization_profile")
def _add_optimization_profile(library: Library, this: Any, profile: Any) -> int:
    this._["profiles"].append(profile._["shapes"])
    return len(this._["profiles"]) - 1


@_does("IBuilderConfig.set_memory_pool_limit")
def _set_memory_pool_limit(library: Library, this: Any, pool: Any, pool_size: int) -> None:
    assert pool is library.module.MemoryPoolType.WORKSPACE
    library.limits.append(pool_size)


@_does("IBuilderConfig.clear_flag")
def _clear_flag(library: Library, this: Any, flag: Any) -> None:
    this._["flags"].discard(flag.name)


@_does("IBuilderConfig.set_compute_capability")
def _set_compute_capability(
    library: Library, this: Any, compute_capability: Any, index: int
) -> bool:
    assert index < this._["num_compute_capabilities"]
    return True


@_does("IBuilderConfig.create_timing_cache")
def _create_timing_cache(library: Library, this: Any, serialized_timing_cache: Any) -> Any:
    data = bytes(serialized_timing_cache)
    library.caches.append(data)
    return None if data and not data.startswith(_MAGIC) else library.new("ITimingCache", data=data)


@_does("IBuilderConfig.set_timing_cache")
def _set_timing_cache(library: Library, this: Any, cache: Any, ignore_mismatch: bool) -> bool:
    fits = ignore_mismatch or cache._["data"] in (b"", _timing_cache(library))
    if fits:
        this._["timing_cache"] = cache
    return fits


@_does("IBuilderConfig.get_timing_cache")
def _get_timing_cache(library: Library, this: Any) -> Any:
    return this._.get("timing_cache")


@_does("ITimingCache.serialize")
def _serialize(library: Library, this: Any) -> Any:
    return library.new("IHostMemory", data=this._["data"])


def _timing_cache(library: Library) -> bytes:
    return _MAGIC + f"{library.module.__version__} {library.cuda.capability}".encode()


@_does("OnnxParser.parse_from_file")
def _parse_from_file(library: Library, this: Any, model: str) -> bool:
    this._["network"]._["model"] = onnx.load(model)
    return not library.parser_errors


@_does("OnnxParser.num_errors")
def _num_errors(library: Library, this: Any) -> int:
    return len(library.parser_errors)


@_does("OnnxParser.get_error")
def _get_error(library: Library, this: Any, index: int) -> Any:
    return library.new("ParserError", texts=library.parser_errors[index])


for _position, _name in enumerate(("desc", "node_operator", "node_name")):
    _does(f"ParserError.{_name}")(lambda library, this, at=_position: this._["texts"][at])


@_does("INetworkDefinition.get_input")
def _get_input(library: Library, this: Any, index: int) -> Any:
    image = this._["model"].graph.input[index]
    return library.new("ITensor", name=image.name, shape=_dims(library, _shape(image)))


# What the parser makes of a node, as seen with that of TensorRT for RTX 1.7.
_LAYER_TYPES = {
    "Conv": "CONVOLUTION",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "Cast": "CAST",
    "Relu": "ACTIVATION",
    "Softmax": "SOFTMAX",
    "ReduceMean": "REDUCE",
    "GlobalAveragePool": "REDUCE",
    "Mul": "ELEMENTWISE",
    "Add": "ELEMENTWISE",
}


@_does("INetworkDefinition.num_layers")
def _num_layers(library: Library, this: Any) -> int:
    return len(this._["model"].graph.node)


@_does("INetworkDefinition.get_layer")
def _get_layer(library: Library, this: Any, index: int) -> Any:
    node = this._["model"].graph.node[index]
    kind = getattr(library.module.LayerType, _LAYER_TYPES.get(node.op_type, "SHUFFLE"))
    return library.new("ILayer", type=kind, node=node, types=_types(this._["model"]))


@_does("ILayer.num_inputs")
def _num_inputs(library: Library, this: Any) -> int:
    # Constants of a convolution are the layer's own weights, and no tensor.
    node, types_of = this._["node"], this._["types"]
    return sum(name in types_of for name in node.input) if node.op_type == "Conv" else 1


@_does("ILayer.get_input")
def _get_layer_input(library: Library, this: Any, index: int) -> Any:
    return _tensor(library, this._["node"].input[index], this._["types"])


@_does("ILayer.get_output")
def _get_layer_output(library: Library, this: Any, index: int) -> Any:
    return _tensor(library, this._["node"].output[index], this._["types"])


def _tensor(library: Library, name: str, types_of: dict[str, str]) -> Any:
    return library.new("ITensor", name=name, dtype=getattr(library.module.DataType, types_of[name]))


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """TensorRT's name of the type of every tensor that is no constant."""
    names = {"FLOAT16": "HALF", "BFLOAT16": "BF16"}
    graph = onnx.shape_inference.infer_shapes(model).graph
    kinds = onnx.TensorProto.DataType
    return {
        value.name: names.get(found := kinds.Name(value.type.tensor_type.elem_type), found)
        for value in [*graph.input, *graph.value_info, *graph.output]
    }


@_does("Builder.build_serialized_network")
def _build_serialized_network(library: Library, this: Any, network: Any, config: Any) -> Any:
    model = network._["model"]
    (shapes,) = config._["profiles"]
    monitor = config._["progress_monitor"]
    if monitor is not None and not _report_progress(library, monitor):
        library.say(this, "ERROR", "IBuilder::buildSerializedNetwork: BuildCanceled")
        return None
    if config._["profiling_verbosity"] is library.module.ProfilingVerbosity.DETAILED:
        library.say(this, "VERBOSE", library.listing or _listing(library, model))
    if cache := config._.get("timing_cache"):
        cache._["data"] = _timing_cache(library)
    return library.new("IHostMemory", data=make_plan(model, shapes[model.graph.input[0].name]))


class _Trampoline:
    """How the bindings call a monitor: what it raises is printed, and cancels the build."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def __getattr__(self, name: str) -> Callable[..., bool]:
        def call(*arguments: Any) -> bool:
            try:
                return bool(getattr(self._monitor, name)(*arguments))
            except Exception as error:  # noqa: BLE001 - as the bindings do
                print(f"[ERROR] Exception caught in {name}(): {error}", file=sys.stderr)
                return False

        return call


def _report_progress(library: Library, monitor: Any) -> bool:
    """What a build tells its monitor; in TensorRT several threads may do so at once."""
    monitor = _Trampoline(monitor)
    monitor.phase_start("Building engine", None, 2)
    monitor.phase_start("Timing tactics", "Building engine", 2)
    going_on = monitor.step_complete("Timing tactics", 0)

    def time_tactics(name: str) -> bool:
        phases = [f"{name} {number}" for number in range(200)]
        for phase in phases:
            monitor.phase_start(phase, "Timing tactics", 1)
        steps = [monitor.step_complete(phase, 0) for phase in phases]
        for phase in phases:
            monitor.phase_finish(phase)
        return all(steps)

    with ThreadPoolExecutor(max(library.timing_threads, 1)) as pool:
        names = [f"Tactics of thread {number}" for number in range(library.timing_threads)]
        going_on = all(pool.map(time_tactics, names)) and going_on
    monitor.phase_finish("Timing tactics")
    going_on = going_on and monitor.step_complete("Building engine", 0)
    monitor.phase_finish("Building engine")
    return bool(going_on)


def _listing(library: Library, model: onnx.ModelProto) -> str:
    """The layers of the engine in the library's words: here, the convolutions of the graph.

    In the form of public logs of TensorRT 10, which leaves out formats and types where the batch is
    dynamic, but for those of the weights; and in that of TensorRT for RTX 1.7, which has the fields
    of TensorRT 11: the type beside the format, whatever the batch.
    """
    kinds = onnx.TensorProto
    words = {kinds.FLOAT: "Float", kinds.FLOAT16: "Half", kinds.BFLOAT16: "BFloat16"}
    weights = {weight.name: weight.data_type for weight in model.graph.initializer}
    ten = library.module.__version__.startswith("10.")
    lines = []
    for node in model.graph.node:
        if node.op_type != "Conv":
            continue
        # Weights that come out of another node are quantised.
        kind = words.get(weights.get(node.input[1], 0), "Int8")
        tensor = (
            f"Dimensions: [-1,16,32,32], Strides: [16384,1,512,16], Datatype: {kind}, Format: x"
        )
        if ten:
            tensor = "Dimensions: [-1,16,32,32], Format/Datatype: N/A due to dynamic shapes"
        lines.append(
            f"Name: {node.name}, LayerType: CaskConvolution, Inputs: [ {{ Name: {node.input[0]}, "
            f"Location: Device, {tensor} }}], Outputs: [ {{ Name: {node.output[0]}, {tensor} }}], "
            "ParameterType: Convolution, Kernel: [3,3], OutMaps: 16, Groups: 1, "
            f'Weights: {{"Type": "{kind}", "Count": 432}}, Bias: {{"Type": "Float", "Count": 16}}, '
            f"HasBias: 1, HasReLU: 0, StreamId: 0, Metadata: [ONNX Layer: {node.name}]"
        )
    return "\n".join(["Layers:", *lines, "Bindings:" if ten else "I/O Tensors:"])


def make_plan(model: onnx.ModelProto, shapes: Sequence[Sequence[int]]) -> bytes:
    """The bytes of an engine: its profile, then the graph that it computes."""
    return _MAGIC + json.dumps(shapes).encode() + b"\n" + model.SerializeToString()


# --- running -------------------------------------------------------------------------------------


HEADER_BYTES = 64


@_does("Runtime.engine_header_size")
def _engine_header_size(library: Library, this: Any) -> int:
    return HEADER_BYTES


@_does("Runtime.get_engine_validity")
def _get_engine_validity(library: Library, this: Any, buffer: Any) -> tuple[Any, int]:
    library.cuda.require_active()
    assert len(buffer) == HEADER_BYTES
    validity, causes = library.module.EngineValidity, library.module.EngineInvalidityDiagnostics
    if library.invalid:
        return validity.INVALID, int(getattr(causes, library.invalid))
    return validity.VALID, 0


@_does("Runtime.deserialize_cuda_engine")
def _deserialize_cuda_engine(library: Library, this: Any, serialized_engine: Any) -> Any:
    library.cuda.require_active()
    header, _, content = bytes(serialized_engine).partition(b"\n")
    if not header.startswith(_MAGIC):
        library.say(this, "ERROR", "Serialization assertion header.magicTag failed.")
        return None
    model = onnx.load_from_string(content)
    tensors = {value.name: value for value in [*model.graph.input, *model.graph.output]}
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    shapes = json.loads(header.removeprefix(_MAGIC))
    return library.new(
        "ICudaEngine", tensors=tensors, session=session, shapes=shapes, logger=this._["logger"]
    )


@_does("ICudaEngine.num_io_tensors")
def _num_io_tensors(library: Library, this: Any) -> int:
    return len(this._["tensors"])


@_does("ICudaEngine.get_tensor_name")
def _get_tensor_name(library: Library, this: Any, index: int) -> str:
    return list(this._["tensors"])[index]


@_does("ICudaEngine.get_tensor_dtype")
def _get_tensor_dtype(library: Library, this: Any, name: str) -> Any:
    kind = onnx.TensorProto.DataType.Name(this._["tensors"][name].type.tensor_type.elem_type)
    return getattr(library.module.DataType, {"FLOAT16": "HALF"}.get(kind, kind))


@_does("ICudaEngine.get_tensor_shape")
def _get_tensor_shape(library: Library, this: Any, name: str) -> Any:
    return _dims(library, _shape(this._["tensors"][name]))


@_does("ICudaEngine.get_tensor_profile_shape")
def _get_tensor_profile_shape(library: Library, this: Any, name: str, profile_index: int) -> Any:
    assert profile_index == 0
    return [_dims(library, shape) for shape in this._["shapes"]]


@_does("ICudaEngine.device_memory_size_v2")
def _device_memory_size(library: Library, this: Any) -> int:
    return MEMORY_BYTES


@_does("ICudaEngine.create_runtime_config")
def _create_runtime_config(library: Library, this: Any) -> Any:
    state = {"strategy": library.module.ExecutionContextAllocationStrategy.STATIC, "cache": None}
    if hasattr(library.module, "CudaGraphStrategy"):
        state["cuda_graph_strategy"] = library.module.CudaGraphStrategy.DISABLED
    return library.new("IRuntimeConfig", logger=this._["logger"], **state)


@_does("IRuntimeConfig.set_execution_context_allocation_strategy")
def _set_strategy(library: Library, this: Any, strategy: Any) -> None:
    this._["strategy"] = strategy


@_does("IRuntimeConfig.create_runtime_cache")
def _create_runtime_cache(library: Library, this: Any) -> Any:
    return library.new("IRuntimeCache", logger=this._["logger"], data=b"")


@_does("IRuntimeConfig.set_runtime_cache")
def _set_runtime_cache(library: Library, this: Any, cache: Any) -> bool:
    this._["cache"] = cache
    return True


@_does("IRuntimeCache.deserialize")
def _deserialize_cache(library: Library, this: Any, blob: Any) -> bool:
    library.cuda.require_active()  # it compares the cache with the current context
    if not bytes(blob).startswith(_timing_cache(library)):
        return False
    this._["data"] = bytes(blob)
    return True


@_does("IRuntimeCache.serialize")
def _serialize_cache(library: Library, this: Any) -> Any:
    return library.new("IHostMemory", data=this._["data"])


@_does("ICudaEngine.create_execution_context")
def _create_execution_context(library: Library, this: Any, how: Any = None) -> Any:
    library.cuda.require_active()
    strategies = library.module.ExecutionContextAllocationStrategy
    options: dict[str, Any] = {"strategy": how}
    if isinstance(how, library._classes.get("IRuntimeConfig", ())):
        options = dict(how._)
    cache = options.get("cache")
    if library.module.__name__ == "tensorrt_rtx" and (cache is None or not cache._["data"]):
        library.compiled += 1
        if cache is not None:
            cache._["data"] = _timing_cache(library) + b" kernels"
    return library.new(
        "IExecutionContext",
        engine=this,
        logger=this._["logger"],
        addresses={},
        running=threading.Lock(),
        memory="missing" if options["strategy"] is strategies.USER_MANAGED else 0,
        records=getattr(options.get("cuda_graph_strategy"), "name", "") == "WHOLE_GRAPH_CAPTURE",
        recorded=None,
        shape=None,
        flushed=False,
    )


@_does("IExecutionContext.set_device_memory")
def _set_device_memory(library: Library, this: Any, memory: int, size: int) -> None:
    assert size >= MEMORY_BYTES and memory % 256 == 0
    this._["memory"] = memory


@_does("IExecutionContext.set_tensor_address")
def _set_tensor_address(library: Library, this: Any, name: str, memory: int) -> bool:
    library.cuda.memory(memory, 1)
    this._["addresses"][name] = memory
    return name in this._["engine"]._["tensors"]


@_does("IExecutionContext.set_input_shape")
def _set_input_shape(library: Library, this: Any, name: str, shape: Any) -> bool:
    if tuple(shape) != this._["shape"]:
        # A new shape changes the context's state, and what is to be done for it waits until the
        # context runs.
        this._ |= {"shape": tuple(shape), "flushed": False}
    smallest, _, largest = this._["engine"]._["shapes"]
    return all(a <= b <= c for a, b, c in zip(smallest, this._["shape"], largest, strict=True))


@_does("IExecutionContext.execute_async_v3")
def _execute_async_v3(library: Library, this: Any, stream_handle: int) -> bool:
    assert this._["running"].acquire(blocking=False), "two threads in one execution context"
    try:
        time.sleep(0.002)
        return _enqueue(library, this, stream_handle)
    finally:
        this._["running"].release()


def _enqueue(library: Library, this: Any, stream: int) -> bool:
    cuda = library.cuda
    shape, addresses = this._["shape"], dict(this._["addresses"])
    if this._["memory"] == "missing":
        library.say(this, "ERROR", "IExecutionContext::enqueueV3: no device memory was given")
        return False
    if any(address % 256 for address in addresses.values()):
        library.say(this, "ERROR", "IExecutionContext::enqueueV3: misaligned address")
        return False
    if cuda.is_captured(stream) and not (this._["flushed"] and library.capturable):
        cuda.spoil("cudaMemcpy")
        library.say(this, "ERROR", "operation not permitted when stream is capturing")
        return False
    this._["flushed"] = True
    if this._["records"] and this._["recorded"] != (shape, addresses):
        this._["recorded"] = (shape, addresses)
        library.recorded.append((shape[0], addresses))

    def work() -> None:
        # What was queued or recorded knows the shape and the addresses of that moment. Its
        # context's state has to be that of the shape still.
        assert this._["shape"] == shape, "the context of this graph has taken another shape"
        if this._["memory"]:
            cuda.memory(this._["memory"], MEMORY_BYTES)
        library.batches.append(shape[0])
        _compute(library, this._["engine"], shape, addresses)

    cuda.queue(stream, work)
    return True


def _compute(library: Library, engine: Any, shape: Any, addresses: dict[str, int]) -> None:
    """What the stream does in its turn: from the input's address to the outputs' addresses."""
    session: Any = engine._["session"]

    def view(name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = np.dtype(_NUMPY_TYPES[engine.get_tensor_dtype(name).name])
        block = library.cuda.memory(addresses[name], int(np.prod(shape)) * dtype.itemsize)
        return np.frombuffer(block, dtype).reshape(shape)

    name = session.get_inputs()[0].name
    outputs = [output.name for output in session.get_outputs()]
    for output, values in zip(
        outputs, session.run(outputs, {name: view(name, shape)}), strict=True
    ):
        view(output, values.shape)[:] = values


@_does("Dims.__len__")
def _length(library: Library, this: Any) -> int:
    return len(this._["shape"])


@_does("Dims.__getitem__")
def _item(library: Library, this: Any, index: Any) -> Any:
    return this._["shape"][index]


def _dims(library: Library, shape: Sequence[int]) -> Any:
    return library.new("Dims", shape=tuple(shape))


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """Shape of an ONNX tensor as TensorRT says it: -1 for what is dynamic."""
    dims = value.type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in dims)
