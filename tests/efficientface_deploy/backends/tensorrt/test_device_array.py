"""Arrays on the GPU: read where they are, in the order of their producer's work, or refused."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from mean_engine import expected_logits, images, write_plan
from tensorrt_stand_in import Library

from efficientface_deploy import load
from efficientface_deploy.backends import BackendOptions
from efficientface_deploy.backends.base import Backend
from efficientface_deploy.backends.tensorrt.backend import TensorRTBackend
from efficientface_deploy.errors import ImageError
from efficientface_deploy.spec import ModelSpec


class OnDevice:
    """An array in the memory of the fake GPU, as a library that shares it would make one."""

    def __init__(self, cuda: FakeCuda, values: np.ndarray, offset: int = 0) -> None:
        self.address = cuda.allocate(values.nbytes + offset + 1) + offset
        self.cuda = cuda
        self.values = np.frombuffer(cuda.memory(self.address, values.nbytes), values.dtype).reshape(
            values.shape
        )
        self.values[...] = values


class CudaArray(OnDevice):
    """The CUDA Array Interface; ``changes`` replace its entries."""

    def __init__(self, cuda: FakeCuda, values: np.ndarray, offset: int = 0, **changes: Any):
        super().__init__(cuda, values, offset)
        self.__cuda_array_interface__ = {
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (self.address, True),
            "version": 3,
            "stream": None,
        } | changes


class DLPack(OnDevice):
    """DLPack, in capsules of NumPy's: of the real layout, for another kind of device."""

    device = (2, 0)

    def __init__(self, cuda: FakeCuda, values: np.ndarray, view: Any = None) -> None:
        super().__init__(cuda, values)
        self.exported = self.values if view is None else view(self.values)
        self.streams: list[int] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        assert stream in self.cuda.streams
        self.streams.append(stream)
        return self.exported.__dlpack__()


EXPORTS = [CudaArray, DLPack]


@pytest.fixture
def backend(engine: Path, library: Library) -> Any:
    with TensorRTBackend(engine, BackendOptions()) as opened:
        yield opened


def refusal(backend: Backend, array: Any) -> str:
    with pytest.raises(ImageError) as caught:
        backend.infer(array)
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("count", [1, 4, 9])
def test_answers_are_those_of_the_same_images_on_the_host(
    backend: Backend, fake_cuda: FakeCuda, export: Callable[..., Any], count: int
) -> None:
    for seed in range(4):
        batch = images(count, seed)
        output = backend.infer(export(fake_cuda, batch))
        np.testing.assert_allclose(output.logits, expected_logits(batch), rtol=1e-6)
        np.testing.assert_array_equal(backend.infer(batch).logits, output.logits)


@pytest.mark.parametrize("export", EXPORTS)
def test_nothing_is_copied_to_the_device(
    backend: Backend,
    fake_cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    export: Callable[..., Any],
) -> None:
    def never(*_: object) -> None:
        pytest.fail("copied")

    array = export(fake_cuda, images(3))
    monkeypatch.setattr(fake_cuda, "copy_to_device", never)
    for _ in range(4):
        backend.infer(array)
    assert len(fake_cuda.launches) == 2, "the same address again has a graph too"


def test_graph_reads_what_is_there_now(backend: Backend, fake_cuda: FakeCuda) -> None:
    """A buffer that a camera fills over and over, next to images from the host."""
    array = CudaArray(fake_cuda, images(3))
    for seed in range(5):
        array.values[...] = images(3, seed)
        logits = backend.infer(array).logits
        np.testing.assert_allclose(logits, expected_logits(images(3, seed)), rtol=1e-6)
        host = images(3, seed + 50)
        np.testing.assert_allclose(backend.infer(host).logits, expected_logits(host), rtol=1e-6)
    assert len(fake_cuda.graphs) == 2


def test_addresses_that_never_come_again_are_not_recorded(
    backend: Backend, fake_cuda: FakeCuda
) -> None:
    kept = [CudaArray(fake_cuda, images(1, seed)) for seed in range(50)]
    for array in kept:
        backend.infer(array)
    assert not fake_cuda.graphs
    assert len(backend._session._candidates) <= 32  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "waits"),
    [
        ({"stream": None}, []),
        ({"stream": 1}, [1]),
        ({"stream": 777}, [777]),
        ({"version": 2}, ["device"]),  # these do not say on which stream the content is made
    ],
)
def test_producer_of_a_cuda_array_is_waited_for(
    backend: Backend, fake_cuda: FakeCuda, changes: dict[str, Any], waits: list[Any]
) -> None:
    array = CudaArray(fake_cuda, images(1), **changes)
    fake_cuda.waits.clear()
    backend.infer(array)
    assert fake_cuda.waits[:-1] == waits, "and our own stream last"


def test_producer_of_dlpack_is_given_our_stream(backend: Backend, fake_cuda: FakeCuda) -> None:
    array = DLPack(fake_cuda, images(1))
    backend.infer(array)
    assert array.streams == list(fake_cuda.streams)


def test_dlpack_comes_first_where_there_are_both(backend: Backend, fake_cuda: FakeCuda) -> None:
    array = DLPack(fake_cuda, images(1))
    array.__cuda_array_interface__ = {}  # type: ignore[attr-defined]
    backend.infer(array)
    assert array.streams


def test_capsule_is_given_back(backend: Backend, fake_cuda: FakeCuda) -> None:
    """The export ends with the call: NumPy counts references to what it exports."""
    array = DLPack(fake_cuda, images(1))
    before = sys.getrefcount(array.exported)
    for _ in range(3):
        backend.infer(array)
    after = sys.getrefcount(array.exported)
    assert after == before


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((2, 64, 64, 3), np.float32), "float32 of shape (2, 64, 64, 3)"),
        (np.zeros((2, 64, 64, 3), np.int8), "int8 of shape (2, 64, 64, 3)"),
        (np.zeros((2, 3, 64, 64), np.uint8), "uint8 of shape (2, 3, 64, 64)"),
        (np.zeros((64, 64, 3), np.uint8), "uint8 of shape (64, 64, 3)"),
        (np.zeros((2, 96, 96, 3), np.uint8), "uint8 of shape (2, 96, 96, 3)"),
    ],
)
def test_bad_batch_is_the_error_of_the_host(
    backend: Backend,
    fake_cuda: FakeCuda,
    export: Callable[..., Any],
    array: np.ndarray,
    found: str,
) -> None:
    message = refusal(backend, export(fake_cuda, array))
    assert message == refusal(backend, array)
    assert f"expected uint8 array of shape (N, 64, 64, 3), found {found}" in message


def test_empty_batch(backend: Backend, fake_cuda: FakeCuda) -> None:
    empty = np.zeros((0, 64, 64, 3), np.uint8)
    for array in (CudaArray(fake_cuda, empty, data=(0, True)), DLPack(fake_cuda, empty)):
        assert backend.infer(array).logits.shape == (0, 7)


def test_array_that_is_not_contiguous(backend: Backend, fake_cuda: FakeCuda) -> None:
    strides = (64 * 64 * 3, 3, 64 * 3, 1)
    for array in (
        CudaArray(fake_cuda, images(2), strides=strides),
        DLPack(fake_cuda, images(2), lambda x: x.transpose(0, 2, 1, 3)),
    ):
        assert f"strides of {strides} elements" in refusal(backend, array)
    # Said in so many words, C order is C order, and a dimension of one has no stride.
    plain = (10**9, 64 * 3, 3, 1)
    assert backend.infer(CudaArray(fake_cuda, images(1), strides=plain)).logits.shape == (1, 7)


def test_array_of_another_gpu(backend: Backend, fake_cuda: FakeCuda) -> None:
    array = CudaArray(fake_cuda, images(1))
    fake_cuda.foreign.add(array.address)
    assert "an array on GPU 0, which runs the engine, found an address" in refusal(backend, array)
    other = DLPack(fake_cuda, images(1))
    other.device = (2, 1)
    assert "found one on GPU 1" in refusal(backend, other)
    managed = DLPack(fake_cuda, images(1))
    managed.device = (13, 1)
    assert backend.infer(managed).logits.shape == (1, 7)


def test_address_that_tensorrt_cannot_read(backend: Backend, fake_cuda: FakeCuda) -> None:
    message = refusal(backend, CudaArray(fake_cuda, images(1), offset=16))
    assert "a multiple of 256 bytes, found one that begins 16 bytes after" in message


class Raising:
    """A producer whose own code fails."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        raise BufferError("cannot export\nthis")


class Versioned(Raising):
    """A producer that gives something else than was asked for."""

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        return np.zeros(3).__dlpack__(max_version=(1, 0))


class Elsewhere(Raising):
    """A producer that does not know its device."""

    def __dlpack_device__(self) -> tuple[int, int]:
        raise RuntimeError("no device")


def test_producer_that_fails(backend: Backend, fake_cuda: FakeCuda) -> None:
    assert "BufferError: cannot export this" in refusal(backend, Raising())
    assert "exports itself by DLPack" in refusal(backend, Versioned())
    assert "found Elsewhere of shape unknown" in refusal(backend, Elsewhere())
    broken = CudaArray(fake_cuda, images(1), typestr="?!")
    assert "exports itself" in refusal(backend, broken)
    del broken.__cuda_array_interface__["shape"]
    assert "exports itself" in refusal(backend, broken)


def test_engine_of_normalised_floats(
    engine: Path, library: Library, fake_cuda: FakeCuda, spec: ModelSpec
) -> None:
    write_plan(engine, spec, library, float_input=True)
    with TensorRTBackend(engine, BackendOptions()) as backend:
        assert "without --float-input" in refusal(backend, CudaArray(fake_cuda, images(1)))


@pytest.mark.parametrize("kind", ["onnx", "torch"])
@pytest.mark.parametrize("export", EXPORTS)
def test_backends_of_the_cpu_say_so(
    require_backend: Callable[[str], None],
    model_files: dict[str, Path],
    fake_cuda: FakeCuda,
    kind: str,
    export: Callable[..., Any],
) -> None:
    require_backend(kind)
    with load(model_files[kind]) as predictor, pytest.raises(ImageError) as caught:
        predictor.infer(export(fake_cuda, images(1)))
    message = str(caught.value)
    assert f"host memory, which is what {kind}:cpu takes, found {export.__name__} on" in message
    assert ".cpu().numpy()" in message


def test_tensor_on_the_cpu_is_no_device_array(backend: Backend) -> None:
    torch = pytest.importorskip("torch")
    message = refusal(backend, torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    assert "expected uint8 array of shape (N, 64, 64, 3), found torch.uint8" in message


def test_dlpack_with_an_offset(fake_cuda: FakeCuda) -> None:
    """Its address is not where the content begins."""
    from efficientface_deploy.backends.tensorrt import device_array

    shape = (ctypes.c_int64 * 2)(5, 7)
    tensor = device_array._DLTensor(
        data=4096, ndim=2, code=1, bits=8, lanes=1, shape=shape, byte_offset=512
    )
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    capsule = new(("PyCapsule_New", ctypes.pythonapi))(ctypes.addressof(tensor), b"dltensor", None)

    class Offset(Raising):
        def __dlpack__(self, *, stream: int | None = None) -> Any:
            return capsule

    taken = device_array.read_device_array(Offset(), fake_cuda, 1)
    assert (taken.address, taken.shape) == (4096 + 512, (5, 7))


def test_dlpack_of_real_libraries_is_read(fake_cuda: FakeCuda) -> None:
    """PyTorch's own capsules, of memory on the host."""
    torch = pytest.importorskip("torch")
    from efficientface_deploy.backends.tensorrt.device_array import read_device_array

    class Moved:
        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, *, stream: int | None = None) -> Any:
            return self.tensor.__dlpack__()

    tensor = torch.arange(math.prod((4, 8, 8, 3)), dtype=torch.uint8).reshape(4, 8, 8, 3)
    taken = read_device_array(Moved(tensor[1:]), fake_cuda, 1)
    assert (taken.address, taken.shape, taken.dtype) == (tensor[1:].data_ptr(), (3, 8, 8, 3), "u1")
    assert taken[1:2].address == tensor[2].data_ptr()
    assert read_device_array(Moved(tensor.bfloat16()), fake_cuda, 1).dtype == "bfloat16"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["trt", "trt-rtx"])
def test_pytorch_tensor_on_a_gpu(kind: str, model_files: dict[str, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from efficientface_export.tensorrt.options import SUFFIXES, EngineOptions
    from tests.engines import unusable, write_engine

    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    if reason := unusable(kind):
        pytest.skip(reason)
    path = tmp_path / f"model{SUFFIXES[kind]}"
    write_engine(model_files["onnx"], path, kind, EngineOptions(max_batch=8))
    with load(path) as predictor:
        for seed in range(4):
            batch = images(20, seed)
            # Made on PyTorch's stream, behind enough work to be late.
            late = torch.zeros(4096, 4096, device="cuda")
            for _ in range(20):
                late = late @ late
            tensor = torch.from_numpy(batch).cuda() + late[0, 0].to(torch.uint8)
            np.testing.assert_array_equal(predictor.infer(tensor)[0], predictor.infer(batch)[0])
