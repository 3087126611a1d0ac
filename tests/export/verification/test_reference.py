"""What an artifact is compared with: the test set, and what is stored beside it."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from efficientface_deploy.errors import ArtifactError, DatasetError
from efficientface_deploy.spec import ModelSpec, preset
from efficientface_export.verification.reference import (
    REFERENCE_FILE,
    TestSet,
    load_test_set,
    read_reference,
    stored_parent,
    write_reference,
)

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.standard_normal((200, 7)).astype(np.float32) * 2
PARENT = "f" * 64


class TestTestSet:
    def test_bundled_faces(self, small_spec: ModelSpec) -> None:
        for size in (64, 224):
            test_set = load_test_set(None, small_spec.replace(input_size=size))
            assert test_set.images.shape == (16, size, size, 3)
            assert test_set.images.dtype == np.uint8
            assert len({image.tobytes() for image in test_set.images}) == 16
            assert test_set.labels is None
            assert test_set.source == "16 synthetic faces"

    def test_prepared_data_set(self, faces: Path, small_spec: ModelSpec) -> None:
        test_set = load_test_set(faces, small_spec)
        assert test_set.source == "synthetic faces, test, 14 images"
        assert test_set.images.shape == (14, 64, 64, 3)
        assert test_set.labels is not None
        assert sorted(set(test_set.labels)) == list(range(7))

    def test_class_without_images_is_named(
        self, faces: Path, small_spec: ModelSpec, tmp_path: Path
    ) -> None:
        root = Path(shutil.copytree(faces, tmp_path / "faces"))
        lines = (root / "manifest.csv").read_text().splitlines()
        kept = [line for line in lines if not line.startswith(("test/4/", "test/6/"))]
        (root / "manifest.csv").write_text("\n".join(kept))
        source = load_test_set(root, small_spec).source
        assert source == "synthetic faces, test, 10 images, none of Fear, Anger"

    def test_labels_of_another_model(self, faces: Path) -> None:
        with pytest.raises(DatasetError, match="the model's labels: Neutral, Happiness, Surprise"):
            load_test_set(faces, preset("ferplus"))

    def test_published_layout_needs_a_preset(self, ferplus: Path, small_spec: ModelSpec) -> None:
        with pytest.raises(DatasetError, match="--preset"):
            load_test_set(ferplus, small_spec)
        test_set = load_test_set(ferplus, preset("ferplus"), "ferplus")
        assert len(test_set.images) == 300


class TestStoredReference:
    def write(self, folder: Path, count: int = 200, source: str = "faces") -> TestSet:
        images = RANDOM.integers(0, 255, (count, 64, 64, 3), dtype=np.uint8)
        test_set = TestSet(images, None, source)
        write_reference(folder, test_set, LOGITS[:count], PARENT)
        return test_set

    def test_round_trip(self, tmp_path: Path, small_spec: ModelSpec) -> None:
        written = self.write(tmp_path)
        test_set, logits = read_reference(tmp_path, small_spec, PARENT)
        assert test_set.source == "16 of faces"
        assert test_set.labels is None
        assert len(test_set.images) == len(logits) == 16
        assert logits.dtype == np.float32
        # Evenly spread: the images of a data set are sorted by class.
        for kept, where in ((0, 0), (15, 199), (8, 106)):
            np.testing.assert_array_equal(test_set.images[kept], written.images[where])
            np.testing.assert_array_equal(logits[kept], LOGITS[where])
        assert stored_parent(tmp_path) == PARENT

    def test_features_are_kept(self, tmp_path: Path, small_spec: ModelSpec) -> None:
        images = RANDOM.integers(0, 255, (20, 64, 64, 3), dtype=np.uint8)
        features = RANDOM.standard_normal((20, 1024)).astype(np.float32)
        test_set = TestSet(images, None, "faces", features)
        write_reference(tmp_path, test_set, LOGITS[:20], PARENT)
        again, logits = read_reference(tmp_path, small_spec, PARENT)
        assert again.features is not None and again.features.shape == (16, 1024)
        kept = [int(np.flatnonzero((LOGITS[:20] == row).all(axis=1))[0]) for row in logits]
        np.testing.assert_array_equal(again.features, features[kept])
        self.write(tmp_path)
        assert read_reference(tmp_path, small_spec, PARENT)[0].features is None

    def test_written_again_it_stays(self, tmp_path: Path, small_spec: ModelSpec) -> None:
        self.write(tmp_path)
        first, logits = read_reference(tmp_path, small_spec, PARENT)
        write_reference(tmp_path, first, logits, PARENT)
        again, _ = read_reference(tmp_path, small_spec, PARENT)
        assert again.source == first.source
        np.testing.assert_array_equal(again.images, first.images)

    def test_fewer_images(self, tmp_path: Path, small_spec: ModelSpec) -> None:
        self.write(tmp_path, 3)
        test_set, _ = read_reference(tmp_path, small_spec, None)
        assert (len(test_set.images), test_set.source) == (3, "faces")

    def test_missing(self, tmp_path: Path, small_spec: ModelSpec) -> None:
        with pytest.raises(ArtifactError, match=r"verify\.npz: .*no such file; copy"):
            read_reference(tmp_path, small_spec, PARENT)
        assert stored_parent(tmp_path) is None

    def test_other_weights(self, tmp_path: Path, small_spec: ModelSpec) -> None:
        self.write(tmp_path)
        with pytest.raises(ArtifactError, match=r"of the weights eeee.*found those of ffff"):
            read_reference(tmp_path, small_spec, "e" * 64)

    def test_another_model(self, tmp_path: Path, small_spec: ModelSpec) -> None:
        self.write(tmp_path)
        with pytest.raises(
            ArtifactError, match=r"\(96, 96, 3\) and 7 logits, found .*\(64, 64, 3\)"
        ):
            read_reference(tmp_path, small_spec.replace(input_size=96), PARENT)
        with pytest.raises(ArtifactError, match=r"and 8 logits, found .* and 7 logits"):
            read_reference(tmp_path, preset("ferplus").replace(input_size=64), PARENT)

    def test_a_small_file_that_unpacks_to_gigabytes(
        self, tmp_path: Path, small_spec: ModelSpec
    ) -> None:
        self.write(tmp_path)
        with (
            zipfile.ZipFile(tmp_path / REFERENCE_FILE, "a", zipfile.ZIP_DEFLATED) as archive,
            archive.open("features.npy", "w") as file,
        ):
            for _ in range(300):
                file.write(bytes(1 << 20))
        assert (tmp_path / REFERENCE_FILE).stat().st_size < 1 << 20
        with pytest.raises(ArtifactError, match=r"verify\.npz: .*a damaged file"):
            read_reference(tmp_path, small_spec, PARENT)

    def test_damaged(self, tmp_path: Path, small_spec: ModelSpec) -> None:
        self.write(tmp_path)
        path = tmp_path / REFERENCE_FILE
        content = path.read_bytes()
        for damaged in (b"", b"not a zip", content[: len(content) // 2], content[:-4000]):
            path.write_bytes(damaged)
            with pytest.raises(ArtifactError, match=r"verify\.npz: .*a damaged file"):
                read_reference(tmp_path, small_spec, PARENT)
            assert stored_parent(tmp_path) is None

    @pytest.mark.parametrize(
        "change",
        [
            {"images": np.zeros((16, 64, 64, 3), dtype=np.float32)},
            {"images": np.zeros((16, 64), dtype=np.uint8)},
            {"images": np.zeros((15, 64, 64, 3), dtype=np.uint8)},
            {"images": np.zeros((0, 64, 64, 3), dtype=np.uint8), "logits": np.zeros((0, 7))},
            {"logits": np.zeros(16, dtype=np.float32)},
            {"logits": np.array([["a"] * 7] * 16)},
            {"logits": None},
            {"source": None},
            {"parent": None},
            {"images": np.array([object()])},
        ],
    )
    def test_foreign(self, tmp_path: Path, small_spec: ModelSpec, change: dict[str, Any]) -> None:
        """Nothing in the file is unpickled, and nothing else is trusted."""
        arrays: dict[str, Any] = {
            "images": np.zeros((16, 64, 64, 3), dtype=np.uint8),
            "logits": LOGITS[:16],
            "source": np.array("faces"),
            "parent": np.array(PARENT),
        }
        arrays = {key: value for key, value in (arrays | change).items() if value is not None}
        np.savez(tmp_path / REFERENCE_FILE, **arrays)
        with pytest.raises(ArtifactError, match="a damaged file"):
            read_reference(tmp_path, small_spec, PARENT)
