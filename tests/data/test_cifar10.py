"""CIFAR-10 (a small fake, fake_archive.py) from a local server that misbehaves as real ones do, unpacked and read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from torchvision.datasets import CIFAR10

from src.data import DataError, cifar10, load_data
from src.data.cifar10 import FOLDER, NAME, obtain
from tests.data.fake_archive import FILES, PAYLOAD, md5, pretend

PART = f"{NAME}.part"
TOTAL = len(PAYLOAD)
PAGE = b"<html>please log in</html>"
Attempt = Callable[..., list[str]]


@dataclass
class Host:
    """Where the server is, and what it was asked for: the way to answer, and the first byte."""

    address: str
    seen: list[tuple[str, int]] = field(default_factory=list)

    def url(self, way: str) -> str:
        return f"{self.address}/{way}/cifar.tar.gz"


def answer(way: str, first: int) -> tuple[int, bytes, int]:
    """Status, body and Content-Length for a request of the bytes from `first` on."""
    rest = PAYLOAD[first:]
    answers = {
        "cut": (206, rest[: int(0.4 * TOTAL)], len(rest)),
        "wrong": (206, rest[:-1] + bytes([rest[-1] ^ 1]), len(rest)),
        "no-range": (200, PAYLOAD, TOTAL),
        "page": (200, PAGE, len(PAGE)),
        "404": (404, b"", 0),
    }
    return answers.get(way, (206, rest, len(rest)))


@pytest.fixture
def host() -> Iterator[Host]:
    """A server of PAYLOAD. The first part of a path says in which way it answers."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            way, first = self.path.split("/")[1], int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            here.seen.append((way, first))
            status, body, length = answer(way, first)
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        here = Host(f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield here
        server.shutdown()


@pytest.fixture
def attempt(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Prepare CIFAR-10 in tmp_path from sources that answer in these ways; returns what was notified."""

    def run(*ways: str) -> list[str]:
        lines: list[str] = []
        pretend(monkeypatch, tuple(host.url(way) for way in ways))
        assert obtain(tmp_path, lines.append, download=True)
        assert {path.name: path.read_bytes() for path in (tmp_path / FOLDER).iterdir()} == FILES
        assert visible(tmp_path) == [FOLDER]
        return lines

    return run


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


def place(root: Path) -> None:
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, payload in FILES.items():
        (root / FOLDER / name).write_bytes(payload)


def test_a_download_reports_sizes_and_is_resumed_where_it_was_cut(host: Host, attempt: Attempt, tmp_path: Path) -> None:
    lines, step = attempt("cut"), int(0.4 * TOTAL)
    assert host.seen == [("cut", 0), ("cut", step), ("cut", 2 * step)]
    assert f"127.0.0.1: {TOTAL / 1e6:.1f} of {TOTAL / 1e6:.1f} MB" in lines
    assert lines[-1] == f"CIFAR-10 is ready in {tmp_path / FOLDER}"
    assert attempt("good") == []  # nothing is left to do
    assert len(host.seen) == 3


@pytest.mark.parametrize(
    ("part", "ways", "seen"),
    [
        (PAYLOAD[:500], ["404", "good"], [("404", 500), ("good", 500)]),
        (PAYLOAD[:500], ["no-range"], [("no-range", 500)]),
        (PAYLOAD, ["good"], []),
        (b"\0" * 500, ["good"], [("good", 500), ("good", 0)]),
        (PAYLOAD + b"more", ["good"], [("good", 0)]),
    ],
    ids=["resumed elsewhere", "no ranges", "complete", "damaged", "too long"],
)
def test_what_an_earlier_attempt_left_is_resumed_or_deleted(
    part: bytes, ways: list[str], seen: list[tuple[str, int]], host: Host, attempt: Attempt, tmp_path: Path
) -> None:
    (tmp_path / PART).write_bytes(part)
    attempt(*ways)
    assert host.seen == seen


@pytest.mark.parametrize(
    ("way", "reason", "left"),
    [
        ("page", f"offers 26 bytes, need {TOTAL}", 500),
        ("wrong", f"need {md5(PAYLOAD)}; it was deleted", 0),
        ("404", "HTTP Error 404", 500),
    ],
)
def test_a_useless_source_is_named_with_its_fault(
    way: str, reason: str, left: int, host: Host, attempt: Attempt, tmp_path: Path
) -> None:
    (tmp_path / PART).write_bytes(PAYLOAD[:500])
    with pytest.raises(DataError) as caught:
        attempt(way)
    text = str(caught.value)
    assert "\n" not in text
    for part in (reason, f"{left} bytes", f"by hand as {tmp_path / NAME}", "CIFAR10_URL", "--data digits"):
        assert part in text
    assert any(reason in line for line in attempt(way, "good"))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("{host}/404/x", r"downloaded \(HTTP Error 404: [\w ]+\)\. Run it again"),
        ("http://127.0.0.1:9/x", r"downloaded \(\[Errno \d+\] Connection refused\)\. Run it again"),
        ("/home/me/cifar.tar.gz", "unknown url type"),
    ],
)
def test_the_override_is_the_only_source(
    address: str, message: str, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, (host.url("good"),))
    monkeypatch.setenv("CIFAR10_URL", address.format(host=host.address))
    with pytest.raises(DataError, match=message):
        load_data("cifar10", tmp_path)  # it never falls back to the digits
    assert ("good", 0) not in host.seen


def test_offline_every_source_is_tried_once_and_the_reason_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = [f"http://127.0.0.1:9/{number}" for number in range(4)]
    pretend(monkeypatch, tuple(addresses))
    lines: list[str] = []
    with pytest.raises(DataError) as caught:
        obtain(tmp_path, lines.append, download=True)
    assert [line.split(": ")[0] for line in lines] == addresses
    assert str(caught.value).count("refused") == 1
    assert not any(address in str(caught.value) for address in addresses)


def test_an_archive_that_lies_there_is_unpacked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    assert not obtain(tmp_path, print, download=False)
    (tmp_path / NAME).write_bytes(PAYLOAD[:-3])
    with pytest.raises(DataError, match=rf"damaged: .*{NAME} \({TOTAL - 3} bytes, .*Delete the damaged file"):
        obtain(tmp_path, print, download=True)
    assert visible(tmp_path) == [NAME]
    (tmp_path / NAME).write_bytes(PAYLOAD)
    assert obtain(tmp_path, print, download=False)
    assert visible(tmp_path) == [FOLDER, NAME]


def test_another_process_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with FileLock(tmp_path / f".{NAME}.lock"):
        waiting = threading.Thread(target=obtain, args=(tmp_path, print, True))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        place(tmp_path)
    waiting.join()
    assert visible(tmp_path) == [FOLDER]


def test_images_are_read_in_the_official_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    place(tmp_path)
    data = load_data("auto", tmp_path)
    assert (data.name, data.title, data.notice) == ("cifar10", "CIFAR-10", "")
    assert (data.mean, data.std) == (cifar10.CIFAR10_MEAN, cifar10.CIFAR10_STD)
    assert data.class_names == tuple(f"c{n}" for n in range(10))
    assert data.train_labels.tolist() == [*range(4), *range(10), *range(5)]
    assert data.test_labels.tolist() == [*range(10), 0, 1]
    planes = np.random.default_rng(1).integers(0, 256, (15, 3072), dtype=np.uint8)
    # Pixel (row 5, column 7) of the green plane is number 1024 + 5 * 32 + 7 of the stored row.
    assert data.train_images[4:, 1, 5, 7].tolist() == planes[:, 1024 + 5 * 32 + 7].tolist()


def test_a_damaged_or_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    place(tmp_path)
    batch = tmp_path / FOLDER / "data_batch_2"
    for spoil in (lambda: batch.write_bytes(b"damaged"), batch.unlink):
        spoil()
        for data in ("auto", "cifar10"):
            with pytest.raises(DataError, match=r"damaged or missing: .*data_batch_2 \(need md5 .*Delete the folder"):
                load_data(data, tmp_path)


def test_the_official_numbers_agree_with_torchvision() -> None:
    official = (CIFAR10.filename, CIFAR10.base_folder, CIFAR10.tgz_md5, CIFAR10.url)
    assert (NAME, FOLDER, cifar10.MD5, cifar10.SOURCES[-1]) == official
