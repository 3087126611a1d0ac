"""Where something was made."""

from efficientface_deploy.workbench import environment


def test_commit_of_a_clone_and_of_a_copy(monkeypatch, tmp_path):
    commit = environment.git_commit()
    assert commit is None or len(commit.rstrip("+")) == 40
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    environment.git_commit.cache_clear()
    assert environment.git_commit() is None
    environment.git_commit.cache_clear()
