"""The download against a local server that misbehaves in every way a real one does.

The archives here are small fakes (tests/data/fake_archive.py), the server is tests/data/server.py.
"""

from __future__ import annotations

import ast
import dataclasses
import gzip
import importlib.util
import pickle
import shutil
import socket
import socketserver
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from src.data import download
from src.data.cifar10 import CIFAR10, MAX_EXTRA_BYTES, images_and_labels, obtain, read_batches, unpack
from src.data.download import Archive, DataError, Patience, fetch
from tests.data.fake_archive import FILES, FOLDER, PAYLOAD, batch, described, md5, packed
from tests.data.server import QUICK, Host, serving


class Loudly:
    """A class that a pickle could call on loading."""

    called = False

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import tests.data.test_download as t; t.Loudly.called = True",))


@pytest.fixture
def host() -> Iterator[Host]:
    with serving() as here:
        yield here


@pytest.fixture(autouse=True)
def _no_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CIFAR10_URL", raising=False)


def attempt(root: Path, *urls: str, patience: Patience = QUICK) -> tuple[Path, list[str]]:
    lines: list[str] = []
    return fetch(root, lines.append, described(PAYLOAD, FILES, *urls), patience), lines


def only_files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_good_source_delivers_the_file_and_reports_progress(host: Host, tmp_path: Path) -> None:
    path, lines = attempt(tmp_path / "new" / "root", host.url("good"))
    assert path.read_bytes() == PAYLOAD
    assert only_files(path.parent) == ["fake.tar.gz"]
    assert lines
    assert "127.0.0.1" in lines[-1]
    assert "MB/s" in lines[-1]


def test_a_cut_download_is_resumed_where_it_stopped(host: Host, tmp_path: Path) -> None:
    path, _ = attempt(tmp_path, host.url("cut"))
    assert path.read_bytes() == PAYLOAD
    step = int(0.4 * len(PAYLOAD))
    assert host.seen == [("cut", None), ("cut", f"bytes={step}-"), ("cut", f"bytes={2 * step}-")]


def test_a_part_of_an_earlier_run_is_resumed_by_another_source(host: Host, tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz.part").write_bytes(PAYLOAD[:500])
    path, _ = attempt(tmp_path, host.url("404"), host.url("good"))
    assert path.read_bytes() == PAYLOAD
    assert host.seen == [("404", "bytes=500-"), ("good", "bytes=500-")]


def test_a_complete_part_needs_no_connection(host: Host, tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz.part").write_bytes(PAYLOAD)
    assert attempt(tmp_path, host.url("good"))[0].read_bytes() == PAYLOAD
    assert host.seen == []


@pytest.mark.parametrize("junk", [b"\0" * len(PAYLOAD), b"\0" * (len(PAYLOAD) + 1)], ids=["wrong", "too long"])
def test_a_part_that_cannot_be_right_is_dropped(host: Host, tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "fake.tar.gz.part").write_bytes(junk)
    assert attempt(tmp_path, host.url("good"))[0].read_bytes() == PAYLOAD
    assert host.seen == [("good", None)]


def test_a_damaged_part_is_found_by_the_md5_and_fetched_anew(host: Host, tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz.part").write_bytes(b"\0" * 500)
    path, lines = attempt(tmp_path, host.url("good"))
    assert path.read_bytes() == PAYLOAD
    assert host.seen == [("good", "bytes=500-"), ("good", None)]
    assert any(f"need {md5(PAYLOAD)}" in line for line in lines)


def test_a_server_without_ranges_starts_over(host: Host, tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz.part").write_bytes(PAYLOAD[:500])
    assert attempt(tmp_path, host.url("no-range"))[0].read_bytes() == PAYLOAD


def test_a_refused_range_starts_over(host: Host, tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz.part").write_bytes(PAYLOAD[:500])
    assert attempt(tmp_path, host.url("416"))[0].read_bytes() == PAYLOAD
    assert host.seen == [("416", "bytes=500-"), ("416", None)]


def test_a_slow_source_is_left_for_the_next_which_goes_on_from_there(host: Host, tmp_path: Path) -> None:
    path, lines = attempt(tmp_path, host.url("slow"), host.url("good"))
    assert path.read_bytes() == PAYLOAD
    assert any("too slow" in line for line in lines)
    way, asked = host.seen[-1]
    assert way == "good"
    assert asked is not None
    assert int(asked.removeprefix("bytes=").rstrip("-")) > 0


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        ("html", "web page"),
        ("disguised", "something else than a gzip"),
        ("wrong", "need " + md5(PAYLOAD)),
        ("other-size", f"offers 100 bytes, need {len(PAYLOAD)}"),
        ("endless", "more than the"),
        ("silent", "timed out"),
        ("404", "HTTP 404"),
    ],
)
def test_a_useless_source_is_named_with_its_fault(host: Host, tmp_path: Path, way: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        attempt(tmp_path, host.url(way))
    text = str(caught.value)
    assert f"{host.url(way)}: " in text
    assert reason in text
    for remedy in ("by hand", str(tmp_path / "fake.tar.gz"), md5(PAYLOAD), "CIFAR10_URL", "--data digits"):
        assert remedy in text
    left = only_files(tmp_path)
    assert left in ([], ["fake.tar.gz.part"])
    assert all(0 < (tmp_path / name).stat().st_size <= len(PAYLOAD) for name in left)
    assert attempt(tmp_path, host.url(way), host.url("good"))[0].read_bytes() == PAYLOAD


def _trickle(connection: socket.socket) -> None:
    """Headers without end, a letter now and then."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"x")
        time.sleep(0.03)


def _continue(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.01)


def _absurd_range(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 206 Partial\r\nContent-Range: bytes " + b"9" * 5000 + b"-1/*\r\n\r\n")


def _noise(connection: socket.socket) -> None:
    connection.sendall(b"\x1b[31m\x00\xff" * 500 + b"\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (_trickle, "no answer within 1 s"),
        (_continue, "no answer within 1 s"),
        (_absurd_range, "answers with the range 'bytes 9999"),
        (_noise, "no connection: [31m"),
    ],
)
def test_an_answer_that_never_begins_or_makes_no_sense(
    answer: Callable[[socket.socket], None], reason: str, host: Host, tmp_path: Path
) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            with suppress(OSError):
                answer(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/fake.tar.gz"
        lines: list[str] = []
        archive = described(PAYLOAD, FILES, url, host.url("good"))
        patience = Patience(timeout=0.1, rounds=1, pause=0.0, window=5.0)
        assert fetch(tmp_path, lines.append, archive, patience).read_bytes() == PAYLOAD
        server.shutdown()
    assert lines[0].startswith(f"{url}: ")
    assert reason in lines[0]
    assert len(lines[0]) < 400
    assert lines[0].isprintable()


@pytest.mark.parametrize("address", ["http://", "http://[::1", "ftp://x/y", "//x/y", "here"])
def test_an_override_that_is_no_address_is_refused(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CIFAR10_URL", address)
    with pytest.raises(DataError, match="need an http:// or https:// address of fake"):
        attempt(tmp_path)


def test_a_folder_in_the_archives_place_is_said_before_the_download(host: Host, tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz").mkdir()
    with pytest.raises(DataError, match="is a folder: need the archive itself there, or nothing; remove it"):
        attempt(tmp_path, host.url("good"))
    assert host.seen == []


def test_a_refused_answer_costs_nothing_of_the_part(host: Host, tmp_path: Path) -> None:
    part = tmp_path / "fake.tar.gz.part"
    part.write_bytes(PAYLOAD[:500])
    with pytest.raises(DataError, match="500 bytes received so far stay in"):
        attempt(tmp_path, host.url("html"), host.url("disguised"), host.url("shifted"), host.url("other-size"))
    assert part.read_bytes() == PAYLOAD[:500]


def test_all_failures_are_listed(host: Host, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        attempt(tmp_path, host.url("404"), host.url("html"), "http://127.0.0.1:9/nobody")
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0].strip() for line in lines[1:4]] == [
        host.url("404"),
        host.url("html"),
        "http://127.0.0.1:9/nobody",
    ]
    assert "no connection" in lines[3]


def test_the_override_is_the_only_source(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR10_URL", host.url("cut-once"))
    assert attempt(tmp_path, host.url("good"))[0].read_bytes() == PAYLOAD
    assert {way for way, _ in host.seen} == {"cut-once"}
    monkeypatch.setenv("CIFAR10_URL", host.url("404"))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="HTTP 404"):
        attempt(tmp_path / "other", host.url("good"))
    assert {way for way, _ in host.seen} == {"cut-once", "404"}
    monkeypatch.setenv("CIFAR10_URL", "/home/me/cifar.tar.gz")
    with pytest.raises(DataError, match=r"CIFAR10_URL='/home/me/cifar.tar.gz': need an http"):
        attempt(tmp_path, host.url("good"))


def test_a_full_disk_is_said_before_the_download(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(DataError, match=f"5 bytes free: need {3 * len(PAYLOAD)}"):
        attempt(tmp_path, host.url("good"))
    assert host.seen == []


def test_obtain_downloads_unpacks_and_leaves_only_the_folder(host: Host, tmp_path: Path) -> None:
    archive = described(PAYLOAD, FILES, host.url("good"))
    assert obtain(tmp_path, print, download=True, archive=archive)
    assert only_files(tmp_path) == [FOLDER]
    assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == FILES
    assert obtain(tmp_path, print, download=True, archive=archive)
    assert len(host.seen) == 1  # the second time nothing was fetched


def test_obtain_uses_an_archive_that_lies_there_and_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz").write_bytes(PAYLOAD)
    assert obtain(tmp_path, print, download=False, archive=described(PAYLOAD, FILES))
    assert only_files(tmp_path) == [FOLDER, "fake.tar.gz"]


def test_obtain_names_a_damaged_archive(tmp_path: Path) -> None:
    (tmp_path / "fake.tar.gz").write_bytes(PAYLOAD[:-3])
    with pytest.raises(DataError, match=f"fake.tar.gz is damaged: {len(PAYLOAD) - 3} bytes"):
        obtain(tmp_path, print, download=True, archive=described(PAYLOAD, FILES))


def test_obtain_without_download(tmp_path: Path) -> None:
    archive = described(PAYLOAD, FILES)
    assert not obtain(tmp_path / "absent", print, download=False, archive=archive)
    assert not (tmp_path / "absent").exists()
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "first").write_bytes(FILES["first"])
    with pytest.raises(DataError, match="incomplete: second missing"):
        obtain(tmp_path, print, download=False, archive=archive)


def test_obtain_completes_a_folder_with_missing_files(host: Host, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "first").write_bytes(FILES["first"])
    (tmp_path / FOLDER / "mine.txt").write_text("kept")
    assert obtain(tmp_path, print, download=True, archive=described(PAYLOAD, FILES, host.url("good")))
    assert sorted(only_files(tmp_path / FOLDER)) == ["first", "mine.txt", "second"]


def test_obtain_removes_what_a_killed_process_left(host: Host, tmp_path: Path) -> None:
    (tmp_path / ".cifar-10-abc" / FOLDER).mkdir(parents=True)
    (tmp_path / ".cifar-10-abc" / FOLDER / "first").write_bytes(b"half")
    assert obtain(tmp_path, print, download=True, archive=described(PAYLOAD, FILES, host.url("good")))
    assert only_files(tmp_path) == [FOLDER]


def test_obtain_waits_for_another_process_and_downloads_nothing(host: Host, tmp_path: Path) -> None:
    lock = FileLock(tmp_path / ".fake.tar.gz.lock")
    lock.acquire()

    def other_process(line: str) -> None:
        assert line == f"another process is preparing fake.tar.gz in {tmp_path}; waiting for it"
        place(tmp_path, FILES)
        lock.release()

    assert obtain(tmp_path, other_process, download=True, archive=described(PAYLOAD, FILES, host.url("good")))
    assert host.seen == []
    assert only_files(tmp_path) == [FOLDER]


def test_a_member_that_claims_too_much_is_not_unpacked(tmp_path: Path) -> None:
    archive = dataclasses.replace(described(PAYLOAD, FILES), size_bytes=1000 - MAX_EXTRA_BYTES)
    (tmp_path / "fake.tar.gz").write_bytes(PAYLOAD)
    with pytest.raises(DataError, match=f"first claims {len(FILES['first']):,} bytes"):
        unpack(tmp_path / "fake.tar.gz", tmp_path, archive)
    assert only_files(tmp_path) == ["fake.tar.gz"]


def test_unpacking_cannot_leave_the_folder(tmp_path: Path) -> None:
    def info(name: str, **changes: object) -> tarfile.TarInfo:
        made = tarfile.TarInfo(name)
        for key, value in changes.items():
            setattr(made, key, value)
        return made

    root = tmp_path / "root"
    root.mkdir()
    payload = packed(
        FILES,
        extra=(
            info("../escaped", size=4),
            info(str(tmp_path / "absolute"), size=4),
            info(f"{FOLDER}/../../first", size=4),
            info(f"{FOLDER}/first", type=tarfile.SYMTYPE, linkname=str(tmp_path / "target")),
            info(f"{FOLDER}/stranger", size=4),
        ),
    )
    (root / "fake.tar.gz").write_bytes(payload)
    unpack(root / "fake.tar.gz", root, described(payload, FILES))
    assert only_files(tmp_path) == ["root"]
    assert only_files(root / FOLDER) == ["first", "second"]
    assert not (root / FOLDER / "first").is_symlink()
    assert (root / FOLDER / "first").read_bytes() == FILES["first"]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (packed({"first": FILES["first"]}), "second is missing"),
        (packed({**FILES, "second": b"other"}), "second is damaged"),
        (packed(FILES, folder="elsewhere"), "first is missing"),
        (PAYLOAD[: len(PAYLOAD) // 2], "cannot unpack"),
        (gzip.compress(b"no tar at all" * 100), "cannot unpack"),
    ],
    ids=["missing", "damaged", "folder", "cut", "no tar"],
)
def test_a_bad_archive_changes_nothing(tmp_path: Path, payload: bytes, reason: str) -> None:
    (tmp_path / "fake.tar.gz").write_bytes(payload)
    with pytest.raises(DataError, match=reason):
        unpack(tmp_path / "fake.tar.gz", tmp_path, described(payload, FILES))
    assert only_files(tmp_path) == ["fake.tar.gz"]


def place(root: Path, files: dict[str, bytes]) -> Archive:
    (root / FOLDER).mkdir(exist_ok=True)
    for name, payload in files.items():
        (root / FOLDER / name).write_bytes(payload)
    return described(b"", files)


def test_batches_are_read_as_they_were_written(tmp_path: Path) -> None:
    archive = place(tmp_path, FILES)
    images, labels = images_and_labels(read_batches(tmp_path, ["second"], archive)["second"], "second")
    planes = np.random.default_rng(1).integers(0, 256, (50, 3072), dtype=np.uint8)
    assert labels.tolist() == list(range(50))
    # Pixel (row 5, column 7) of the green plane is number 1024 + 5 * 32 + 7 of the stored row.
    assert images.shape == (50, 32, 32, 3)
    assert images[:, 5, 7, 1].tolist() == planes[:, 1024 + 5 * 32 + 7].tolist()


def test_every_damaged_file_is_named_and_none_is_opened(tmp_path: Path) -> None:
    archive = place(tmp_path, {**FILES, "third": batch()})
    (tmp_path / FOLDER / "first").write_bytes(pickle.dumps(Loudly()))
    (tmp_path / FOLDER / "third").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read_batches(tmp_path, list(archive.files), archive)
    text = str(caught.value)
    assert str(tmp_path / FOLDER / "first") in text
    assert f"{tmp_path / FOLDER / 'third'} (0 bytes, md5 d41d8cd98f00b204e9800998ecf8427e" in text
    assert "second" not in text
    assert "Delete the damaged file" in text
    assert not Loudly.called


@pytest.mark.parametrize("payload", [pickle.dumps(Loudly()), b"junk", pickle.dumps([1])], ids=["code", "junk", "list"])
def test_a_pickle_cannot_run_code_even_with_the_right_md5(tmp_path: Path, payload: bytes) -> None:
    archive = place(tmp_path, {"first": payload})
    with pytest.raises(DataError, match="first is no CIFAR-10 batch"):
        read_batches(tmp_path, ["first"], archive)
    assert not Loudly.called


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    archive = place(tmp_path, FILES)
    (tmp_path / FOLDER / "first").unlink()
    with pytest.raises(DataError, match=r"cannot read .*first: No such file"):
        read_batches(tmp_path, ["first"], archive)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]},
        {"data": np.zeros((2, 99), np.uint8), "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
    ],
)
def test_a_batch_of_another_shape_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"need 'data' \(n, 3072\) uint8"):
        images_and_labels(content, "first")


def test_the_official_numbers_agree_with_torchvision() -> None:
    # Its source is read, not imported: the import alone takes longer than all tests here.
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.origin:
        pytest.skip("torchvision is not installed: its list of md5s cannot be compared")
    tree = ast.parse((Path(spec.origin).parent / "datasets" / "cifar.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "CIFAR10")
    official = {
        ast.unparse(node.targets[0]): ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign)
    }
    ours = CIFAR10
    assert ours.md5 == official["tgz_md5"]
    assert (ours.name, ours.folder) == (official["filename"], official["base_folder"])
    assert ours.sources[0] == official["url"]
    lists = [*official["train_list"], *official["test_list"], [official["meta"]["filename"], official["meta"]["md5"]]]
    assert dict(ours.files) == dict(lists)
