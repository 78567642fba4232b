"""A budget: how small the finished network must be, and the control of the penalty that gets it there.

    cost    macs   MACs after exact channel removal
            bops   MACs of the non-zero weights x weight bits x 32, the paper's account
            bytes  the packed file
            each as a share c of the dense FP32 network's, counted exactly after every epoch
    path    log r(e) = log c0 + (log a - log c0) (3 t^2 - 2 t^3), t = (e - e0) / (e1 - e0), a = 0.96 budget
    error   x(e) = log c(e) - log r(e)
    dual    nu(e) = peak f exp(6 x(e) + g sum of x up to e), the coefficient of epoch e + 1

e counts finished epochs, E those of the run; control begins after e0 = `delay`, with the cost c0 of that epoch, and the
path ends three quarters of the way from e0 to E, at e1: channels die only while the weights' learning rate is high.
For bops and bytes, nu weights the group lasso and the squared logits together, in the ratio that the configuration
gives them; g = 0.3, and f = 4 t (1 - t) in the middle of the epoch, so that nu follows the slope of the path; f = 1
after e1. Bits fall by whole numbers in many layers at once, so the bit widths are pressed only while one bit less in
every layer still costs more than a. What remains is trimmed by dead zones: where s = log c - log a is at most 0.05, or
0.25 after e1, nu is peak max(s / 0.25, -1) and acts, as +-peak, on the dead zones' logits of that share of the layers
alone; twice that share after e1 while c is above the budget. Below 0, zeros come back.
For macs, nu weights the group lasso of those channels alone that do not fit, the ones of smallest norm relative to the
mean of the layer that makes them, chosen anew after every epoch: the others are not drawn to zero, so the cost cannot
fall far below the budget. f = 1, g = 1, and nu is at least the peak. Where the path has ended and the cost is still
above the budget, the chosen channels are set to zero, and the epochs that are left recover what that costs.
The control is a function of the history alone, so a resumed run continues it.
Axis letters: G groups.
"""

from __future__ import annotations

import bisect
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.pipeline.config import Budget, ConfigError, RunConfig
from experiments.sparsity import group_norms
from metrics import QuantizationComparison
from src.export import pack
from src.pruning import channel_groups
from src.training import History, Objective, squared_logits
from utils_quantization import eval_mode, latent_weight, quantized_layers, shared_quantized_weights

AIM = 0.96  # of the budget: the cost moves by some per cent in an epoch
GAIN, INTEGRAL_GAIN = 6.0, {"bops": 0.3, "macs": 1.0, "bytes": 0.3}
STRONGEST = 30.0  # times the peak
NEAR, CLOSE = 0.25, 0.05  # log c - log a: about what the dead zones of all layers change in an epoch, and a fifth of it
SPREAD = 0.618  # multiples of it, modulo 1, are spread evenly


def packed_ratio(model: nn.Module) -> float:
    """FP32 state of the dense network over the packed file, in bytes."""
    with tempfile.TemporaryDirectory() as folder, eval_mode(model):
        return pack(model, Path(folder) / "model.cdq").ratio


class BudgetControl:
    """What a run with a budget minimises, and how strongly, epoch by epoch. See the module.

    model: with its quantizers. dense: the same network without. Raises ConfigError where the layers in full precision
    alone cost more BOPs than the budget.
    """

    def __init__(self, config: RunConfig, model: nn.Module, dense: nn.Module) -> None:
        self.budget = Budget.parse(config.target)
        self.aim = AIM * self.budget.share
        self.peak, self.begin = config.peak, max(config.delay, 1)
        self.length = 0.75 * max(config.epochs - self.begin, 1)
        self._comparison = QuantizationComparison()
        self._dense = self._comparison.set_baseline(dense)
        if self.budget.kind == "bops":
            self._check_floor(model)
        self._groups = channel_groups(model)
        self._norms = group_norms(self._groups)
        self._chosen = torch.ones(len(self._groups), device=next(model.parameters()).device)
        self._ratios = config.logit_decay_dz / config.peak, config.logit_decay_bit / config.peak
        device = self._chosen.device
        self._lasso, self._bits = torch.ones((), device=device), torch.ones((), device=device)
        self._spread = SPREAD * torch.arange(len(quantized_layers(model)), device=device) % 1
        self._dead_zones = torch.ones_like(self._spread)
        if self.budget.kind == "macs":
            self.objective = config.objective(self._chosen_lasso)
        else:
            self.objective = Objective(self._lasso_and_squares)

    def coefficient(self, history: History) -> float:
        """The coefficient of the epoch that follows `history`; 0 up to epoch `begin`, below 0 where zeros come back."""
        done = len(history)
        if done < self.begin:
            return 0.0
        costs = [float(record.cost or 1.0) for record in history.records[self.begin - 1 :]]
        falls, errors = math.log(self.aim / costs[0]), []
        for passed, cost in enumerate(costs):
            t = min(passed / self.length, 1.0)
            errors.append(math.log(cost / costs[0]) - falls * (3 * t**2 - 2 * t**3))
        exponent = GAIN * errors[-1] + INTEGRAL_GAIN[self.budget.kind] * sum(errors)
        strength = math.exp(min(exponent, math.log(STRONGEST)))
        if self.budget.kind == "macs":
            return self.peak * max(strength, 1.0)
        if self._trims(history):
            return self.peak * self._share_to_trim(history)
        middle = (done + 0.5 - self.begin) / self.length
        return self.peak * strength * (4 * middle * (1 - middle) if middle < 1 else 1.0)

    def _surplus(self, history: History) -> float:
        """log c - log a after the last epoch."""
        return math.log(float(history.last.cost or 1.0) / self.aim)

    def _ended(self, history: History) -> bool:
        return len(history) - self.begin >= self.length

    def _trims(self, history: History) -> bool:
        """Whether dead zones alone bring the cost to the aim."""
        return self._surplus(history) <= (NEAR if self._ended(history) else CLOSE)

    def _share_to_trim(self, history: History) -> float:
        """The share of the layers whose dead zones grow, below 0: shrink."""
        late = self._ended(history) and float(history.last.cost or 1.0) > self.budget.share
        return max(min(self._surplus(history) / NEAR * (2 if late else 1), 1.0), -1.0)

    def apply(self, history: History) -> None:
        """Let the objective be that of the epoch that follows `history`."""
        if not history.records:
            return
        last = history.last
        if self.budget.kind == "macs":
            self._chosen.zero_()
            self._chosen[list(last.penalised)] = 1
            return
        surplus, trims = self._surplus(history), self._trims(history)
        share = abs(self._share_to_trim(history))
        fits = math.log(last.mean_bits / (last.mean_bits - 1)) < surplus  # one bit less in every layer
        self._lasso.fill_(not trims)
        self._bits.fill_(fits and not trims)
        self._dead_zones.copy_((self._spread < share) / max(share, 1e-9) if trims else torch.ones_like(self._spread))

    @torch.no_grad()
    def cost(self, model: nn.Module) -> float:
        """The cost of the network as it is now, as a share of the dense network's."""
        if self.budget.kind == "bytes":
            return 1 / packed_ratio(model)
        with eval_mode(model):
            if self.budget.kind == "macs":
                return self._comparison.calculate_stats(model).total_macs / self._dense.total_macs
            return self._comparison.calculate_unstructured_stats(model).total_bops / self._dense.total_bops

    @torch.no_grad()
    def choose(self, model: nn.Module) -> tuple[int, ...]:
        """For macs: the fewest groups, smallest first, without which the network fits; () for another budget."""
        if self.budget.kind != "macs":
            return ()
        with shared_quantized_weights(model):
            norms = self._norms(model).cpu().numpy()
        # Relative to the layer: a layer that shrinks as a whole prunes nothing, because its quantizer's grid follows.
        makers = np.unique([name.partition("[")[0] for name in self._groups.names], return_inverse=True)[1]
        means = np.bincount(makers, norms) / np.bincount(makers)
        smallest_first = (norms / np.maximum(means, 1e-12)[makers]).argsort(kind="stable")
        counts = range(len(self._groups) + 1)
        fewest = bisect.bisect_left(
            counts, True, key=lambda count: self._macs_without(smallest_first[:count]) <= self.aim
        )
        return tuple(sorted(smallest_first[:fewest].tolist()))

    @torch.no_grad()
    def enforce(self, model: nn.Module, history: History) -> None:
        """For macs, once the path has ended: set the chosen channels of a network above the budget to zero."""
        last = history.last
        if self.budget.kind != "macs" or not self._ended(history) or (last.cost or 1.0) <= self.budget.share:
            return
        for member in self._groups.members:
            layer = model.get_submodule(member.module)
            values = latent_weight(layer) if member.parameter == "weight" else getattr(layer, member.parameter)
            chosen = np.flatnonzero(np.isin(member.groups, last.penalised))
            values.index_fill_(member.dim, torch.from_numpy(chosen).to(values.device), 0.0)

    def _macs_without(self, groups: NDArray[np.int64]) -> float:
        """MACs without these groups, as a share of the dense network's: of a layer, filters left x slices left."""
        macs = {layer.name: float(layer.macs) for layer in self._dense.layers}
        for member in self._groups.members:
            if member.role in ("filter", "slice"):
                macs[member.module] *= 1 - np.isin(member.groups, groups).mean()
        return sum(macs.values()) / self._dense.total_macs

    def _check_floor(self, model: nn.Module) -> None:
        """Raise ConfigError where the layers in full precision alone cost more BOPs than the budget."""
        quantized = quantized_layers(model)
        full = [layer for layer in self._dense.layers if layer.name not in quantized]
        floor = sum(layer.bops for layer in full) / self._dense.total_bops
        if floor >= self.budget.share:
            names = ", ".join(layer.name for layer in full)
            raise ConfigError(
                f"target: {self.budget} is less than the layers in full precision cost alone ({names}: {floor:.2%}, at "
                f"32-bit weights); ask for more than that, or quantize them too: with 8 bits they cost {floor / 4:.2%} "
                "(exclude_layers)"
            )

    def _lasso_and_squares(self, model: nn.Module) -> Tensor:
        logits = torch.stack([p for name, p in model.named_parameters() if name.endswith(".logit_dz")])
        of_dead_zones, of_bits = self._ratios
        dead_zones = of_dead_zones * (self._dead_zones * logits.square()).sum()
        return self._lasso * self._norms(model).sum() + dead_zones + self._bits * squared_logits(model, 0.0, of_bits)

    def _chosen_lasso(self, model: nn.Module) -> Tensor:
        return (self._norms(model) * self._chosen).sum()
