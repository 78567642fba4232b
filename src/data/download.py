"""Downloading one archive: from the first source that serves it, resumed where another stopped, checked at the end.

Rule: what is returned has the archive's size and md5. The one thing that may stay behind otherwise is `NAME.part`,
which the next attempt resumes. Every problem is a DataError that names the source, what was expected, and what to do.

Sizes are bytes, speeds bytes a second, times seconds.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from src.data.http_answer import open_answer

Report = Callable[[str], None]


class DataError(ValueError):
    """Data that is missing, damaged or not usable. The message says what was found, what is needed, what to do."""


@dataclass(frozen=True)
class Archive:
    """A tar.gz and the files wanted from it. `files` maps file name to md5; all lie in `folder` inside the archive."""

    name: str
    md5: str
    size_bytes: int
    folder: str
    files: Mapping[str, str]
    sources: tuple[str, ...]

    def describe(self) -> str:
        return f"{self.name} ({self.size_bytes} bytes, md5 {self.md5})"


@dataclass(frozen=True)
class Patience:
    """How long to bear with a source. In the first round one slower than `slow` over `window` is left for the next."""

    timeout: float = 30.0
    rounds: int = 3
    pause: float = 2.0
    window: float = 15.0
    slow: float = 200e3
    stalled: float = 2e3


def fetch(root: Path, report: Report, archive: Archive, patience: Patience | None = None) -> Path:
    """Download the archive to root/name and return that path; its md5 is right. Raises DataError with all failures.

    Sources: the environment's CIFAR10_URL alone where it is set, else those of the archive in their order, several
    rounds. All serve the same bytes, so each resumes (HTTP Range) where the one before it stopped.
    """
    patience = patience or Patience()
    sources = _sources(archive)
    part, final = _prepare(root, archive), root / archive.name
    failures: dict[str, str] = {}
    try:
        for round_number in range(patience.rounds):
            time.sleep(patience.pause * round_number)
            for url in sources:
                floor = patience.slow if round_number == 0 and len(sources) > 1 else patience.stalled
                try:
                    _receive_all(url, part, archive, floor, patience, report)
                    _check_part(part, archive)
                except _SourceFailure as failure:
                    failures[url] = str(failure)
                    report(f"{url}: {failure}")
                    continue
                os.replace(part, final)
                return final
    finally:
        if not file_size(part):
            part.unlink(missing_ok=True)
    kept = f" The {file_size(part)} bytes received so far stay in {part} and are resumed." if file_size(part) else ""
    raise DataError(
        "CIFAR-10 could not be downloaded; every source failed:\n"
        + "".join(f"  {url}: {reason}\n" for url, reason in failures.items())
        + f"Place {archive.describe()} by hand as {final}, or unpack it so that its files lie in "
        f"{root / archive.folder}; "
        f"or set CIFAR10_URL to another address of the same file; or use --data digits, which needs no download.{kept}"
    )


def file_md5(path: Path) -> str:
    """md5 (hex) of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def file_size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


class _SourceFailure(Exception):
    """One source did not deliver; the next may."""


class _Cut(_SourceFailure):
    """The connection ended early; the same source can be resumed at once."""


def _sources(archive: Archive) -> tuple[str, ...]:
    override = os.environ.get("CIFAR10_URL", "").strip()
    if not override:
        return archive.sources
    try:
        address = urllib.parse.urlsplit(override)
        usable = address.scheme in ("http", "https") and address.hostname
    except ValueError:  # half of an IPv6 address
        usable = False
    if not usable:
        raise DataError(f"CIFAR10_URL={override!r}: need an http:// or https:// address of {archive.describe()}")
    return (override,)


def _prepare(root: Path, archive: Archive) -> Path:
    """Make the root, check the disk, and drop a .part that cannot be resumed."""
    part = root / (archive.name + ".part")
    try:
        root.mkdir(parents=True, exist_ok=True)
        if (root / archive.name).is_dir():
            raise DataError(f"{root / archive.name} is a folder: need the archive itself there, or nothing; remove it")
        free = shutil.disk_usage(root).free
        needed = 3 * archive.size_bytes - file_size(part)  # the archive, its content and some room
        if free < needed:
            raise DataError(f"{root} has {free} bytes free: need {needed}; free some or give another --data-root")
        have = file_size(part)
        if have > archive.size_bytes or (have == archive.size_bytes and file_md5(part) != archive.md5):
            part.unlink()
        with open(part, "ab"):
            pass
    except OSError as error:
        raise DataError(f"cannot write to data root {root}: {error.strerror}; give another with --data-root") from error
    return part


def _receive_all(url: str, part: Path, archive: Archive, floor: float, patience: Patience, report: Report) -> None:
    """Receive from one source, resuming at once as long as every attempt brings at least a hundredth of the file."""
    while True:
        before = file_size(part)
        try:
            return _receive(url, part, archive, floor, patience, report)
        except _Cut:
            if file_size(part) - before < max(1, archive.size_bytes // 100):
                raise


def _receive(url: str, part: Path, archive: Archive, floor: float, patience: Patience, report: Report) -> None:
    have = file_size(part)
    if have == archive.size_bytes:
        return
    headers = {"User-Agent": "codeq-walkthrough", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = open_answer(urllib.request.Request(url, headers=headers), patience.timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            _truncate(part, 0)
        raise _SourceFailure(f"HTTP {error.code} {_brief(error.reason)}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _SourceFailure(f"no connection: {_brief(getattr(error, 'reason', None) or error)}") from error
    with response:
        start = _check_answer(response, have, archive)
        _copy(response, url, part, start, archive, floor, patience, report)


def _brief(reason: object) -> str:
    """What a server or library says, on one line that can be read."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(reason))
    text = " ".join(text.split())
    return f"{text[:200]} ..." if len(text) > 200 else text


def _check_answer(response: http.client.HTTPResponse, have: int, archive: Archive) -> int:
    """The offset at which the body starts. Raises _SourceFailure for a web page or a file of another size."""
    kind = response.headers.get("Content-Type", "")
    if "html" in kind.lower():
        raise _SourceFailure(f"answers with a web page ({_brief(kind)}), not with the archive")
    if response.status == 206:
        span = re.fullmatch(r"bytes (\d{1,15})-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if span is None or int(span[1]) != have or span[2] not in ("*", str(archive.size_bytes)):
            answer = _brief(response.headers.get("Content-Range"))
            raise _SourceFailure(f"answers with the range {answer!r}, need bytes {have}- of {archive.size_bytes}")
        return have
    length = response.headers.get("Content-Length")
    if response.status != 200 or (length is not None and length.strip() != str(archive.size_bytes)):
        raise _SourceFailure(f"HTTP {response.status}, offers {length} bytes, need {archive.size_bytes}")
    return 0


def _copy(
    response: http.client.HTTPResponse,
    url: str,
    part: Path,
    start: int,
    archive: Archive,
    floor: float,
    patience: Patience,
    report: Report,
) -> None:
    """Append the body to the part file, never more than the archive's size."""
    done, mark, mark_time, shown = start, start, time.monotonic(), 0.0
    host = urllib.parse.urlsplit(url).hostname
    began = mark_time
    while done < archive.size_bytes:
        try:
            chunk = response.read1(1 << 18)
        except TimeoutError as error:
            raise _Cut(f"silent for {patience.timeout:g} s after {done} of {archive.size_bytes} bytes") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Cut(f"broke off after {done} of {archive.size_bytes} bytes: {error}") from error
        if not chunk:
            raise _Cut(f"ended after {done} of {archive.size_bytes} bytes")
        if done == 0 and not chunk.startswith(b"\x1f\x8b"[: len(chunk)]):
            raise _SourceFailure(f"sends something else than a gzip file (it begins with {chunk[:12]!r})")
        if done + len(chunk) > archive.size_bytes:
            raise _SourceFailure(f"sends more than the {archive.size_bytes} bytes of the archive")
        try:
            if done == start:
                _truncate(part, start)  # only now: an answer that is refused costs nothing of what is there
            with open(part, "ab") as out:
                out.write(chunk)
        except OSError as error:
            raise DataError(f"cannot write {part}: {error.strerror}; free disk space, then run again") from error
        done += len(chunk)
        now = time.monotonic()
        if now - shown >= 2.0 or done == archive.size_bytes:
            speed = (done - start) / max(now - began, 1e-9)
            left = (archive.size_bytes - done) / max(speed, 1.0)
            megabytes = f"{done / 1e6:.1f} of {archive.size_bytes / 1e6:.1f} MB"
            report(f"{host}: {megabytes}, {speed / 1e6:.2f} MB/s, {left:.0f} s left")
            shown = now
        if now - mark_time >= patience.window:
            speed = (done - mark) / (now - mark_time)
            if speed < floor and done < archive.size_bytes:
                raise _SourceFailure(f"too slow: {speed / 1e3:.0f} kB/s, need {floor / 1e3:.0f}")
            mark, mark_time = done, now


def _check_part(part: Path, archive: Archive) -> None:
    found = file_md5(part)
    if found != archive.md5:
        part.unlink()
        raise _SourceFailure(f"delivered a file with md5 {found}, need {archive.md5}; it was thrown away")


def _truncate(path: Path, size: int) -> None:
    with open(path, "ab") as stream:
        stream.truncate(size)
