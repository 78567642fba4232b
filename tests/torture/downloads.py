"""The download against a server that misbehaves, with the good one after it; and two downloads at a time."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from src.data.cifar10 import obtain, read_batches
from src.data.download import DataError, fetch
from tests.data.fake_archive import FILES, FOLDER, PAYLOAD, described, md5
from tests.data.server import QUICK, Host, serving
from tests.torture.damage import told
from tests.torture.fault import Outcome, Run, fault

ROOT = Path(__file__).parents[2]
Ready = Callable[[Host, random.Random, Path], None]


def misbehaving(*ways: str, ready: Ready | None = None) -> Run:
    """A source of each of `ways`, alone: refused by name. Then a good one after it: complete, and nothing beside it.

    ready: what is laid out before each download.
    """

    def run(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
        outcome = Outcome()
        with serving() as host:
            for number in range(rounds):
                way, root = ways[number % len(ways)], tmp / str(number)
                root.mkdir()
                host.cut_at = rng.randrange(len(PAYLOAD))
                with outcome.trial(f"{way}, {host.cut_at} of {len(PAYLOAD)} bytes"):
                    if ready:
                        ready(host, rng, root)
                    try:
                        fetch(root, _unheard, described(PAYLOAD, FILES, host.url(way)), QUICK).unlink()
                    except DataError as error:
                        told(error, root / "fake.tar.gz")
                        told(error, Path(host.url(way)))
                    good = described(PAYLOAD, FILES, host.url(way), host.url("good"))
                    assert obtain(root, _unheard, download=True, archive=good)
                    assert [entry.name for entry in root.iterdir()] == [FOLDER]
                    assert {path.name: path.read_bytes() for path in (root / FOLDER).iterdir()} == FILES
        return outcome

    return run


def _unheard(line: str) -> None:
    pass


def _part_is_there(host: Host, rng: random.Random, root: Path) -> None:
    """What an earlier attempt left: the beginning of the file, or bytes that look like it."""
    data = PAYLOAD[: host.cut_at] if rng.random() < 0.5 else rng.randbytes(host.cut_at)
    (root / "fake.tar.gz.part").write_bytes(data)


RESUMED = "refused by name and address, or received whole; then resumed from another source to the right md5"
fault("download cut", survived=RESUMED, rounds=60, quick=3)(misbehaving("cut-at"))
fault("download stalled", survived=RESUMED, rounds=12, quick=1)(misbehaving("stalled", "silent", "slow"))
fault("download answered by a web page", survived=RESUMED, rounds=20, quick=3)(
    misbehaving("html", "to-html", "disguised", "in-circles", "404")
)
fault("download too long, too short or shifted", survived=RESUMED, rounds=20, quick=3)(
    misbehaving("endless", "other-size", "shifted", "416", ready=_part_is_there)
)
fault("download with a wrong digest", survived=RESUMED, rounds=20, quick=2)(misbehaving("wrong", ready=_part_is_there))

_DOWNLOAD = """
import sys
from pathlib import Path
from src.data.cifar10 import obtain
from tests.data.fake_archive import FILES, PAYLOAD, described
print("ready", flush=True)
sys.stdin.readline()
obtain(Path(sys.argv[1]), print, download=True, archive=described(PAYLOAD, FILES, sys.argv[2]))
"""


@fault(
    "download killed (kill -9), or two at a time in one folder",
    survived="what is there at the end is complete and right, and nothing half done lies beside it",
    rounds=20,
    quick=1,
)
def two_at_a_time(rng: random.Random, tmp: Path, rounds: int) -> Outcome:
    outcome = Outcome()
    with serving() as host:
        for number in range(rounds):
            root = tmp / str(number)
            command = [sys.executable, "-c", _DOWNLOAD, str(root), host.url("steady")]
            with outcome.trial(f"round {number}"):
                pair = [
                    subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                    for _ in range(2)
                ]
                try:
                    for process in pair:
                        assert process.stdout is not None
                        assert process.stdout.readline() == "ready\n"
                    delay = rng.uniform(0.0, 1.2)
                    for process in pair:
                        assert process.stdin is not None
                        process.stdin.write("\n")
                        process.stdin.flush()
                    try:
                        pair[0].wait(delay)
                    except subprocess.TimeoutExpired:
                        pair[0].kill()
                    pair[1].communicate()
                    assert pair[1].returncode == 0
                finally:
                    for process in pair:
                        process.kill()
                        process.communicate()
                archive = described(PAYLOAD, FILES, host.url("steady"))
                assert obtain(root, _unheard, download=False, archive=archive)
                left = {entry.name for entry in root.iterdir()}
                assert FOLDER in left
                assert left <= {FOLDER, "fake.tar.gz"}, left
                assert "fake.tar.gz" not in left or md5((root / "fake.tar.gz").read_bytes()) == archive.md5
                assert set(read_batches(root, list(FILES), archive)) == set(FILES)
    return outcome
