"""Images that lie on the GPU already: taken where they are, by DLPack or the CUDA Array Interface.

PyTorch, CuPy, JAX, Numba and others offer their arrays by one of the two or both. DLPack comes
first, since only it makes the producer order its own work before ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from typing import Any

import numpy as np

from efficientface_deploy.backends.base import DLPACK_CUDA, DeviceArray, DeviceImages
from efficientface_deploy.backends.tensorrt.cuda import Cuda
from efficientface_deploy.errors import EfficientFaceError, ImageError

_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}


def read_device_array(images: DeviceArray, cuda: Cuda, stream: int) -> DeviceImages:
    """Take an array where it is, and have ``stream`` wait until its content is there.

    Args:
        images: What :func:`is_device_array` says yes to.
        cuda: An open binding, active.
        stream: Handle of the stream that will read the array.

    Returns:
        The array; it may be read on ``stream`` as long as the result lives.

    Raises:
        ImageError: The array is not contiguous, on another GPU, or does not export itself.
    """
    try:
        if hasattr(images, "__dlpack__"):
            taken, strides = _read_dlpack(images, cuda, stream)
        else:
            taken, strides = _read_cuda_array(images, cuda)
    except EfficientFaceError:
        raise
    except Exception as error:  # noqa: BLE001 - the producer's code raises whatever it likes
        expected = "an array that exports itself by DLPack or __cuda_array_interface__"
        found = f"{type(images).__name__} ({type(error).__name__}: {error})"
        fix = "give a plain array, detached from any graph"
        raise ImageError("batch", expected, found, fix) from None
    if strides is not None and not _is_contiguous(taken.shape, strides):
        found = f"strides of {strides} elements for shape {taken.shape}"
        fix = "make it contiguous, with .contiguous() or ascontiguousarray()"
        raise ImageError("batch", "a C-contiguous array on the GPU", found, fix)
    return taken


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h, with which a DLManagedTensor begins."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


# Prototypes of our own: those of ctypes.pythonapi are shared by the whole process.
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)

_Strides = tuple[int, ...] | None  # in elements; None for C-contiguous


def _read_dlpack(images: Any, cuda: Cuda, stream: int) -> tuple[DeviceImages, _Strides]:
    kind, device = images.__dlpack_device__()
    if int(kind) == DLPACK_CUDA and int(device) != cuda.device:
        raise _elsewhere(f"one on GPU {int(device)}", cuda)
    capsule = images.__dlpack__(stream=stream)  # the producer makes the stream wait
    # The capsule is never marked as consumed: it frees the export itself when we drop it.
    address = _capsule_pointer(capsule, b"dltensor")
    tensor = _DLTensor.from_address(address)
    shape = tuple(tensor.shape[: tensor.ndim])
    strides = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None
    lanes = f"x{tensor.lanes}" if tensor.lanes != 1 else ""
    dtype: np.dtype[Any] | str = f"{_DLPACK_KINDS.get(tensor.code, 'kind')}{tensor.bits}{lanes}"
    with contextlib.suppress(TypeError):  # a type that NumPy does not know stays a name
        dtype = np.dtype(dtype)
    data = (tensor.data or 0) + tensor.byte_offset
    return DeviceImages(data, shape, dtype, (images, capsule)), strides


def _read_cuda_array(images: Any, cuda: Cuda) -> tuple[DeviceImages, _Strides]:
    exported = images.__cuda_array_interface__
    dtype = np.dtype(exported["typestr"])
    shape = tuple(int(size) for size in exported["shape"])
    address = int(exported["data"][0] or 0)
    if math.prod(shape) and not cuda.owns(address):
        raise _elsewhere("an address that is not memory of it", cuda)
    if exported["version"] < 3:
        cuda.synchronize_device()  # these versions leave out on which stream the content is made
    elif exported.get("stream") is not None:
        cuda.synchronize(int(exported["stream"]))
    strides = exported.get("strides")
    if strides is not None:
        strides = tuple(stride // dtype.itemsize for stride in strides)  # bytes to elements
    return DeviceImages(address, shape, dtype, images), strides


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether elements lie in C order; where there are none, or one in a dimension, all do."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def _elsewhere(found: str, cuda: Cuda) -> ImageError:
    expected = f"an array on GPU {cuda.device}, which runs the engine"
    fix = "copy it there, or make that GPU current before load()"
    return ImageError("batch", expected, found, fix)
