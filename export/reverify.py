"""One artifact verified later, perhaps elsewhere: an engine needs neither torch nor onnx for it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import efficientface_deploy as ef
from efficientface_deploy.artifact import ENGINE_SUFFIX, ONNX_SUFFIX, describe_file, read_sidecar
from efficientface_deploy.errors import ArtifactError, ExportError
from efficientface_deploy.spec import ModelSpec
from efficientface_deploy.workbench.requirements import is_installed
from efficientface_export.verification.parity import score_artifact, verify_artifact, wrong_outputs
from efficientface_export.verification.provenance import Provenance
from efficientface_export.verification.reference import load_test_set, read_reference
from efficientface_export.verification.report import ReportRow


def verify_command(path: Path, val: Path | None = None, preset: str | None = None) -> int:
    """Verify one artifact by the reference outputs beside it; writes nothing.

    Args:
        path: The artifact.
        val: A labelled data set to score it on.
        preset: What its numbered folders mean.

    Returns:
        0.

    Raises:
        VerificationError: It computes something else.
        EfficientFaceError: A file is unusable, or nothing here can run the artifact.
    """
    _require_artifact(path)
    spec, record, arithmetic = _read(path)
    provenance = Provenance(record, path)
    weights = provenance.weights or {}
    test_set, logits = read_reference(path.parent, spec, weights.get("sha256"))
    verification = verify_artifact(path, logits, test_set, provenance.precision)
    row = ReportRow.of(path, path.parent, provenance, arithmetic, verification)
    print(row.describe())
    if verification.problems:
        raise wrong_outputs([row.file], "export it again")
    if verification.not_run:
        fix = "verify it on the machine that it was built for"
        raise ExportError(path, "a backend that can run it", verification.not_run, fix)
    if val is not None:
        labelled = load_test_set(val, spec, preset)
        scores = score_artifact(path, labelled)
        text = f"accuracy {scores.accuracy:.4f}, macro-F1 {scores.macro_f1:.4f}"
        print(f"  [ok] {labelled.source}: {text}")
    return 0


def _require_artifact(path: Path) -> None:
    """Refuse what is neither an ONNX file nor an engine, by what it is."""
    found = describe_file(path)
    if found in ("an ONNX file", "a TensorRT engine"):
        return
    if not os.path.isfile(path):
        fix = "check the path"
    elif found == "a checkpoint":
        fix = "export it first, and give the exported file"
    elif path.name.endswith(ENGINE_SUFFIX + ".json"):
        fix = f"give {path.stem}"
    elif path.name.endswith((ONNX_SUFFIX, ENGINE_SUFFIX)):
        fix = "copy it again, or export it again"
    else:
        fix = "give an exported file"
    raise ArtifactError(path, "an ONNX file or an engine of ours", found, fix)


def _read(path: Path) -> tuple[ModelSpec, Mapping[str, Any], str]:
    """Spec, provenance, and the precision as counted: empty where nothing here can count it."""
    if path.suffix == ENGINE_SUFFIX:
        spec, record, _ = read_sidecar(path)
        return spec, record, Provenance(record, path).arithmetic  # counted when it was built
    if not is_installed("onnx"):
        with ef.load(path, check=False) as predictor:
            return predictor.spec, predictor.provenance, ""
    from efficientface_export.graph.io import read_onnx
    from efficientface_export.graph.precision import require_precision

    file = read_onnx(path)
    provenance = Provenance(file.provenance, path)
    counted = require_precision(file.graph, provenance.precision, provenance.excluded, path)
    return file.spec, file.provenance, counted
