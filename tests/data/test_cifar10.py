"""CIFAR-10 from a local server that misbehaves in every way a real one does, unpacked and read.

The archive is a small fake (fake_archive.py), the server is server.py.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from src.data import DataError, cifar10, load_data
from src.data.cifar10 import FOLDER, NAME, obtain, read_images
from tests.data.fake_archive import FILES, PAYLOAD, md5, packed, pretend
from tests.data.server import Host, serving

PART = f"{NAME}.part"
Attempt = Callable[..., list[str]]


@pytest.fixture
def host() -> Iterator[Host]:
    with serving() as here:
        yield here


@pytest.fixture
def attempt(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Prepare CIFAR-10 in tmp_path from sources that answer in these ways; returns what was notified."""

    def run(*ways: str) -> list[str]:
        lines: list[str] = []
        pretend(monkeypatch, tuple(host.url(way) for way in ways))
        assert obtain(tmp_path, lines.append, download=True)
        assert unpacked(tmp_path) == FILES
        assert visible(tmp_path) == [FOLDER]
        return lines

    return run


def unpacked(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / FOLDER).iterdir()}


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def place(root: Path, files: dict[str, bytes]) -> None:
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, payload in files.items():
        (root / FOLDER / name).write_bytes(payload)


def test_a_download_reports_sizes_and_is_resumed_where_it_was_cut(host: Host, attempt: Attempt, tmp_path: Path) -> None:
    lines, step = attempt("cut"), int(0.4 * len(PAYLOAD))
    assert host.seen == [("cut", 0), ("cut", step), ("cut", 2 * step)]
    assert f"127.0.0.1: {len(PAYLOAD) / 1e6:.1f} of {len(PAYLOAD) / 1e6:.1f} MB, " in lines[-3]
    assert lines[-1] == f"CIFAR-10 is ready in {tmp_path / FOLDER}"
    assert attempt("good") == []  # nothing is left to do
    assert len(host.seen) == 3


@pytest.mark.parametrize(
    ("part", "ways", "seen"),
    [
        (PAYLOAD[:500], ["404", "good"], [("404", 500), ("good", 500)]),
        (PAYLOAD[:500], ["no-range"], [("no-range", 500)]),
        (PAYLOAD[:500], ["endless"], [("endless", 500)]),
        (PAYLOAD, ["good"], []),
        (b"\0" * 500, ["good"], [("good", 500), ("good", 0)]),
        (b"\0" * len(PAYLOAD), ["good"], [("good", 0)]),
        (PAYLOAD + b"more", ["good"], [("good", 0)]),
    ],
    ids=["resumed elsewhere", "no ranges", "endless", "complete", "damaged", "wrong", "too long"],
)
def test_what_an_earlier_attempt_left_is_resumed_or_deleted(
    part: bytes, ways: list[str], seen: list[tuple[str, int]], host: Host, attempt: Attempt, tmp_path: Path
) -> None:
    (tmp_path / PART).write_bytes(part)
    attempt(*ways)
    assert host.seen == seen


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("page", f"offers 26 bytes, need {len(PAYLOAD)}"),
        ("disguised", "something else than a gzip file"),
        ("wrong", f"need {md5(PAYLOAD)}; it was deleted"),
        ("silent", "timed out"),
        ("noise", "x1b[31m"),
        ("404", "HTTP Error 404"),
    ],
)
def test_a_useless_source_is_named_with_its_fault(
    way: str, reason: str, host: Host, attempt: Attempt, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        attempt(way)
    text = str(caught.value)
    assert text.count(host.url(way)) == 1
    assert all(line.isprintable() for line in text.splitlines())
    for part in (reason, "by hand", str(tmp_path / NAME), md5(PAYLOAD), "CIFAR10_URL", "--data digits"):
        assert part in text
    assert visible(tmp_path) == []
    assert any(reason in line for line in attempt(way, "good"))


def test_a_refused_answer_costs_nothing_of_what_is_there(attempt: Attempt, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(PAYLOAD[:500])
    with pytest.raises(DataError, match=f"The 500 bytes received so far stay in .*{PART} and are resumed"):
        attempt("page", "disguised", "404")
    assert (tmp_path / PART).read_bytes() == PAYLOAD[:500]


def test_without_a_network_each_source_is_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, ("http://127.0.0.1:9/one", "http://127.0.0.1:9/two"))
    with pytest.raises(DataError, match=r"every source failed:\n  .*/one: .*refused.*\n  .*/two: .*refused.*\nPlace"):
        load_data("cifar10", tmp_path)  # it never falls back to the digits
    assert visible(tmp_path) == []


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("{host}/404/x", r"failed:\n  http://.*/404/x: HTTP Error 404.*\nPlace"),
        ("/home/me/cifar.tar.gz", "CIFAR10_URL='/home/me/cifar.tar.gz': need an http:// or https:// address of cifar"),
        ("http://[::1", "Invalid IPv6 URL"),
    ],
)
def test_the_override_is_the_only_source(
    address: str, message: str, host: Host, attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, (host.url("good"),))
    monkeypatch.setenv("CIFAR10_URL", address.format(host=host.address))
    with pytest.raises(DataError, match=message):
        obtain(tmp_path, print, download=True)
    assert ("good", 0) not in host.seen


def test_a_full_disk_is_named_before_a_download(host: Host, attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(DataError, match=f"5 bytes free: need {3 * len(PAYLOAD)}"):
        attempt("good")
    assert host.seen == []


def test_an_archive_that_lies_there_is_kept_and_cannot_write_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["../escaped", str(tmp_path / "absolute"), f"{FOLDER}/../../data_batch_1", f"{FOLDER}/stranger"]
    payload = packed(FILES, tuple(tarfile.TarInfo(name) for name in names))
    pretend(monkeypatch, payload=payload)
    root = tmp_path / "root"
    root.mkdir()
    (root / NAME).write_bytes(payload[:-3])
    with pytest.raises(DataError, match=rf"damaged: .*{NAME} \({len(payload) - 3} bytes, .*Delete the damaged file"):
        obtain(root, print, download=True)
    assert visible(root) == [NAME]
    (root / NAME).write_bytes(payload)
    assert obtain(root, print, download=False)
    assert visible(tmp_path) == ["root"]
    assert visible(root) == sorted([FOLDER, NAME])
    assert unpacked(root) == FILES


def test_half_a_folder_is_refused_without_and_completed_by_a_download(
    attempt: Attempt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    assert not obtain(tmp_path / "absent", print, download=False)
    assert not (tmp_path / "absent").exists()
    place(tmp_path, {"data_batch_1": b"damaged", ".test_batch-x.tmp": b"left by a killed process"})
    with pytest.raises(DataError, match=r"incomplete: data_batch_2, test_batch, batches\.meta missing; .* download"):
        obtain(tmp_path, print, download=False)
    attempt("good")


def test_a_root_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for data in ("auto", "cifar10"):
        with pytest.raises(DataError, match="is a file: need a folder"):
            load_data(data, tmp_path / "file")
    with pytest.raises(DataError, match=r"cannot write to data root .*: Not a directory"):
        load_data("cifar10", tmp_path / "file" / "below")


def test_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    lock = FileLock(tmp_path / f".{NAME}.lock")
    lock.acquire()

    def other_process(line: str) -> None:
        assert line == f"another process is preparing {NAME} in {tmp_path}; waiting for it"
        place(tmp_path, FILES)
        lock.release()

    assert obtain(tmp_path, other_process, download=True)
    assert visible(tmp_path) == [FOLDER]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.4, 0.6])
def test_two_processes_at_a_time_and_one_of_them_killed(
    delay: float, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, (host.url("slow"),))
    fork = multiprocessing.get_context("fork")
    pair = [fork.Process(target=obtain, args=(tmp_path, print, True)) for _ in range(2)]
    for process in pair:
        process.start()
    pair[0].join(delay)
    pair[0].kill()
    pair[1].join()
    assert pair[1].exitcode == 0
    assert unpacked(tmp_path) == FILES
    assert set(visible(tmp_path)) <= {FOLDER, NAME}  # the archive stays where its downloader was killed afterwards


def test_images_are_read_in_the_official_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    place(tmp_path, FILES)
    data = load_data("auto", tmp_path)
    assert (data.name, data.title, data.notice) == ("cifar10", "CIFAR-10", "")
    assert (data.mean, data.std) == (cifar10.CIFAR10_MEAN, cifar10.CIFAR10_STD)
    assert data.class_names == tuple(f"c{n}" for n in range(10))
    assert data.train_labels.tolist() == [*range(4), *range(10), *range(5)]
    assert data.test_labels.tolist() == [*range(10), 0, 1]
    planes = np.random.default_rng(1).integers(0, 256, (15, 3072), dtype=np.uint8)
    # Pixel (row 5, column 7) of the green plane is number 1024 + 5 * 32 + 7 of the stored row.
    assert data.train_images[4:, 1, 5, 7].tolist() == planes[:, 1024 + 5 * 32 + 7].tolist()


class Loudly:
    """A class that a pickle could call on loading."""

    called = False

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import tests.data.test_cifar10 as t; t.Loudly.called = True",))


def test_a_damaged_file_is_named_and_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    other = {**FILES, "data_batch_2": pickle.dumps(Loudly())}
    place(tmp_path, other)
    for data in ("auto", "cifar10"):
        with pytest.raises(DataError, match=r"damaged: .*data_batch_2 \(\d+ bytes, md5 .*Delete the damaged file"):
            load_data(data, tmp_path)
    pretend(monkeypatch, files=other)  # even with the right md5
    with pytest.raises(pickle.UnpicklingError, match=r"it asks for builtins\.exec"):
        read_images(tmp_path)
    assert not Loudly.called
    (tmp_path / FOLDER / "data_batch_1").unlink()
    with pytest.raises(DataError, match=r"cannot read .*data_batch_1: No such file.*make it readable"):
        read_images(tmp_path)


def test_the_official_numbers_agree_with_torchvision() -> None:
    # Its source is read, not imported: the import alone takes longer than all tests here.
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "datasets" / "cifar.py").read_text()
    for official in (NAME, FOLDER, cifar10.MD5, cifar10.SOURCES[-1], *cifar10.FILES, *cifar10.FILES.values()):
        assert f'"{official}"' in text
