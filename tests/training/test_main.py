from __future__ import annotations

import pytest

from efficientface_deploy.errors import ConfigError
from tests.test_imports import TRAINING_COMMANDS
from training.__main__ import COMMANDS, main


def test_every_command_is_listed(capsys):
    assert {f"training.{name}" for name in COMMANDS} == TRAINING_COMMANDS
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"\n  {name}" in printed for name in COMMANDS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], r"expected one of prepare, .*type e\.g\. python -m training --help"),
        (["studnet"], r"found 'studnet'; did you mean student\?"),
        (["student", "--help"], r"a point before .*type python -m training\.student$"),
    ],
)
def test_one_line_says_what_to_type(argv, said):
    with pytest.raises(ConfigError, match=said):
        main(argv)
