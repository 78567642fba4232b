"""A process that has everything imported and forks a run of the script whenever it is asked: `python -m ...run_server`.

Importing takes seconds, and a trial of a fault less than one. Nothing is computed before the fork, so no thread is
lost in it. A line on stdin is a request, a line on stdout the answer, both JSON; see runner.py for the other side.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
import traceback
from dataclasses import replace
from typing import Any

import numpy as np
import sklearn.datasets  # noqa: F401  (this and the next are imported before the fork, so that no run waits for them)
import torch
import torch._dynamo

from experiments import debug_run
from experiments.notebook import progress
from experiments.pipeline import config
from resnet import NETWORKS, BasicBlock, ResNet
from src.quantizer import DeadZoneLDZCompander
from tests.torture import sabotage
from utils_quantization import attach_weight_quantizers

WAIT_STEP = 0.005
_ended: dict[int, int] = {}  # exit statuses by process


def tiny(num_classes: int = 10, option: str = "A") -> ResNet:
    """Three blocks of 4, 8 and 16 channels: a step takes milliseconds."""
    return ResNet(BasicBlock, [1, 1, 1], num_classes, option=option, widths=(4, 8, 16))


def tiny_quantized() -> ResNet:
    """As the script trains it: quantizers on all convolutions but the stem."""
    network = tiny()
    attach_weight_quantizers(network, config.SMOKE.exclude_layers, DeadZoneLDZCompander)
    return network


def serve() -> None:
    torch.set_num_threads(1)
    NETWORKS["tiny"] = tiny
    config.PRESETS["tiny"] = replace(config.SMOKE, preset="tiny", model="tiny", precision="fp32")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _start(request) if request["do"] == "start" else _wait(request["pid"], request["seconds"])
        print(json.dumps(answer), flush=True)


def _start(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which nohup may have switched off
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for source, target in ((null, 0), (out, 1), (out, 2)):
            os.dup2(source, target)
        # Known states of the generators that nothing seeds; in a resumed run other ones: it has to bring them back.
        random.seed(os.getpid() if "--resume" in request["arguments"] else 0)
        np.random.seed(os.getpid() if "--resume" in request["arguments"] else 0)  # noqa: NPY002
        _count_steps(request["steps"])
        if request["sabotage"]:
            getattr(sabotage, request["sabotage"])(**request["settings"])
        status = debug_run.main(request["arguments"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _count_steps(path: str) -> None:
    """Write the number of steps done into a file after each, for who looks at it when this process was killed."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    real = progress.Reporter.step

    def step(self: progress.Reporter, epoch: int, number: int, *rest: Any) -> None:
        os.pwrite(file, struct.pack("<q", (epoch - 1) * self.steps_per_epoch + number), 0)
        real(self, epoch, number, *rest)

    progress.Reporter.step = step  # type: ignore[method-assign]


def _wait(pid: int, seconds: float) -> int | None:
    """The exit status, as `subprocess` counts it, or None where the process is still running after that time."""
    end = time.monotonic() + seconds
    while pid not in _ended:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _ended[pid] = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() > end:
            return None
        time.sleep(WAIT_STEP)
    return _ended[pid]


if __name__ == "__main__":
    serve()
