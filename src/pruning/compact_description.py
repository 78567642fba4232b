"""The written description of a compact network: what it may say, and the sizes that follow from it.

A description is plain data (JSON): the image size, the steps in the order they run with their sizes and index lists,
and which step gives the output. Value 0 is the image, value i the result of step i, so that
`{"op": "add", "inputs": [3, 7]}` adds what steps 3 and 7 gave. Every field and every size is checked, because a
description may come out of a file that somebody else wrote; nothing is allocated here.

    op         fields                                          result, from (N, C, H, W) or features (N, C)
    conv       name out kernel stride padding dilation bias    nn.Conv2d
    linear     name out bias                                   nn.Linear
    batchnorm  name eps momentum affine                        nn.BatchNorm2d
    shift      name                                            x + one learnable constant per channel
    relu, add, flatten                                         as named
    pool       average kernel stride                           average or maximum; kernel null: over all pixels
    stride     step                                            every step-th row and column
    select     channels                                        channel j is input channel channels[j], zeros for -1
    fill       value size                                      (N, *size) of one number, 0 or 1
    join                                                       the channels of its two inputs, one after the other

Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

FORMAT = 1
MAX_STEPS = 10_000
MAX_CHANNELS = 2**16
MAX_SIDE = 2**12  # pixels along one side of an image or kernel
MAX_VALUES = 2**28  # numbers in one step's result, for one image
MAX_PARAMETERS = 2**28
LAYERS = ("conv", "linear", "batchnorm", "shift")  # the steps with parameters, and with a name
NAME = re.compile(r"[A-Za-z0-9_]{1,100}(\.[A-Za-z0-9_]{1,100}){0,9}")

Operation = dict[str, Any]
Shape = tuple[int, ...]  # of one image's value: (C, H, W), or (C,) for features


class CompactionError(ValueError):
    """A network that cannot be made smaller exactly, or a description that cannot be built."""


def value_shapes(description: Mapping[str, Any]) -> list[Shape]:
    """Shape of every value for one image, the input first. Allocates nothing; raises CompactionError (all checks)."""
    if not isinstance(description, Mapping) or set(description) != {"format", "input_size", "steps", "output"}:
        raise _damaged("the description", "needs exactly format, input_size, steps and output")
    if description["format"] != FORMAT:
        raise CompactionError(
            f"the description has format {description['format']!r:.50}: this version reads format {FORMAT}; compact "
            "the original network again"
        )
    size, steps = description["input_size"], description["steps"]
    if not (_is_list(size) and len(size) == 3 and all(_whole(n, 1, MAX_SIDE) for n in size)):
        raise _damaged("input_size", f"got {size!r:.80}, need three numbers from 1 to {MAX_SIDE}")
    if not isinstance(steps, list) or not 1 <= len(steps) <= MAX_STEPS:
        raise _damaged("steps", f"need a list of 1 to {MAX_STEPS} steps")
    shapes: list[Shape] = [tuple(size)]
    layers: set[str] = set()
    above: set[str] = set()  # paths that hold layers
    for number, step in enumerate(steps, start=1):
        where = f"step {number}"
        _check_fields(where, step, number)
        shapes.append(_result(where, step, [shapes[value] for value in step["inputs"]]))
        if math.prod(shapes[-1]) > MAX_VALUES or shapes[-1][0] > MAX_CHANNELS or min(shapes[-1]) < 1:
            limits = f"1 to {MAX_CHANNELS} channels and at most {MAX_VALUES} numbers"
            raise _damaged(where, f"gives a value of shape {shapes[-1]}, need {limits}")
        if "name" in step:
            _check_name(where, step["name"], layers, above)
    if not _whole(description["output"], 1, len(steps)):
        raise _damaged("output", f"got {description['output']!r:.50}, need the number of a step, 1 to {len(steps)}")
    sizes = _state_shapes(steps, shapes).values()
    if sum(math.prod(shape) for shape in sizes) > MAX_PARAMETERS:
        raise _damaged("steps", f"hold more than {MAX_PARAMETERS} parameters")
    return shapes


def state_shapes(description: Mapping[str, Any]) -> dict[str, Shape]:
    """Name and shape of every entry of the state dictionary, without building the network. Raises CompactionError.

    With it a reader can hold a file against its description before anything is allocated.
    """
    shapes = value_shapes(description)  # before anything in the description is used
    return _state_shapes(description["steps"], shapes)


def _state_shapes(steps: Sequence[Operation], shapes: Sequence[Shape]) -> dict[str, Shape]:
    found: dict[str, Shape] = {}
    for step in steps:
        if step["op"] not in LAYERS:
            continue
        name, channels = step["name"], shapes[step["inputs"][0]][0]
        if step["op"] == "shift":
            found[f"{name}.value"] = (channels,)
        elif step["op"] == "batchnorm":
            learned = ("weight", "bias") if step["affine"] else ()
            found |= {f"{name}.{entry}": (channels,) for entry in (*learned, "running_mean", "running_var")}
            found[f"{name}.num_batches_tracked"] = ()
        else:
            found[f"{name}.weight"] = (step["out"], channels, *step.get("kernel", ()))
            if step["bias"]:
                found[f"{name}.bias"] = (step["out"],)
    return found


# What each field may hold. A test and the words for the error message.
_Check = tuple[Callable[[Any], bool], str]


def _whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: object, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_whole(least: int, most: int) -> _Check:
    return lambda value: _whole(value, least, most), f"a whole number from {least} to {most}"


def _pair(least: int) -> _Check:
    words = f"two whole numbers from {least} to {MAX_SIDE}"
    return lambda v: _is_list(v) and len(v) == 2 and all(_whole(n, least, MAX_SIDE) for n in v), words


def _either(value: object, check: _Check) -> _Check:
    return lambda v: v is value or (isinstance(value, str) and v == value) or check[0](v), f"{value!r} or {check[1]}"


def _list_of(least: int, most: int, longest: int) -> _Check:
    words = f"a list of up to {longest} whole numbers from {least} to {most}"
    return lambda v: _is_list(v) and 0 < len(v) <= longest and all(_whole(n, least, most) for n in v), words


_BOOL: _Check = (lambda value: isinstance(value, bool), "true or false")
_SIDE = _is_whole(1, MAX_SIDE)
_COUNT = _is_whole(1, MAX_CHANNELS)
_NAMED: _Check = (
    lambda value: isinstance(value, str) and NAME.fullmatch(value) is not None,
    "a module path such as 'layer1.0.conv1'",
)
_FIELDS: dict[str, dict[str, _Check]] = {
    "conv": {
        "name": _NAMED,
        "out": _COUNT,
        "kernel": _pair(1),
        "stride": _pair(1),
        "padding": _either("same", _pair(0)),
        "dilation": _pair(1),
        "bias": _BOOL,
    },
    "linear": {"name": _NAMED, "out": _COUNT, "bias": _BOOL},
    "batchnorm": {
        "name": _NAMED,
        "eps": (lambda value: _number(value, 0, 1e6), "a number from 0 to 1e6"),
        "momentum": _either(None, (lambda value: _number(value, 0, 1), "a number from 0 to 1")),
        "affine": _BOOL,
    },
    "shift": {"name": _NAMED},
    "relu": {},
    "flatten": {},
    "add": {},
    "join": {},
    "pool": {"average": _BOOL, "kernel": _either(None, _SIDE), "stride": _either(None, _SIDE)},
    "stride": {"step": _SIDE},
    "select": {"channels": _list_of(-1, MAX_CHANNELS, MAX_CHANNELS)},
    "fill": {"value": _is_whole(0, 1), "size": _list_of(1, MAX_CHANNELS, 3)},
}
_INPUTS = {"fill": (0, 0), "add": (2, 2), "join": (2, 2)}  # all others read one value


def _check_fields(where: str, step: object, number: int) -> None:
    if not isinstance(step, dict) or not isinstance(step.get("op"), str) or step["op"] not in _FIELDS:
        got = step.get("op") if isinstance(step, dict) else step
        raise _damaged(where, f"operation {got!r:.50} is unknown; need one of {', '.join(_FIELDS)}")
    fields = _FIELDS[step["op"]]
    if set(step) != {"op", "inputs", *fields}:
        raise _damaged(f"{where} ({step['op']})", f"needs exactly the fields {', '.join(('op', 'inputs', *fields))}")
    least, most = _INPUTS.get(step["op"], (1, 1))
    inputs = step["inputs"]
    if not _is_list(inputs) or not least <= len(inputs) <= most:
        raise _damaged(f"{where} ({step['op']})", f"inputs={inputs!r:.50}: need a list of {least}")
    if not all(_whole(value, 0, number - 1) for value in inputs):
        raise _damaged(f"{where} ({step['op']})", f"inputs={inputs!r:.50}: need values from 0 to {number - 1}")
    for field, (allowed, words) in fields.items():
        if not allowed(step[field]):
            raise _damaged(f"{where} ({step['op']})", f"{field}={step[field]!r:.50}: need {words}")


def _check_name(where: str, name: str, layers: set[str], above: set[str]) -> None:
    parts = name.split(".")
    paths = {".".join(parts[:end]) for end in range(1, len(parts))}
    if name in layers or name in above or paths & layers:
        raise _damaged(where, f"the layer name {name!r} is used twice, or lies inside another layer")
    layers.add(name)
    above |= paths


def _result(where: str, step: Operation, sources: list[Shape]) -> Shape:
    """Shape that a step gives. Raises CompactionError where its inputs do not fit."""
    kind = step["op"]
    if kind == "fill":
        if len(step["size"]) not in (1, 3):
            raise _damaged(where, f"size={step['size']}: need one or three numbers")
        return tuple(step["size"])
    shape = sources[0]
    dimensions = {"conv": 3, "batchnorm": 3, "pool": 3, "stride": 3, "linear": 1}.get(kind, len(shape))
    if len(shape) != dimensions:
        raise _damaged(where, f"{kind} cannot read a value of shape {shape}")
    if (kind == "add" and sources[0] != sources[1]) or (kind == "join" and sources[0][1:] != sources[1][1:]):
        raise _damaged(where, f"{kind} cannot read values of shapes {sources[0]} and {sources[1]}")
    if kind == "join":
        return (sources[0][0] + sources[1][0], *shape[1:])
    if kind == "linear":
        return (step["out"],)
    if kind == "conv":
        return (step["out"], *_window(where, shape, step))
    if kind == "pool":
        if (step["kernel"] is None) != (step["stride"] is None):
            raise _damaged(where, "kernel and stride are both numbers or both null")
        if step["kernel"] is None:
            return (shape[0], 1, 1)
        square = {field: (step[field],) * 2 for field in ("kernel", "stride")}
        return (shape[0], *_window(where, shape, {**square, "padding": (0, 0), "dilation": (1, 1)}))
    if kind == "stride":
        return (shape[0], *(-(-side // step["step"]) for side in shape[1:]))
    if kind == "flatten":
        return (math.prod(shape),)
    if kind == "select":
        if max(step["channels"]) >= shape[0]:
            raise _damaged(where, f"channel {max(step['channels'])} of a value with {shape[0]} channels")
        return (len(step["channels"]), *shape[1:])
    return shape


def _window(where: str, shape: Shape, step: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) after a window of `kernel` moved over `shape`."""
    if step["padding"] == "same":
        if tuple(step["stride"]) != (1, 1):
            raise _damaged(where, f"padding 'same' with stride {tuple(step['stride'])}, need stride 1")
        return shape[1], shape[2]
    sides = []
    for axis in (0, 1):
        reach = step["dilation"][axis] * (step["kernel"][axis] - 1) + 1
        sides.append((shape[1 + axis] + 2 * step["padding"][axis] - reach) // step["stride"][axis] + 1)
    return sides[0], sides[1]


def _damaged(where: str, what: str) -> CompactionError:
    return CompactionError(f"{where}: {what}; the description is damaged: compact the original network again")
