"""Record what a release of TensorRT's Python module offers, as JSON, without TensorRT itself.

NVIDIA publishes the binding (``tensorrt.so``, a few megabytes) as a wheel of its own. It is
installed into a scratch folder; the libraries that it is linked against are replaced by stubs, made
by gcc from the list of its undefined symbols, whose functions all return null. So the module
imports and can be asked what it has, though it can do nothing. An installed module is recorded by
its name:

    python tests/tensorrt_api/tensorrt_record.py tensorrt_rtx tensorrt_rtx-1.7.json

The stand-ins of ``tensorrt_stand_in.py`` are made from these files; nobody writes one by hand.
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import enum
import importlib
import importlib.util
import inspect
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from efficientface_deploy.command import option, parse_config, run_command
from efficientface_deploy.errors import ConfigError

# What neither a builder from ONNX nor a runner comes near: plugins, and the layers of a network.
_LEFT_OUT = re.compile(r"Plugin|(?<!\bI)Layer$|Loop|Condition|Attention|MoE")


@dataclasses.dataclass(frozen=True)
class RecordConfig:
    """Options of ``python tests/tensorrt_api/tensorrt_record.py``."""

    requirement: str = option(
        positional=True, help="a wheel of bindings as pip takes it, or an installed module"
    )
    out: Path = option(positional=True, metavar="FILE", help="the JSON file to write")


def main() -> None:
    """Write the list of a wheel of bindings, or of an installed module."""
    config = parse_config(
        RecordConfig,
        None,
        prog="python tests/tensorrt_api/tensorrt_record.py",
        description=__doc__ or "",
        example="tensorrt-cu12-bindings==10.3.0 tensorrt-10.3.json",
    )
    name, wanted = config.requirement, "a wheel of bindings, or an installed module"
    if name.isidentifier() and importlib.util.find_spec(name) is None:
        raise ConfigError("REQUIREMENT", wanted, f"no module {name}", "give e.g. NAME==VERSION")
    try:
        record = list_module(name) if name.isidentifier() else list_wheel(name)
    except subprocess.CalledProcessError as error:
        found = f"{name}, where {error.cmd[0]} failed; see above"
        raise ConfigError("REQUIREMENT", wanted, found, "needs pip, gcc and binutils") from None
    config.out.write_text(dump(record), encoding="utf-8")


def list_wheel(requirement: str) -> dict[str, Any]:
    """The list of a wheel of bindings, e.g. ``tensorrt-cu12-bindings==10.3.0``."""
    with tempfile.TemporaryDirectory() as folder:
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([sys.executable, *install, "--target", folder, requirement], check=True)
        (binding,) = Path(folder).glob("*/tensorrt.so")
        make_stubs(binding)
        # In a process of its own: the stubs are loaded for good.
        done = subprocess.run(
            [sys.executable, __file__, binding.parent.name, f"{folder}/list.json"],
            env={"PYTHONPATH": folder},
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{requirement} does not import against stubs; see above")
        record: dict[str, Any] = json.loads(Path(folder, "list.json").read_text(encoding="utf-8"))
    return record


def make_stubs(binding: Path) -> None:
    """Put a stub of every NVIDIA library that ``binding`` is linked against beside it."""
    needed = re.findall(r"NEEDED.*\[(libnv\S+)\]", _output("readelf", "-d", str(binding)))
    symbols = re.findall(r" U (\w+)$", _output("nm", "-D", str(binding)), re.MULTILINE)
    process = ctypes.CDLL(None)  # has Python's own symbols and the C library's
    missing = [symbol for symbol in symbols if not hasattr(process, symbol)]
    code = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in missing)
    for library in needed:
        command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(binding.with_name(library))]
        subprocess.run(command, input=code, text=True, check=True)


def list_module(name: str) -> dict[str, Any]:
    """The list of a module that imports here."""
    module = importlib.import_module(name)
    classes, enums, constants = {}, {}, {}
    for key, value in sorted(vars(module).items()):
        if key.startswith("_") or _LEFT_OUT.search(key):
            continue
        if inspect.isclass(value):
            if _is_enum(value):
                enums[key] = _members(value)
            elif value.__module__.startswith(name.removesuffix("_bindings")):
                classes[key] = _list_class(value)
                enums |= {
                    f"{key}.{inner}": _members(kind)
                    for inner, kind in vars(value).items()
                    if inspect.isclass(kind) and _is_enum(kind)
                }
        elif _is_enum(type(value)):
            constants[key] = f"{type(value).__qualname__}.{value.name}"
    return {
        "module": name.removesuffix("_bindings"),
        "version": module.__version__,
        "classes": classes,
        "enums": enums,
        "constants": constants,
    }


def dump(record: dict[str, Any]) -> str:
    """The list as JSON, a class, an enum or a constant a line, for releases to be compared."""
    parts = []
    for key, value in record.items():
        if isinstance(value, dict):
            lines = (
                f"{json.dumps(name)}: {json.dumps(content)}" for name, content in value.items()
            )
            parts.append(f"{json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n}")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _list_class(cls: type) -> dict[str, Any]:
    """Bases, methods with all overloads, properties (``"w"``: can be set), constants."""
    methods, properties, constants = {}, {}, {}
    for name, value in sorted(vars(cls).items()):
        if name.startswith("_") and name not in ("__init__", "__len__", "__getitem__"):
            continue
        if isinstance(value, property):
            type_name = _signatures(value.fget.__doc__ or "")[:1]
            properties[name] = [_returned(type_name), "w" if value.fset else ""]
        elif _is_enum(type(value)):
            constants[name] = value.name
        elif not inspect.isclass(value):
            function = getattr(value, "__func__", value)  # of a static method
            if signatures := _signatures(function.__doc__ or ""):
                methods[name] = signatures
    bases = [base.__name__ for base in cls.__bases__ if not base.__name__.startswith("pybind11")]
    content = {"bases": [base for base in bases if base != "object"], "methods": methods}
    return content | {"properties": properties, "constants": constants}


def _signatures(docstring: str) -> list[str]:
    """The overloads that pybind11 writes into a docstring, as ``(name: type, ...) -> type``."""
    found = []
    for line in docstring.splitlines():
        match = re.match(r"(?:\d+\. )?\w*(\(.*\) -> .+)$", line)
        if not match or match[1].startswith("(*args, **kwargs)") or _LEFT_OUT.search(match[1]):
            continue
        text = re.sub(r"\b(?:\w+(?:\.|::))+(\w+)", r"\1", match[1])  # without modules
        text = re.sub(r"= (<[^>]*>|[^,()]+(\(\))?)", "= ...", text)  # a default, whatever it is
        ast.parse(f"def f{text}: ...")
        found.append(re.sub(r"^\(self(: \w+)?(, )?", "(", text))
    return found


def _returned(signatures: list[str]) -> str:
    return signatures[0].rpartition(" -> ")[2] if signatures else ""


def _is_enum(cls: type) -> bool:
    """Whether it is an enum of pybind11, old or new."""
    return hasattr(cls, "__members__") or issubclass(cls, enum.Enum)


def _members(cls: Any) -> dict[str, int]:
    return {name: int(value) for name, value in cls.__members__.items()}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    run_command(main)
