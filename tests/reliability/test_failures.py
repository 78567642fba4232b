"""The matrix within one process: a training loop fails at a moment and is continued, and ends as the unbroken one.

`python -m tests.reliability` strikes the command in processes of its own, at random moments.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest

from src.data import ImageData, load_data
from tests.reliability import failures
from tests.reliability.failures import FAILURES, Killed, Moment
from tests.reliability.small_run import (
    SETTINGS,
    Unbroken,
    differences,
    open_loop,
    prepare,
    steps_kept,
    train,
)

CASES = [
    (name, kind, step, ("resume", "enter again")[(number + index) % 2] if failure.ends is not Killed else "resume")
    for name, failure in FAILURES.items()
    for number, kind in enumerate(failure.kinds)
    for index, step in enumerate(failure.steps)
]


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits", limit=SETTINGS["limit"])


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has one entry for each training step of the test."""
    done: list[int] = []
    prepare(monkeypatch, lambda: done.append(1))
    return done


def die_within(patch: pytest.MonkeyPatch) -> None:
    """What `die` does here: from then on nothing is written or cleaned up, as by a process that is gone."""

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    def die() -> None:
        patch.setattr(tempfile, "mkstemp", killed)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        killed()

    patch.setattr(failures, "die", die)


@pytest.mark.parametrize(("name", "kind", "step", "way"), CASES)
def test_the_continued_run_ends_as_the_unbroken_one(
    name: str, kind: str, step: int, way: str, data: ImageData, steps: list[int], tiny_run: Unbroken, tmp_path: Path
) -> None:
    failure, folder, said = FAILURES[name], tmp_path / "run", []
    loop = open_loop(data, folder, said.append)
    history = loop.run.history
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        die_within(patch)
        failure.inject(patch, Moment(step, kind, folder))
        if failure.ends is None:
            train(loop)
        else:
            with pytest.raises(failure.ends) as caught:
                train(loop)
            said.append(str(caught.value))
    said += [str(warning.message) for warning in warned]
    assert any(re.search(failure.kinds[kind], line) for line in said), said
    failure.mend(folder)
    folder.mkdir(exist_ok=True)
    kept, done = steps_kept(folder), len(steps)
    assert done - kept <= failure.loses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "enter again":
            train(loop)
            assert loop.run.history is history  # a figure that shows it continues to
        else:
            train(open_loop(data, folder, said.append, resume=bool(kept)))
    assert not differences(folder, tiny_run.folder, command=False)
