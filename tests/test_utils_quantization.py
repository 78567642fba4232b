"""Attaching quantizers, switching them, and sharing their values within a step."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.optim.swa_utils import AveragedModel

from experiments.sparsity import coupled_group_lasso, group_lasso_channels
from metrics import QuantizationComparison
from resnet import BasicBlock, ResNet, resnet20
from src.data import load_data
from src.export import export_onnx, pack, unpack
from src.quantizer import DeadZoneLDZCompander
from src.training import Objective, make_optimizer, parameter_groups, predict, train_epoch
from tests.networks import Chain
from utils_quantization import (
    AttachmentError,
    FakeQuantParametrization,
    attach_weight_quantizers,
    eval_mode,
    latent_weight,
    quantization,
    quantized_layers,
    quantizer_of,
    shared_quantized_weights,
    toggle_quantization,
    unwrapped,
)

EXCLUDED = ["conv1", "bn", "linear"]
BLOCK_CONVOLUTIONS = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]


class Halver(nn.Module):
    """A quantizer of another kind, without a batched form: w -> factor w. Counts its calls."""

    def __init__(self, start: float = 0.5) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(start))
        self.calls = 0

    def forward(self, w: Tensor) -> Tensor:
        self.calls += 1
        return w * self.factor


def small(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(BasicBlock, [1, 1, 1], widths=(4, 6, 8))


def quantized(seed: int = 0, **settings: float) -> ResNet:
    model = small(seed)
    attach_weight_quantizers(model, EXCLUDED, DeadZoneLDZCompander, {"init_deadzone_logit": 0.8, **settings})
    return model


def attached(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if parametrize.is_parametrized(module)]


def enabled_states(model: nn.Module) -> list[bool]:
    return [m.enabled for m in model.modules() if isinstance(m, FakeQuantParametrization)]


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def test_resnet20_gets_exactly_its_18_block_convolutions() -> None:
    model = resnet20()
    names = attach_weight_quantizers(model, EXCLUDED, DeadZoneLDZCompander, {"max_bits": 8})
    assert names == BLOCK_CONVOLUTIONS
    assert attached(model) == BLOCK_CONVOLUTIONS
    assert list(quantized_layers(model)) == BLOCK_CONVOLUTIONS
    assert sum(isinstance(m, DeadZoneLDZCompander) for m in model.modules()) == 18


@pytest.mark.parametrize(
    ("excluded", "left"),
    [
        (["bn"], ["conv1", *[f"layer{s}.0.conv{c}" for s in (1, 2, 3) for c in (1, 2)], "linear"]),
        (["layer1", "conv1"], ["layer2.0.conv1", "layer2.0.conv2", "layer3.0.conv1", "layer3.0.conv2", "linear"]),
        (["layer*.conv1", "linear"], ["conv1", "layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"]),
        (["layer?.0.conv2", "*.conv1"], ["conv1", "linear"]),
        (["layer1.0", "layer[23]"], ["conv1", "linear"]),
        (["layer1.0.conv2", "layer2", "layer3", "conv1", "linear", "layer1.0.bn1"], ["layer1.0.conv1"]),
    ],
)
def test_patterns(excluded: list[str], left: list[str]) -> None:
    assert attach_weight_quantizers(small(), excluded, Halver) == left


@pytest.mark.parametrize(
    ("excluded", "said"),
    [
        ("conv1", r"exclude_layers='conv1' is one string: give a list, \['conv1'\]"),
        (["conv9"], r"'conv9' matches no module; did you mean 'conv1'.*layer1\.0\.conv1"),
        (["conv1", "liner"], r"'liner'.*did you mean 'linear'"),
        (["conv2"], r"'conv2'.*did you mean '\*\.conv2'"),
        (["0"], r"'0'.*did you mean 'layer1\.0'"),  # not '*.0', which is every block
        (["*.downsample"], r"'\*\.downsample' matches no module"),
        (["conv1", "layer*", "linear"], r"nothing to quantize.*conv1, layer1\.0\.conv1.*leaves none"),
        (["*"], "nothing to quantize"),
    ],
)
def test_bad_patterns_say_so_and_change_nothing(excluded: Any, said: str) -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AttachmentError, match=re.compile(said, re.DOTALL)):
        attach_weight_quantizers(model, excluded, DeadZoneLDZCompander)
    assert attached(model) == []
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_attaching_twice_is_refused_and_changes_nothing() -> None:
    model = small()
    attach_weight_quantizers(model, ["conv1", "linear", "layer2", "layer3"], Halver, enabled=False)
    assert enabled_states(model) == [False] * 2
    before = attached(model)
    with pytest.raises(AttachmentError, match=r"'layer1\.0\.conv1' has a quantizer already; attach once"):
        attach_weight_quantizers(model, EXCLUDED, Halver)
    assert attached(model) == before
    assert attach_weight_quantizers(model, ["conv1", "linear", "layer1"], Halver) == [
        f"layer{s}.0.conv{c}" for s in (2, 3) for c in (1, 2)
    ]


class Third(DeadZoneLDZCompander):
    """A quantizer that refuses to be made a third time."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).made += 1
        if self.made % 3 == 0:
            raise RuntimeError("no third one")


class Wide(DeadZoneLDZCompander):
    """A quantizer that gives 4 x 4 weights another shape."""

    def forward(self, w: Tensor) -> Tensor:
        return w[:1] if len(w) == w.shape[1] else w


def lazy(model: nn.Sequential) -> None:
    model[1] = nn.LazyConv2d(4, 1)


@pytest.mark.parametrize(
    ("change", "quantizer", "said"),
    [
        (lambda model: prune.ln_structured(model[1], "weight", 0.5, 2, 0), Halver, "'1'.*computed.*prune.remove"),
        (lambda model: weight_norm(model[1]), Halver, "'1'.*computed.*remove_weight_norm"),
        (lambda model: parametrizations.weight_norm(model[1]), Halver, "'1'.*_WeightNorm.*remove_parametrizations"),
        (lambda model: parametrizations.spectral_norm(model[1]), Halver, "'1'.*_SpectralNorm.*remove_param"),
        (lazy, Halver, "'1' is lazy.*run the network once"),
        (lambda model: None, Third, "'2' cannot be quantized: no third one"),
        (lambda model: None, Wide, "'1' cannot be quantized: .*shape"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Lazy modules")
def test_a_layer_that_cannot_be_quantized_is_named_and_nothing_is_changed(
    change: Callable[[nn.Module], object], quantizer: type[nn.Module], said: str
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    change(model)
    before = [(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())
    with pytest.raises(AttachmentError, match=re.compile(said, re.DOTALL)):
        attach_weight_quantizers(model, [], quantizer)
    assert ([(name, type(module)) for name, module in model.named_modules()], list(model.state_dict())) == before


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


WRAPPERS = (nn.DataParallel, compiled, AveragedModel, lambda model: AveragedModel(compiled(model)))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_is_looked_through(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, wrapped, x = quantized().eval(), wrap(small()).eval(), images()
    wrapped(x)  # also where it has been compiled already
    with pytest.raises(AttachmentError, match=r"'module\.conv1' matches no module; did you mean 'conv1'"):
        attach_weight_quantizers(wrapped, ["module.conv1"], Halver)
    names = attach_weight_quantizers(wrapped, EXCLUDED, DeadZoneLDZCompander, {"init_deadzone_logit": 0.8})
    assert names == list(quantized_layers(wrapped)) == list(quantized_layers(plain))
    for enabled in (True, False):
        with quantization(wrapped, enabled), quantization(plain, enabled), shared_quantized_weights(wrapped):
            assert torch.equal(wrapped(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_networks_that_quantizers_are_attached_to_earlier() -> None:
    with pytest.raises(AttachmentError, match=r"Linear is a ScriptModule.*before torch\.jit\.script"):
        attach_weight_quantizers(torch.jit.script(nn.Linear(2, 2)), [], Halver)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(small())
        with pytest.raises(AttachmentError, match=r"attach to the network first, then model = DistributedDataP"):
            attach_weight_quantizers(model, EXCLUDED, Halver)
        assert not quantized_layers(model)
    finally:
        torch.distributed.destroy_process_group()


def test_embeddings_are_not_quantized_and_may_be_excluded() -> None:
    words = nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 4))
    with pytest.raises(AttachmentError, match=r"Sequential has no convolution and no linear layer.*embedding"):
        attach_weight_quantizers(words, [], Halver)
    assert attach_weight_quantizers(nn.Sequential(words, nn.Linear(4, 2)), ["0.0"], Halver) == ["1"]


@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
@pytest.mark.parametrize(("training", "gradients"), [(True, True), (False, True), (False, False)])
def test_attention_computes_with_its_quantized_output_projection(
    training: bool, gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a network whose weights are replaced by hand; without gradients, torch runs one fused kernel."""
    torch.manual_seed(0)
    plain = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).train(training)
    model = copy.deepcopy(plain)
    names = attach_weight_quantizers(model, [], DeadZoneLDZCompander, {"init_deadzone_logit": 0.5})
    assert names == ["self_attn.out_proj", "linear1", "linear2"]
    x, fused, kernel = torch.randn(3, 5, 8), [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *given: fused.append(1) or kernel(*given))
    with torch.set_grad_enabled(gradients):
        unquantized, found = plain(x), model(x)
        for name in names:
            layer = plain.get_submodule(name)
            layer.weight.data = DeadZoneLDZCompander(init_deadzone_logit=0.5)(layer.weight.detach())
            if name == "self_attn.out_proj":
                assert not torch.allclose(plain(x), unquantized)
        assert torch.equal(found, plain(x))
    assert len(fused) == (0 if training or gradients else 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_precision(dtype: torch.dtype) -> None:
    """Its quantized weights are those of the float32 network, rounded; every learnable has a gradient."""
    model, single = small().to(dtype), small().to(dtype).float()
    for network in (model, single):
        attach_weight_quantizers(network, EXCLUDED, DeadZoneLDZCompander, {"init_deadzone_logit": 0.8})
    with shared_quantized_weights(model):
        model(images().to(dtype)).square().sum().backward()
        for name, layer in quantized_layers(model).items():
            assert layer.weight.dtype == dtype
            torch.testing.assert_close(layer.weight, single.get_submodule(name).weight.to(dtype), rtol=1e-5, atol=1e-7)
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_quantizer_takes_the_mode_of_its_layer(training: bool) -> None:
    model = small().train(training)
    attach_weight_quantizers(model, EXCLUDED, DeadZoneLDZCompander)
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_network_is_what_is_inside(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    plain = quantized().eval()
    wrapped = wrap(plain).eval()
    assert isinstance(unwrapped(wrapped), ResNet)
    found = []
    for number, model in enumerate((plain, wrapped)):
        comparison = QuantizationComparison()
        comparison.set_baseline(small())
        penalty = coupled_group_lasso(model)
        pack(model, tmp_path / str(number))
        export_onnx(model, tmp_path / f"{number}.onnx")
        files = [(tmp_path / f"{number}{kind}").read_bytes() for kind in ("", ".onnx")]
        found.append((penalty(plain), penalty(wrapped), comparison.calculate_stats(model), files))
    assert found[0] == found[1]


@pytest.mark.parametrize("sharing", [shared_quantized_weights, lambda model: nullcontext()])
def test_attach_and_forward_without_numbers(sharing: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
    with torch.device("meta"):
        model = small()
    attach_weight_quantizers(model, EXCLUDED, DeadZoneLDZCompander)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    with sharing(model):
        assert model(images().to("meta")).shape == (4, 10)
    with FakeTensorMode():
        model = quantized()
        with sharing(model):
            model(torch.zeros(4, 3, 16, 16)).sum().backward()


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def trained(model: nn.Module, folder: Path) -> list[Any]:
    """What comes of every step from images to files."""
    data = load_data("digits", limit=20)
    comparison = QuantizationComparison()
    comparison.set_baseline(model)
    attach_weight_quantizers(model, EXCLUDED, DeadZoneLDZCompander, {"init_deadzone_logit": 0.8})
    penalty = coupled_group_lasso(model)
    rates = dict.fromkeys(("learning_rate", "dz_learning_rate", "bit_learning_rate"), 0.01)
    optimizer = make_optimizer(parameter_groups(model, **rates))
    shaping = {"epoch": 0, "epochs": 1, "batch_size": 10, "coefficient": 0.01, "lr_lambda": lambda progress: 1.0}
    losses = [step.loss() for step in train_epoch(model, optimizer, data, Objective(penalty, 0.1, 0.1), **shaping)]
    model.eval()
    stats = comparison.calculate_stats(model)
    pack(model, folder / "packed")
    export_onnx(model, folder / "onnx")
    files = [(folder / name).read_bytes() for name in ("packed", "onnx")]
    unpacked = [predict(each, data)[0].tolist() for each in (model, unpack(folder / "packed"))]
    penalties = penalty(model), group_lasso_channels(model)
    assert {part.dtype for part in penalties} == {torch.float32}
    return [losses, stats, files, unpacked, *penalties]


@pytest.mark.parametrize("device", [None, "meta"])
def test_defaults_that_a_user_has_set_change_nothing(device: str | None, tmp_path: Path) -> None:
    folders = [tmp_path / "plain", tmp_path / "changed"]
    for folder in folders:
        folder.mkdir()
    model = small()
    expected = trained(copy.deepcopy(model), folders[0])
    with defaults(torch.float64, device):
        assert trained(model, folders[1]) == expected
        assert torch.get_default_dtype() == torch.float64


def test_off_is_the_network_it_was_and_on_is_its_quantized_weights() -> None:
    plain, model = small().eval(), quantized().eval()
    x = images()
    toggle_quantization(model, False)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    toggle_quantization(model, True)
    with torch.no_grad():
        for name in quantized_layers(model):
            convolution = plain.get_submodule(name)
            quantizer = DeadZoneLDZCompander(init_deadzone_logit=0.8)
            convolution.weight.copy_(quantizer(convolution.weight))
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)


def test_contexts_restore_mixed_states_also_after_exceptions() -> None:
    model = quantized()
    for i, module in enumerate(m for m in model.modules() if isinstance(m, FakeQuantParametrization)):
        module.enabled = i % 2 == 0
    model.layer2.eval()
    mixed = [(getattr(m, "enabled", None), m.training) for m in model.modules()]

    def fail_inside(wanted: bool) -> None:
        with quantization(model, wanted), eval_mode(model):
            assert enabled_states(model) == [wanted] * 6
            assert not any(m.training for m in model.modules())
            with quantization(model, not wanted):
                assert enabled_states(model) == [not wanted] * 6
            assert enabled_states(model) == [wanted] * 6
            raise ZeroDivisionError

    for wanted in (True, False):
        with pytest.raises(ZeroDivisionError):
            fail_inside(wanted)
        assert [(getattr(m, "enabled", None), m.training) for m in model.modules()] == mixed


def test_switching_a_network_without_quantizers() -> None:
    with pytest.raises(AttachmentError, match="ResNet has no quantizer to switch"):
        toggle_quantization(small(), True)
    with pytest.raises(AttachmentError, match="attach_weight_quantizers"), quantization(small(), True):
        pass
    with pytest.raises(AttachmentError, match="Conv2d has no quantizer"):
        quantizer_of(small().conv1)


def test_sharing_quantizers_of_another_kind() -> None:
    model = Chain()
    attach_weight_quantizers(model, [], Halver)
    counters = [m for m in model.modules() if isinstance(m, Halver)]
    for counter in counters:
        counter.calls = 0
    with shared_quantized_weights(model):
        model(torch.zeros(1, 2, 6, 6))
        model(torch.zeros(1, 2, 6, 6))
    assert [counter.calls for counter in counters] == [1, 1, 1]
    model(torch.zeros(1, 2, 6, 6))
    assert [counter.calls for counter in counters] == [2, 2, 2]


def test_sharing_gives_the_same_loss_and_gradients() -> None:
    def gradients(sharing: AbstractContextManager[None], model: nn.Module) -> list[Tensor]:
        with sharing:
            penalty = sum(layer.weight.abs().sum() for layer in quantized_layers(model).values())
            loss = model(images().double()).square().sum() + penalty
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    model = quantized().double()
    shared = gradients(shared_quantized_weights(model), model)
    torch.testing.assert_close(shared, gradients(nullcontext(), model), rtol=1e-10, atol=1e-10)
    assert all(torch.count_nonzero(g) for g in shared)


def test_sharing_ends_with_its_block() -> None:
    model = quantized()
    layer = model.get_submodule("layer1.0.conv1")
    with pytest.raises(ZeroDivisionError), shared_quantized_weights(model):
        raise ZeroDivisionError
    with torch.no_grad():
        latent_weight(layer).mul_(2)
    assert torch.equal(layer.weight, quantizer_of(layer)(latent_weight(layer)))


def test_sharing_nested_keeps_the_outer_values() -> None:
    model = quantized()
    layer = model.get_submodule("layer1.0.conv1")
    with shared_quantized_weights(model):
        outer = layer.weight
        assert layer.weight is outer
        with torch.no_grad(), shared_quantized_weights(model):
            assert torch.equal(layer.weight, outer)
        assert layer.weight is outer
        assert outer.requires_grad


def test_shared_weights_are_float32_under_autocast() -> None:
    model = quantized()
    layer = model.get_submodule("layer3.0.conv2")
    plain = layer.weight.detach()
    with torch.autocast("cpu", torch.bfloat16), shared_quantized_weights(model):
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight.detach(), plain)
