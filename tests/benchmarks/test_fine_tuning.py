from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import fine_tuning as bench
from efficientface_deploy.errors import ConfigError
from efficientface_deploy.workbench.dataset import read_dataset


@pytest.fixture(scope="module")
def faces(prepare_faces):
    return prepare_faces(210, 35)


def test_halves_share_nothing_and_the_second_begins_with_every_class(faces):
    dataset = read_dataset(faces)
    first, second = bench.halves(dataset, 0)
    assert {sample.path for sample in first}.isdisjoint(sample.path for sample in second)
    assert len(first) + len(second) == len(dataset.split("train"))
    assert {sample.label for sample in second[:7]} == set(range(7))
    assert bench.halves(dataset, 0) == (first, second) != bench.halves(dataset, 1)


@pytest.mark.slow
def test_every_way_is_scored(faces, tmp_path):
    arguments = ["--data", str(faces), "--own", "70", "--input-size", "32", "--base-epochs", "1"]
    arguments += ["--steps", "1", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert bench.main(arguments) == 0
    result = json.loads((tmp_path / "out/finetuning.json").read_text())
    ways = [(row["way"], row["images"]) for row in result["cases"]]
    assert ways[1:] == [("from scratch", 70), ("all layers", 70), ("a new last layer", 70)]
    assert ways[0][1] == len(bench.halves(read_dataset(faces), 0)[0])
    assert all(np.isfinite(row["accuracy"]) for row in result["cases"])
    assert (tmp_path / "out/finetuning.md").is_file()


@pytest.mark.parametrize("own", ["1", "1000"])
def test_too_few_or_too_many(own, faces, tmp_path):
    config = bench.FineTuningConfig(data=faces, own=(int(own),))
    with pytest.raises(ConfigError, match="--own: expected 64 to 105, half of the training split"):
        bench.run(config)
