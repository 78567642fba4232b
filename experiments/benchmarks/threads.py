"""What OpenMP's idle threads cost: training steps of resnet20 on the digits, alone and beside busy processes.

    python -m experiments.benchmarks.threads [--rounds 3] [--busy N] [SETTING ...]

A SETTING is NAME=VALUE[,NAME=VALUE ...] for the environment, or "default" for none. Every measurement is a process of
its own, since OpenMP reads its environment once; the settings take turns, quiet and busy in each round. A busy process
is a loop in Python that does nothing. All settings with the same number of threads must give the same losses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from experiments.pipeline import build_run, configure, prepare_data

SETTINGS = ["default", "OMP_WAIT_POLICY=passive", "GOMP_SPINCOUNT=0", "GOMP_SPINCOUNT=10000", "OMP_NUM_THREADS=1"]
WARM_UP = 5  # of the 29 steps of an epoch
# torch is imported before the package, so that nothing but the setting decides how the threads wait
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
CHILD = "import torch; from experiments.benchmarks.threads import measure; measure()"


def measure() -> None:
    """Print the seconds per step and the sum of the losses of an epoch without its first steps, as JSON."""
    run = build_run(*prepare_data(configure("smoke", data="digits", device="cpu", delay=0)))
    steps = run.steps()
    for _ in range(WARM_UP):
        next(steps)
    start = time.perf_counter()
    losses = [step.loss() for step in steps]
    print(json.dumps({"seconds": (time.perf_counter() - start) / len(losses), "loss": sum(losses)}))


def measured(setting: str, busy: int) -> dict[str, float]:
    """What `measure` prints in a new process with this setting alone, beside `busy` processes that want a core each."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}
    }
    if setting != "default":
        environment |= dict(pair.split("=", 1) for pair in setting.split(","))
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        done = subprocess.run([sys.executable, "-c", CHILD], env=environment, stdout=subprocess.PIPE, check=True)
    finally:
        for other in others:
            other.kill()
            other.wait()
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure every setting in turns and print a line of medians for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=SETTINGS, metavar="SETTING")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", type=int, default=2 * (os.cpu_count() or 1), help="default: twice the cores")
    options = parser.parse_args()
    loads = (0, options.busy)
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for case in ((setting, busy) for busy in loads for setting in options.settings):
            found.setdefault(case, []).append(measured(*case))
    print(f"{'milliseconds a step (median)':40} {'quiet':>8} {f'{options.busy} busy':>8}   sum of the losses")
    for setting in options.settings:
        medians = [1000 * statistics.median(one["seconds"] for one in found[setting, busy]) for busy in loads]
        losses = sorted({one["loss"] for busy in loads for one in found[setting, busy]})
        print(f"{setting:40} {medians[0]:8.1f} {medians[1]:8.1f}   {', '.join(map(str, losses))}")


if __name__ == "__main__":
    main()
