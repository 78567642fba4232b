"""Which operation of the table a node of the traced graph is, and what its fields are.

Modules of torch.nn count by their exact class, functions and methods by the names of torch. What is asked of the
image's size (`x.size(3)`) has its recorded value. Whether a reshape keeps channels is read off the shapes before and
after it.
Axis letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from src.pruning.operations import (
    ACTIVATIONS,
    BINARY,
    CONVOLUTIONS,
    FUNCTIONS,
    INSTANCE_NORMS,
    MODULES,
    NORMS,
    OPERATIONS,
    PADDING_MODES,
    POOL_DEFAULTS,
    READERS,
    TRANSPOSED,
    WRITTEN_ANEW,
)
from utils_quantization import eval_mode

Node = Any  # fx.Node, whose arguments have a type that is no help
Settings = dict[str, Any]


class Reading(NamedTuple):
    """What a node is: a row of the table and its fields, the nodes it reads, the dimension its channels lie along.

    module: path of the module that holds its parameters, "" for none. values: the numbers of a scale or shift, (C,).
    """

    kind: str
    inputs: tuple[Node, ...]
    axis: int
    settings: Mapping[str, Any] = MappingProxyType({})
    module: str = ""
    values: Tensor | None = None


LAYER_CLASSES = (nn.Linear, *CONVOLUTIONS.values(), *TRANSPOSED.values())


class Recognizer:
    """Reads one node after the other. axis: of each node read so far, the dimension along which its channels lie.

    What an unknown operation gave has no entry: all of its channels stay, so that a layer may read it along any
    dimension, and an operation that does not say which one is not followed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.axis: dict[Node, int] = {}

    def read(self, node: Node) -> Reading | None:
        """What `node` is, or None where it is no operation of the table, or its channels cannot be followed."""
        reading = self._read(node) or self._unchanged(node)
        return reading if reading and reading.axis else None

    def _unchanged(self, node: Node) -> Reading | None:
        """A function that gave back the very tensor it was given, as stochastic depth does in eval mode."""
        sources = [each for each in node.all_input_nodes if is_image(each)]
        same = len(sources) == 1 and node.meta["value"] is sources[0].meta["value"] and not node.meta["written"]
        if not same or node.op != "call_function":
            return None
        return Reading("pass", (sources[0],), self.axis.get(sources[0], 0))

    def _read(self, node: Node) -> Reading | None:
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            plain = len(node.args) == 1 and not node.kwargs and is_image(node.args[0])
            return self._module(module, node) if plain and not is_changed(module, node) else None
        if node.op not in ("call_function", "call_method") or not is_image(node):
            return None
        if node.target in BINARY:
            return self._binary(node, BINARY[node.target])
        if node.target in (torch.cat, torch.concat):
            return self._join(node)
        if node.target is operator.getitem:
            return self._item(node)
        row, names = FUNCTIONS.get(node.target, ("", ()))
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        if not row or len(given) < len(node.args) or not is_image(given.get("input")):
            return None
        source = given.pop("input")
        others = [each for each in node.all_input_nodes if each is not source]
        if any(is_image(each) for each in others) and node.target != "expand_as":
            return None
        given = {name: known(value) for name, value in given.items()}
        return self._reader(row)(row, node, source, given)

    def _reader(self, row: str) -> Callable[..., Reading | None]:
        """Who reads the functions and modules of a row."""
        return self._alike if row in ACTIVATIONS else getattr(self, f"_{READERS.get(row, row)}")

    def along(self, source: Node, axis: int) -> bool:
        """Whether the channels of `source` lie along `axis`, or can be taken to."""
        return self.axis.get(source, axis) == axis

    def _module(self, module: Any, node: Node) -> Reading | None:
        source, name, kind = node.args[0], str(node.target), _class_of(module, shape_of(node.args[0]))
        dims = len(shape_of(source)) - 2
        if kind is nn.Linear:
            last = len(shape_of(source)) - 1
            return Reading("linear", (source,), last, {}, name) if self.along(source, last) else None
        if kind in MODULES:
            row = MODULES[kind]
            fields = OPERATIONS[row].fields if row in OPERATIONS else ()
            given = {field: getattr(module, field) for field in fields if hasattr(module, field)}
            if getattr(module, "return_indices", False) or getattr(module, "recompute_scale_factor", None):
                return None
            return self._reader(row)(row, node, source, given)
        affine = getattr(module, "weight", None) is not None
        if kind is nn.LayerNorm and len(module.normalized_shape) == 1 and self.along(source, dims + 1):
            both = affine == (module.bias is not None)
            settings = {"eps": module.eps, "affine": affine, "dim": dims + 1}
            return Reading("layernorm", (source,), dims + 1, settings, name) if both else None
        if not self.along(source, 1):
            return None
        if kind is nn.GroupNorm and affine == (module.bias is not None):
            settings = {"num_groups": module.num_groups, "eps": module.eps, "affine": affine}
            return Reading("groupnorm", (source,), 1, settings, name)
        if kind is INSTANCE_NORMS.get(dims) and module.running_mean is None:
            return Reading("instancenorm", (source,), 1, {"dims": dims, "eps": module.eps, "affine": affine}, name)
        if kind is CONVOLUTIONS.get(dims):
            return Reading("conv", (source,), 1, fields_of_module("conv", module), name)
        if kind is TRANSPOSED.get(dims) and module.groups == 1:
            return Reading("conv_transpose", (source,), 1, fields_of_module("conv_transpose", module), name)
        if kind in NORMS.values() and module.running_mean is not None:
            settings = {"eps": module.eps, "momentum": module.momentum, "affine": module.affine}
            bias = getattr(module, "bias", None) is not None
            dims = next(number for number, norm in NORMS.items() if norm is kind)
            return Reading("batchnorm", (source,), 1, {"dims": dims, "bias": bias, **settings}, name)
        if kind is nn.PReLU:
            return Reading("prelu", (source,), 1, {"shared": module.num_parameters == 1}, name)
        return None

    def _binary(self, node: Node, kind: str) -> Reading | None:
        if len(node.args) != 2 or node.kwargs:
            return None
        left, right = node.args
        if is_image(left) and is_image(right):
            axis = self.axis.get(left, self.axis.get(right, 0))
            a, b = shape_of(left), shape_of(right)
            fits = axis and len(a) == len(b) and axis < len(a) and a[axis] == b[axis] and kind in OPERATIONS
            if fits and self.along(left, axis) and self.along(right, axis):
                return Reading(kind, (left, right), axis)
            return None
        source, other = (left, known(right)) if is_image(left) else (right, known(left))
        first = source is left
        if isinstance(other, (int, float)) and not isinstance(other, bool):
            if (numbers := _affine(kind, float(other), first)) is None:
                return None
            return Reading(
                "affine", (source,), self.axis.get(source, 0), dict(zip(("scale", "shift"), numbers, strict=True))
            )
        if not isinstance(other, Tensor) or shape_of(node) != shape_of(source) or not (first or kind in ("add", "mul")):
            return None
        axis = self.axis.get(source, 0)
        aligned = other.reshape(*[1] * (len(shape_of(source)) - other.dim()), *other.shape)
        if any(size > 1 for dim, size in enumerate(aligned.shape) if dim != axis):
            return None
        values = aligned.flatten().expand(shape_of(source)[axis])
        values = {"sub": -values, "div": 1 / values}.get(kind, values)
        row = "shift" if kind in ("add", "sub") else "scale"
        return Reading(row, (source,), axis, {"dim": axis}, values=values.clone())

    def _join(self, node: Node) -> Reading | None:
        given = dict(zip(("tensors", "dim"), node.args, strict=False)) | node.kwargs
        inputs = given.get("tensors", ())
        dim = given.get("dim", 0)
        if not (isinstance(inputs, (list, tuple)) and all(map(is_image, inputs)) and isinstance(dim, int)):
            return None
        axis = dim % len(shape_of(node))
        if axis == 0 or not all(self.along(each, axis) for each in inputs):
            return None
        return Reading("join", tuple(inputs), axis, {"dim": axis})

    def _item(self, node: Node) -> Reading | None:
        source, index = node.args[0], known(node.args[1])
        assert isinstance(source, fx.Node)
        if isinstance(source.meta["value"], (tuple, list)):  # one of the parts of chunk or split
            return self._part(source, index)
        if not is_image(source) or not is_image(node):
            return None
        index = index if isinstance(index, tuple) else (index,)
        shape, axis = shape_of(source), self.axis.get(source, 0)
        if Ellipsis in index:
            place = index.index(Ellipsis)
            index = (*index[:place], *[slice(None)] * (len(shape) - len(index) + 1), *index[place + 1 :])
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        if len(index) != len(shape) or not all(isinstance(each, slice) for each in index):
            return None
        ranges = [range(*each.indices(size)) for each, size in zip(index, shape, strict=True)]
        cut = [dim for dim, each in enumerate(ranges) if each != range(shape[dim])]
        if cut == [axis]:
            return Reading("select", (source,), axis, {"channels": list(ranges[axis]), "dim": axis})
        if axis == 1 and not {0, 1}.intersection(cut):
            slices = [[each.start, each.stop, each.step] for each in index[2:]]
            return Reading("slice", (source,), 1, {"slices": slices})
        return None

    def _part(self, source: Node, number: Any) -> Reading | None:
        if source.target not in (torch.chunk, torch.split, "chunk", "split", torch.tensor_split, "tensor_split"):
            return None
        given = dict(zip(("input", "sizes", "dim"), source.args, strict=False)) | source.kwargs
        whole, dim = given.get("input"), given.get("dim", 0)
        if not is_image(whole) or not isinstance(dim, int) or not isinstance(number, int):
            return None
        axis = dim % len(shape_of(whole))
        if axis == 0 or not self.along(whole, axis):
            return None
        sizes = [part.shape[axis] for part in source.meta["value"]]
        start = sum(sizes[: number % len(sizes)])
        channels = list(range(start, start + sizes[number]))
        return Reading("select", (whole,), axis, {"channels": channels, "dim": axis})

    # What follows reads functions of one value: the row of src/pruning/operations.py, node, source, arguments by name.

    def _alike(self, row: str, node: Node, source: Node, given: Settings) -> Reading:
        defaults = ACTIVATIONS[row][1]
        return Reading(
            row, (source,), self.axis.get(source, 0), {name: given.get(name, defaults[name]) for name in defaults}
        )

    def _softmax(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        known_dim = isinstance(given.get("dim"), int) and given.get("dtype") is None
        dim = given["dim"] % len(shape_of(source)) if known_dim else 0
        return Reading(row, (source,), self.axis.get(source, 0), {"dim": dim}) if dim else None

    def _pixel_shuffle(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        settings = {"upscale_factor": given.get("upscale_factor")}
        return Reading(row, (source,), 1, settings) if self.along(source, 1) else None

    def _dropout(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        return None if given.get("training", True) and "p" in given else self._pass(row, node, source, given)

    def _pass(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        same = node.meta["value"].dtype == source.meta["value"].dtype and shape_of(node) == shape_of(source)
        return Reading("pass", (source,), self.axis.get(source, 0)) if same else None

    def _reshape(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        before, after = shape_of(source), shape_of(node)
        if before == after:
            return self._pass(row, node, source, given)
        # with one image in the batch, two dimensions and as many numbers can only be (N, C H W)
        if not self.along(source, 1) or len(before) < 2 or after[:1] != (1,) or math.prod(before) != math.prod(after):
            return None
        if len(after) == 2:
            return Reading("flatten", (source,), 1)
        return Reading("reshape", (source,), 1, {"space": list(after[2:])}) if after[1:2] == before[1:2] else None

    def _expand(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        before, after = shape_of(source), shape_of(node)
        fits = self.along(source, 1) and len(before) == len(after) and before[:2] == after[:2]
        return Reading("expand", (source,), 1, {"space": list(after[2:])}) if fits else None

    def _permute(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        dims = list(range(len(shape_of(source))))
        wanted = known(node.args[1:]) if node.args[1:] else tuple(given.values())
        if node.target in (torch.transpose, "transpose", torch.swapaxes, "swapaxes"):
            first, second = (dims[each] for each in wanted)
            dims[first], dims[second] = dims[second], dims[first]
        else:
            dims = [dims[each] for each in (wanted[0] if isinstance(wanted[0], (list, tuple)) else wanted)]
        axis = self.axis.get(source, 0)
        return Reading("permute", (source,), dims.index(axis), {"dims": dims}) if dims[0] == 0 else None

    def _pool(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        dims = len(shape_of(source)) - 2
        if not self.along(source, 1) or dims < 1 or given.pop("return_indices", False):
            return None
        settings = {**POOL_DEFAULTS[row], **plain(given)}
        for name in ("kernel_size", "stride", "padding", "dilation", "output_size"):
            if isinstance(settings.get(name), int):
                settings[name] = [settings[name]] * dims
        if "stride" in settings and not settings["stride"]:
            settings["stride"] = settings["kernel_size"]
        return Reading(row, (source,), 1, settings)

    def _mean(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        before, dim, keepdim = shape_of(source), given.get("dim"), bool(given.get("keepdim", False))
        if dim is None or given.keys() - {"dim", "keepdim"}:
            return None
        dims = sorted(each % len(before) for each in ([dim] if isinstance(dim, int) else dim))
        axis = self.axis.get(source, 0)
        if axis in dims or 0 in dims:
            return None
        left = axis if keepdim else axis - sum(each < axis for each in dims)
        return Reading("mean", (source,), left, {"dim": dims, "keepdim": keepdim})

    def _pad(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        padding, mode, value = list(given["pad"]), given.get("mode", "constant"), given.get("value") or 0
        shape, axis = shape_of(source), self.axis.get(source, 0)
        padding += [0] * (2 * len(shape) - len(padding))
        of_axis = slice(2 * (len(shape) - 1 - axis), 2 * (len(shape) - axis))
        before, after = padding[of_axis]
        rest = [*padding[: of_axis.start], *padding[of_axis.stop :]]
        if min(padding) < 0 or any(padding[-2:]):
            return None
        if not before and not after:
            return Reading("pad", (source,), axis, {"pad": list(given["pad"]), "mode": mode, "value": value})
        if any(rest) or mode != "constant" or value:
            return None
        channels = [-1] * before + [*range(shape[axis])] + [-1] * after
        return Reading("select", (source,), axis, {"channels": channels, "dim": axis})

    def _pad_module(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        module: Any = self.model.get_submodule(str(node.target))
        mode = next((mode for name, mode in PADDING_MODES.items() if name in type(module).__name__), "constant")
        padding, dims = module.padding, len(shape_of(source)) - 2
        pad = [padding] * (2 * dims) if isinstance(padding, int) else list(padding)
        return self._pad(row, node, source, {"pad": pad, "mode": mode, "value": getattr(module, "value", 0)})

    def _resize(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        extra = given.pop("antialias", False) or given.pop("recompute_scale_factor", None)
        if extra or not self.along(source, 1) or len(shape_of(source)) < 3:
            return None
        settings = {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None, **plain(given)}
        return Reading("resize", (source,), 1, settings)

    def _batch_norm(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        """F.batch_norm with the parameters of one module, as subclasses of BatchNorm call it."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        read = {name: given[name] for name in names[1:5] if given.get(name) is not None}
        if not all(isinstance(each, fx.Node) and each.op == "get_attr" for each in read.values()):
            return None
        owners = {str(each.target).rpartition(".")[0] for each in read.values()}
        own = all(str(each.target).rpartition(".")[2] == name for name, each in read.items())
        dims = max(len(shape_of(source)) - 2, 1)
        if len(owners) != 1 or not own or not {"running_mean", "running_var"} <= read.keys():
            return None
        if given.get("training") or dims not in NORMS or not self.along(source, 1) or "weight" not in read:
            return None
        settings = {"eps": known(given.get("eps", 1e-5)), "momentum": known(given.get("momentum", 0.1))}
        return Reading(
            "batchnorm", (source,), 1, {"dims": dims, "bias": "bias" in read, "affine": True, **settings}, owners.pop()
        )

    def _fill(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        size, value = given.get("size"), given.get("fill_value")
        if not isinstance(value, (int, float)) or not size or shape_of(node)[0] != 1:
            return None
        return Reading("fill", (source,), 1, {"value": value, "size": list(shape_of(node)[1:])})

    def _index_select(self, row: str, node: Node, source: Node, given: Settings) -> Reading | None:
        dim, index = given.get("dim"), given.get("index")
        if not isinstance(index, Tensor) or not isinstance(dim, int) or not self.along(source, dim) or dim < 1:
            return None
        return Reading("select", (source,), dim, {"channels": index.tolist(), "dim": dim})


def _class_of(module: nn.Module, shape: tuple[int, ...]) -> type:
    """The module's class, or the layer of torch that it is a subclass of, if it computes the same of random numbers."""
    found = parametrize.type_before_parametrizations(module)
    base: Any = next((each for each in LAYER_CLASSES if issubclass(found, each)), found)
    if base is found:
        return base
    parameter = next(module.parameters())
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device, parameter.dtype)
    with eval_mode(module), torch.no_grad():
        return cast(type, base if torch.equal(module(x), base.forward(module, x)) else found)


def is_changed(module: nn.Module, node: Node) -> bool:
    """Whether calling the module gave something else than the forward pass of its class: hooks may only watch."""
    if not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)):
        return False
    with eval_mode(module), torch.no_grad():
        own = type(module).forward(module, node.args[0].meta["value"])
    return not isinstance(own, Tensor) or not torch.equal(own, node.meta["value"])


def is_image(value: Any) -> bool:
    """Whether `value` is a node with a tensor that depends on the image."""
    return isinstance(value, fx.Node) and value.meta["image"] and isinstance(value.meta["value"], Tensor)


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of a node's tensor, for one image."""
    return tuple(node.meta["value"].shape)


def known(value: Any) -> Any:
    """An argument with the recorded values of the nodes in it."""
    return fx.map_arg(value, lambda node: node.meta["value"])


def plain(value: Any) -> Any:
    """The same of lists, numbers, strings and None alone, as JSON has them."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def fields_of_module(kind: str, module: nn.Module) -> Settings:
    """The fields of a layer of the original network, without those that removal changes."""
    found = {name: getattr(module, name) for name in OPERATIONS[kind].fields if name not in WRITTEN_ANEW}
    if found.get("padding") == "valid":
        found["padding"] = [0] * len(found["kernel_size"])
    return dict(plain(found))


def _affine(kind: str, number: float, first: bool) -> tuple[float, float] | None:
    """scale and shift of x + number (first) or number + x, and so on."""
    if kind == "div" and not first:
        return None
    if kind == "sub" and not first:
        return -1.0, number
    return {"add": (1.0, number), "sub": (1.0, -number), "mul": (number, 0.0), "div": (1 / (number or math.nan), 0.0)}[
        kind
    ]
