from __future__ import annotations

import importlib.metadata
import json
import pickle
import shlex

import pytest

from efficientface_deploy import errors
from efficientface_deploy.errors import (
    ArtifactError,
    EfficientFaceError,
    ImageError,
    VerificationError,
    install_command,
)

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, EfficientFaceError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_message_says_expected_found_and_fix_and_survives_pickling(kind):
    error = kind("model.onnx", expected="a model", found="a cat", fix="feed it")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "model.onnx: expected a model, found a cat; feed it"
    assert type(copy) is kind
    assert (copy.subject, copy.expected, copy.found, copy.fix) == (
        "model.onnx",
        "a model",
        "a cat",
        "feed it",
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_only_a_failed_verification_exits_1(kind):
    assert kind.exit_code == (1 if kind is VerificationError else 2)


@pytest.mark.parametrize("hostile", ["a\nb", "a\r\nb", "\x1b[2J", "\ud800", "\u2028", "\x00"])
def test_message_is_one_printable_line(hostile):
    message = str(ArtifactError(hostile, hostile, hostile, hostile))
    assert message.isprintable()
    assert message.encode()


@pytest.mark.parametrize(
    ("found", "fix"),
    [
        ("RuntimeException (Exception during initialization: std::bad_alloc)", "free memory, or"),
        ("libtorch_cpu.so: failed to map segment from shared object", "free memory, or give"),
        ("damage (Too many open files (24))", "close other files, or allow more (ulimit -n)"),
        ("no shared memory object: Too many open files (24)", "close other files, or allow more"),
        ("unable to allocate shared memory", "export it again"),  # of /dev/shm, not of all
        ("damage", "export it again"),
    ],
)
def test_where_the_system_is_at_its_end_the_fix_is_that(found, fix):
    assert f"found {found}; {fix}" in str(ArtifactError("a", "b", found, "export it again"))


def test_long_findings_are_cut():
    error = ArtifactError("x", "y", "z" * 100_000, "w")
    assert len(str(error)) < 500
    assert str(error).endswith("...; w")


def test_a_subject_that_is_no_name_does_not_fill_the_log():
    """As a picture in base64 that is taken for a path; a path keeps both its ends."""
    error = ImageError("data:" + 10**6 * "A" + "end", "a path", "another thing", "give a path")
    assert len(str(error)) < 1200 and len(error.subject) == 10**6 + 8
    said = str(error)
    assert said.startswith("data:AAA") and "...AAA" in said and "Aend: expected a path" in said
    assert str(ImageError("x" * 999, "a", "b", "c")).startswith("x" * 999 + ": expected")


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("origin", ["a clone", "a wheel", "an index"])
def test_install_command_names_what_was_installed(origin, here, tmp_path, monkeypatch):
    clone, site = tmp_path / "the clone", tmp_path / "site" / "efficientface_deploy-1.dist-info"
    clone.mkdir()
    site.mkdir(parents=True)
    (clone / "setup.py").touch()
    (clone / "file.whl").touch()
    (site / "METADATA").write_text("Name: efficientface-deploy\nVersion: 1\n")
    if origin != "an index":
        url = clone.as_uri() + "/file.whl" * (origin == "a wheel")
        (site / "direct_url.json").write_text(json.dumps({"url": url, "dir_info": {}}))
    found = importlib.metadata.distributions(name="efficientface-deploy", path=[str(site.parent)])
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: found)
    monkeypatch.chdir(clone if here else tmp_path)
    expected = "efficientface-deploy" if origin != "a clone" else "." if here else str(clone)
    assert shlex.split(install_command("cpu")) == ["pip", "install", f"{expected}[cpu]"]
