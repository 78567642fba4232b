"""Small computations behind the walkthrough's explanations, and its tables.

Each returns plain arrays or a table; experiments/figures draws them.
"""

from __future__ import annotations

import copy
import html
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from IPython.display import HTML, Markdown
from numpy.typing import NDArray
from pandas.io.formats.style import Styler
from torch import Tensor, nn

from experiments.evaluator import EvalResult
from experiments.figures import Curve, names_left, plain_table, result_css, style
from experiments.pipeline import FAILED, PASSED, RunConfig, Verdict
from metrics import QuantizationComparison
from src.data import ImageData, augment
from src.pruning import ChannelGroups, analyze_liveness
from src.quantizer import DeadZoneLDZCompander, dequantize, grid_indices, lay_grids
from src.training import Objective, make_optimizer, step_gradients, train_step
from utils_quantization import default_tensors, eval_mode

MEASURED_BITS = Path(__file__).parents[2] / "docs" / "measured" / "bit_widths.csv"
Values = NDArray[np.float64]
RANGE = 2.5758293035489004  # R of normally distributed weights, the 0.99-quantile of |w|


@default_tensors()
def fixed_quantizer(share: float, bits: int) -> DeadZoneLDZCompander:
    """A quantizer with `bits` bits whose dead zone takes `share` (0 to 1) of the range: 1 - |tanh theta_dz| = share."""
    logit = math.atanh(1 - share)
    return DeadZoneLDZCompander(
        fixed_bit_val=bits, max_bits=max(bits, 2), init_deadzone_logit=logit, learnable_bit=False
    )


@torch.no_grad()
@default_tensors()
def staircase_curve(name: str, share: float, bits: int, reach: float = 1.3) -> Curve:
    """Weights from -reach to reach and what the quantizer makes of them, for a layer whose range R is 1.

    One weight in a hundred lies beyond R, as R asks for: there the quantizer cuts off.
    """
    inner, outer = torch.linspace(-1, 1, 3961, dtype=torch.float64), torch.linspace(1, reach, 21, dtype=torch.float64)
    w = torch.cat([-outer.flip(0)[:-1], inner, outer[1:]])
    quantizer = fixed_quantizer(share, bits).double()
    range_ = quantizer.grid(w).range  # the 0.99-quantile of these weights: 1 but for the spacing of the grid
    return name, w.numpy() / range_.item(), quantizer(w).numpy() / range_.item()


def measured_bit_widths() -> pd.DataFrame:
    """Bits of ResNet-20's layers (rows) after 20 epochs on CIFAR-10, for forms of the squared logits (columns)."""
    return pd.read_csv(MEASURED_BITS, index_col="layer")


def quantizer_source() -> Markdown:
    """The quantizer's forward pass, from logits to quantized weights."""
    return source_beside(
        {
            DeadZoneLDZCompander.get_bitwidth: r"b = \operatorname{round}\big(|\tanh\theta_{\text{bit}}|"
            r"\,(b_{\text{max}}-2)+2\big)",
            lay_grids: r"\begin{aligned} d &= 2R\,(1-|\tanh\theta_{\text{dz}}|) \\ Q &= 2^{b-1}-1 \\ "
            r"s &= \frac{R-d/2}{Q-1/2} \\ \delta &= \frac{d-s}{2} \end{aligned}",
            grid_indices: r"\begin{aligned} u &= \operatorname{sign}(w)\,\operatorname{relu}(|w|-\delta) \\ "
            r"q &= \operatorname{clip}\big(\operatorname{round}\,\frac{u}{s},\,-Q,\,Q\big) \end{aligned}",
            dequantize: r"\hat w = s\,q+\delta\,\operatorname{sign}(q)",
        }
    )


def step_source() -> Markdown:
    """One training step: update, loss and gradients."""
    return source_beside(
        {
            train_step: r"\theta \leftarrow \operatorname{AdamW}(\theta,\ \nabla\mathcal{L})",
            step_gradients: r"\begin{aligned} \mathcal{L} &= \mathcal{L}_{\text{task}} + \lambda(t)\,P \\ "
            r"&\quad + \lambda_{\text{dz}} \textstyle\sum\theta_{\text{dz}}^2 \\ "
            r"&\quad + \lambda_{\text{bit}} \sum\theta_{\text{bit}}^2 \\ "
            r"P &= \textstyle\sum_g \lVert w_g\rVert_2 \end{aligned}",
        }
    )


def source_beside(equations: Mapping[Callable[..., Any], str]) -> Markdown:
    """The source of every function as it runs, highlighted; beside it, where there is room, what it computes (TeX).

    The equation stands for the docstring.
    """
    parts = []
    for function, tex in equations.items():
        code = re.sub(r'\n *""".*?"""', "", textwrap.dedent(inspect.getsource(function)).rstrip(), count=1, flags=re.S)
        parts.append(
            '<div style="display:flex;flex-wrap:wrap;align-items:center;gap:0 1em;font-size:.8em">\n'
            f'<div style="flex:0 1 17em">\n\n$${tex}$$\n\n</div>\n'
            f'<div style="flex:1 1 32em;min-width:0">\n\n```python\n{code}\n```\n\n</div>\n</div>'
        )
    return Markdown("\n\n".join(parts))


def folded(summary: str, shown: Styler | str) -> HTML:
    """A table, or lines, shown on a click."""
    inner = f'<pre tabindex="0">{html.escape(shown)}</pre>' if isinstance(shown, str) else shown.to_html()
    return HTML(f'<details class="stage"><summary>{html.escape(summary)}</summary>{inner}</details>')


def augmentation_draws(data: ImageData, config: RunConfig, draws: int, images: int = 3) -> list[NDArray[np.uint8]]:
    """What `draws` epochs would see of the first training images: an array (images, 3, H, W) for each."""
    generator = torch.Generator().manual_seed(config.seed)
    originals, padding = data.train_images[:images], config.crop_padding
    seen = []
    for _ in range(draws):
        offsets = torch.randint(2 * padding + 1, (images, 2), generator=generator).to(originals.device)
        flips = (torch.rand(images, generator=generator) < (0.5 if config.flip else 0.0)).to(originals.device)
        seen.append(augment(originals, offsets, flips, padding).cpu().numpy())
    return seen


def logit_trajectories(
    steps: int, learning_rate: float, decay: float
) -> tuple[NDArray[np.int64], dict[str, Values], dict[str, Values]]:
    """A dead-zone logit that starts at 3, without any task gradient, under AdamW with the decay in both forms.

    Returns the steps, the logit for "decoupled decay" and "squares in the loss", and the share of normally distributed
    weights that fall into the dead zone at each logit: P(|w| <= d / 2) = erf(R (1 - |tanh theta|) / sqrt 2).
    """
    paths, zeros = {}, {}
    for name, by_optimizer, in_loss in (("decoupled decay", decay, 0.0), ("squares in the loss", 0.0, decay)):
        logit = nn.Parameter(torch.tensor(3.0))
        optimizer = make_optimizer([{"params": [logit], "lr": learning_rate, "weight_decay": by_optimizer}])
        path = [logit.item()]
        for _ in range(steps):
            logit.grad = 2 * in_loss * logit.detach()
            optimizer.step()
            path.append(logit.item())
        half = RANGE * (1 - np.abs(np.tanh(path)))  # of the dead zone
        paths[name], zeros[name] = np.array(path), torch.erf(torch.from_numpy(half / math.sqrt(2))).numpy()
    return np.arange(steps + 1), paths, zeros


def optimizer_table(optimizer: torch.optim.Optimizer, objective: Objective) -> Styler:
    """The optimizer's groups: how many numbers each trains, how fast, and where its 0.01 acts."""
    squares = {"logit_dz": objective.lambda_dz, "logit_bit": objective.lambda_bit}
    return plain_table(
        {
            "group": group["name"],
            "numbers": f"{sum(p.numel() for p in group['params']):,}",
            "learning rate": f"{group['lr']:g}",
            "decay by the optimizer": f"{group['weight_decay']:g}",
            "weight of its squares in the loss": f"{squares.get(group['name'], 0):g}",
        }
        for group in optimizer.param_groups
    )


def group_table(groups: ChannelGroups, number: int) -> Styler:
    """What one channel group holds, a row per parameter."""
    roles = {(member.module, member.parameter, member.dim): member.role for member in groups.members}
    return plain_table(
        {
            "layer": module,
            "part": roles[module, parameter, dim].replace("slice", "slice that reads it"),
            "index": ", ".join(map(str, indices)),
        }
        for module, parameter, dim, indices in groups.slices(number)
    )


def layer_table(result: EvalResult) -> Styler:
    """Compression a layer at a time; in the last rows the quantized layers together, and the network."""
    table = pd.DataFrame([*result.rows(), *result.totals()])
    formats = {"weights": "{:,.0f}", "bits": "{:.1f}", "zeros": "{:.1%}"} | dict.fromkeys(table.columns[4:], "{:,.0f}")
    bars = {"color": style.wash(style.BLUE), "vmin": 0, "vmax": 1}
    styled = table.style.hide(axis="index").format(formats, na_rep="").bar(subset=["zeros"], **bars)
    return names_left(styled.set_properties(subset=pd.IndexSlice[table.index[-2:], :], **{"font-weight": "bold"}))


def most_compressed(result: EvalResult, count: int = 3) -> str:
    """A sentence: the quantized layers that have most zeros and fewest, and that lost most of their channels."""
    quantized = [layer.quantized for layer in result.structured_stats.layers]
    table = pd.DataFrame(result.rows())[quantized].sort_values("zeros", ascending=False)
    zeros = [f"{row['layer']} ({row['zeros']:.1%})" for _, row in table.iterrows()]
    left = (table["channels left"] / table["channels"]).sort_values(kind="stable").index[:count]
    removed = [
        f"{row['layer']} ({row['channels'] - row['channels left']} of {row['channels']})"
        for _, row in table.loc[left].iterrows()
    ]
    return f"Most zeros: {', '.join(zeros[:count])}; fewest: {zeros[-1]}. Most channels removed: {', '.join(removed)}."


def ratio_table(result: EvalResult) -> Styler:
    """Two ways of counting: how many times fewer multiply-adds and bit operations than the dense FP32 network.

    Times fewer BOPs = times fewer MACs x 32 / weight bits per MAC, the mean over all MACs that count.
    """
    structured, unstructured = result.structured_stats, result.unstructured_stats
    table = pd.DataFrame(
        {
            "what counts": [
                "unstructured: non-zero weights (hardware that skips zeros)",
                "structured: channels left after exact removal (any hardware)",
            ],
            "MACs per image": [unstructured.total_macs, structured.total_macs],
            "fewer MACs": [result.unstructured_mac_ratio, result.structured_mac_ratio],
            "fewer BOPs": [result.unstructured_bops_ratio, result.structured_bops_ratio],
        }
    )
    table.insert(3, "weight bits per MAC", 32 * table["fewer MACs"] / table["fewer BOPs"])
    table["share of FP32 BOPs"] = 1 / table["fewer BOPs"]
    formats = dict(zip(table.columns[1:], ("{:,}", "{:.2f}x", "{:.2f}", "{:.2f}x", "{:.2%}"), strict=True))
    return names_left(table.style.hide(axis="index").format(formats))


@torch.no_grad()
def dead_filter_account(model: nn.Module, result: EvalResult, images: Tensor) -> list[dict[str, str]]:
    """What counting every dead filter as a channel of zeros would claim, beside what exact removal leaves.

    The claim is the same account for a copy of the network in which BatchNorm's output is forced to 0 wherever the
    filter in front of it is dead; the change is the largest difference that this makes to a logit of `images`.
    """
    claimed = copy.deepcopy(model).eval()
    modules = dict(claimed.named_modules())
    liveness = analyze_liveness(model)
    dead = {layer.name: layer.dead_out for layer in liveness.layers}
    made_by = {op.name: op.module for op in liveness.ops}
    for op in liveness.ops:
        producer = made_by.get(op.inputs[0]) if op.kind == "batchnorm" else None
        if producer in dead and op.module:
            norm, filters = cast(nn.BatchNorm2d, modules[op.module]), torch.from_numpy(dead[producer])
            for tensor in (norm.bias, cast(Tensor, norm.running_mean)):
                tensor[filters.to(tensor.device)] = 0
    counted = sum(layer.dead_out.sum() for layer in liveness.layers)
    moving = sum(
        int((np.nan_to_num(liveness.propagated_constants(layer.name)) != 0).sum()) for layer in liveness.layers
    )
    claim = QuantizationComparison().calculate_stats(claimed).total_macs
    with eval_mode(model):
        change = (claimed(images) - model(images)).abs().max().item()
    note = f"largest change of a logit: {change:.2g}"
    gone = {layer.name: ~np.isin(np.arange(layer.out_channels), layer.kept_out) for layer in liveness.layers}
    went = sum(int((gone[name] & flags).sum()) for name, flags in dead.items())
    removed = sum(int(channels.sum()) for channels in gone.values())
    account = f"{removed} channels removed, {went} of dead filters; {moving} are constants other than 0"
    return [
        {"count": f"{counted} dead filters, their constants ignored", "MACs": f"{claim:,}", "outputs": note},
        {"count": account, "MACs": f"{result.structured_stats.total_macs:,}", "outputs": "unchanged"},
    ]


def verdict_table(verdict: Verdict) -> Styler:
    """The expectations, those that failed first."""
    failed_first = sorted(verdict.expectations, key=lambda one: one.status != FAILED)
    table = pd.DataFrame(failed_first)[["status", "name", "expected", "measured", "look_at"]]
    table.loc[table["status"] == PASSED, "look_at"] = ""
    table.columns = ["result", "what", "expected", "measured", "look at"]
    if not table["look at"].any():
        del table["look at"]
    styled = plain_table(table.to_dict("records")).map(result_css, subset=["result"])
    return styled.set_properties(**{"white-space": "normal"}).set_table_attributes('class="cards"')
