"""One shard: its rows are the predictor's answers; and a folder belongs to one job."""

from __future__ import annotations

import dataclasses

import pytest
from PIL import Image

import efficientface_deploy as ef
from efficientface_deploy.errors import ArtifactError, ConfigError
from efficientface_deploy.files import file_hash
from efficientface_deploy.vision.faces import Face

pq = pytest.importorskip("pyarrow.parquet")

from efficientface_deploy.batch import job as jobs  # noqa: E402 - pyarrow may be missing
from efficientface_deploy.batch.source import find_pictures  # noqa: E402

MODEL = ef.predictor.BUNDLED_ONNX


class Crowd:
    """Finds as many faces as a picture is wide, of which the first is small; none in a low one."""

    def detect(self, image):
        height, width, _ = image.shape
        if height < 50:
            return []
        large = Face((10.0, 10.0, 60.0, 70.0), 0.9)
        return [Face((0.0, 0.0, 9.0, 9.0), 0.5), *[large] * (width - 1)]


@pytest.fixture
def make_job(photo, tmp_path):
    """A job on some pictures, one of them damaged."""
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(20):
        Image.fromarray(photo).rotate(number).save(folder / f"{number:02}.png")
    (folder / "07.png").write_bytes((folder / "06.png").read_bytes()[:500])
    (tmp_path / "out").mkdir()

    def make(threads=2, size=15, **changes):
        options = jobs.Options(MODEL, file_hash(MODEL), "auto", None, None, None, None, 0.6, 640)
        options = dataclasses.replace(options, **changes)
        pictures = find_pictures(folder, None, tmp_path / "list.parquet")
        return jobs.Job(pictures, options, tmp_path / "out", size, threads)

    return make


def rows_of(job, shard=0):
    return pq.read_table(job.path(shard)).to_pylist()


@pytest.mark.parametrize(
    "content", ["5", "[1]", "[" * 100_000, "{", '{"shard": 0}', '{"shard": 1e999}']
)
def test_what_a_job_never_writes_is_one_line(make_job, content, tmp_path):
    (tmp_path / "out" / jobs.JOB_FILE).write_text(content)
    (tmp_path / "out" / "part-00000.parquet").touch()
    assert jobs.shard_size(tmp_path / "out", 100) == 32
    with pytest.raises(ConfigError, match=r"expected what (a|the) job"):
        jobs.begin(make_job())


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_the_answers_of_the_predictor(make_job, threads, monkeypatch):
    monkeypatch.setattr(jobs, "_CHUNK", 2)  # several for each thread, in their order
    job = make_job(threads)
    assert list(job.shards) == [0, 1]
    counts = [jobs.annotate_shard(job, shard) for shard in job.shards]
    assert sum(counts, jobs.Counter()) == {"pictures": 20, "faces": 19, "unreadable": 1}
    assert [job.counts(shard) for shard in job.shards] == counts
    rows = rows_of(job, 0) + rows_of(job, 1)
    assert [row["picture"] for row in rows] == list(range(20))
    with ef.load(threads=1) as predictor:
        for row in rows:
            if row["picture"] == 7:
                assert row["label"] is None and row["error"].startswith("expected a")
                continue
            answer = predictor(row["path"])
            assert (row["label"], row["unsure"]) == (answer.label, answer.unsure)
            found = {name: row[f"p_{name}"] for name in answer.probabilities}
            assert found == pytest.approx(answer.probabilities, abs=1e-5)
    assert {row["model"] for row in rows} == {file_hash(MODEL)}


def test_a_crowd_is_labelled_in_parts(make_job, monkeypatch):
    monkeypatch.setattr(jobs, "open_detector", lambda *_, **__: Crowd())
    batches = []
    label = jobs.Annotator._label
    monkeypatch.setattr(
        jobs.Annotator,
        "_label",
        lambda self, waiting: (batches.append(len(waiting)), label(self, waiting))[1],
    )
    job = make_job(threads=1, size=2, detector="crowd")
    width = Image.open(next(job.pictures.read(0, 1))[2]).width
    assert jobs.Annotator(job).annotate(0)["faces"] == 2 * width
    assert max(batches) <= 64 and sum(batches) == 2 * width
    rows = rows_of(job)
    assert [row["face"] for row in rows] == 2 * list(range(width))
    assert rows[0]["small"] and rows[0]["label"] is None and rows[1]["label"]
    assert rows[1]["right"] == 60 and rows[1]["score"] == pytest.approx(0.9)


def test_a_picture_without_a_face_has_a_row(make_job, monkeypatch):
    monkeypatch.setattr(jobs, "open_detector", lambda *_, **__: Crowd())
    job = make_job(size=1, detector="crowd")
    path = next(job.pictures.read(0, 1))[2]
    Image.new("RGB", (80, 40)).save(path)
    assert jobs.Annotator(job).annotate(0) == {"pictures": 1, "faces": 0, "unreadable": 0}
    (row,) = rows_of(job)
    assert (row["width"], row["height"], row["face"], row["error"]) == (80, 40, None, None)


def test_another_model_is_refused_where_the_work_is(make_job):
    with pytest.raises(ArtifactError, match=r"expected the model of this job, 0000, found \w{12}"):
        jobs.Annotator(make_job(model_hash="0000"))


def test_a_list_that_was_cut_is_not_a_shard(make_job):
    job = make_job()
    longer = dataclasses.replace(job, pictures=dataclasses.replace(job.pictures, count=25), size=25)
    with pytest.raises(ConfigError, match="expected 25 pictures, found 20"):
        jobs.Annotator(longer).annotate(0)
    assert longer.counts(0) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_hash": "12"}, "found others for model_hash; give what _job.json says"),
        ({"detector": "yunet"}, "found others for detector;"),
        ({"size": 4, "detector": "yunet"}, "found others for shard, detector;"),
    ],
)
def test_a_folder_belongs_to_one_job(make_job, changes, words):
    job = make_job()
    jobs.begin(job)
    (job.out / "part-00000.parquet").touch()
    jobs.begin(make_job(threads=7))  # which decides about no answer
    with pytest.raises(ConfigError, match=words):
        jobs.begin(make_job(**changes))


def test_a_job_without_a_shard_claims_nothing(make_job):
    """As one that was refused when its cluster was not there."""
    jobs.begin(make_job())
    job = make_job(detector="yunet")
    jobs.begin(job)
    (job.out / "part-00000.parquet").touch()
    with pytest.raises(ConfigError, match="found others for detector;"):
        jobs.begin(make_job())


def test_a_folder_with_other_files_is_refused(make_job):
    job = make_job()
    (job.out / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"an empty folder, or a job's, found thesis\.tex"):
        jobs.begin(job)


def test_shards_grow_with_the_set_and_stay_when_begun(make_job):
    job = make_job()
    sizes = {count: jobs.shard_size(job.out, count) for count in (1, 1000, 10**6)}
    assert sizes == {1: 32, 1000: 63, 10**6: 1000}
    jobs.begin(job)
    assert jobs.shard_size(job.out, 10**6) == 15
