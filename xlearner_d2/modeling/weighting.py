"""Weights of the sources' losses that training finds: by uncertainty, or by how fast each loss falls.

Both wrap the model that is trained and multiply the losses it returns, so gradients, mixed precision and distributed
training are those of any other model. Weights start as ``LOSS_WEIGHT`` of each source says.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from detectron2.utils import comm
from torch import Tensor, nn

Losses = dict[str, Tensor]

#: How a source's weight is found, besides "fixed".
METHODS = ("uncertainty", "dwa")
#: A log-variance stays within this distance of 0, so that a weight stays within a factor of about 150 of its start.
LOG_VARIANCE_LIMIT = 5.0


def of_source(losses: Mapping[str, Tensor], source: str) -> Losses:
    """The losses of one source, which are named ``source/loss_x``."""
    return {name: loss for name, loss in losses.items() if name.startswith(f"{source}/")}


class _LogVariance(nn.Module):
    """One learned number, in a module of its own: the parameter's name is what spares it weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))


class UncertaintyWeights(nn.Module):
    """Weighting by uncertainty: ``w * (exp(-s) * loss + s)`` with a learned log-variance ``s`` for each source.

    Source: Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses" (CVPR 2018), in the form that
    starts as ``w * loss``. At the optimum ``exp(s)`` is the loss: sources count by their LOSS_WEIGHT, whatever the
    scale of their losses.

    Args:
        loss_weights: LOSS_WEIGHT of each source, by which the losses that come in are multiplied already.
    """

    def __init__(self, loss_weights: Mapping[str, float]):
        super().__init__()
        self.loss_weights = dict(loss_weights)
        self.sources = nn.ModuleDict({source: _LogVariance() for source in loss_weights})

    def forward(self, losses: Losses, source: str) -> Losses:
        """The weighted losses of one source, and ``source/loss_uncertainty``, the term that keeps weights from 0."""
        log_variance = cast(_LogVariance, self.sources[source]).log_variance
        with torch.no_grad():
            log_variance.clamp_(-LOG_VARIANCE_LIMIT, LOG_VARIANCE_LIMIT)
        weighted = {name: torch.exp(-log_variance) * loss for name, loss in losses.items()}
        return {**weighted, f"{source}/loss_uncertainty": self.loss_weights[source] * log_variance}

    def factors(self) -> dict[str, float]:
        """By source, what its losses are multiplied by at present."""
        values = torch.stack([cast(_LogVariance, of).log_variance.detach() for of in self.sources.values()])
        return dict(zip(self.sources, torch.exp(-values).tolist(), strict=True))

    def end_step(self, losses: Losses) -> None:
        """Nothing to learn besides by gradient."""


class AverageWeights(nn.Module):
    """Dynamic weight average: sources whose loss falls slowly count more.

    Source: Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention" (CVPR 2019). A source's factor is the
    softmax over the sources, times their number, of the ratio of its mean losses in the last two windows, divided by
    the temperature. Mean losses are those of all workers. All factors are 1 in the first two windows.

    Args:
        loss_weights: LOSS_WEIGHT of each source, by which the losses that come in are multiplied already.
        temperature: larger ones weigh more evenly.
        window: length in steps; at least a round of alternating steps.
    """

    sums: Tensor
    counts: Tensor
    means: Tensor
    current: Tensor

    def __init__(self, loss_weights: Mapping[str, float], *, temperature: float = 2.0, window: int = 100):
        super().__init__()
        self.loss_weights = dict(loss_weights)
        self.names = tuple(loss_weights)
        self.temperature = temperature
        self.window = window
        number = len(self.names)
        self.register_buffer("sums", torch.zeros(number))
        self.register_buffer("counts", torch.zeros(number))
        self.register_buffer("means", torch.zeros(2, number))  # of the last window and of the one before it
        self.register_buffer("current", torch.ones(number))
        self.num_steps = 0  # no tensor: to compare one of a GPU would wait for it

    def get_extra_state(self) -> dict[str, int]:
        """What a state dict holds besides tensors."""
        return {"num_steps": self.num_steps}

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.num_steps = state["num_steps"]

    def forward(self, losses: Losses, source: str) -> Losses:
        """The weighted losses of one source."""
        factor = self.current[self.names.index(source)].clone()  # a window may end before the backward pass
        return {name: factor * loss for name, loss in losses.items()}

    def factors(self) -> dict[str, float]:
        """By source, what its losses are multiplied by at present."""
        return dict(zip(self.names, self.current.tolist(), strict=True))

    @torch.no_grad()
    def end_step(self, losses: Losses) -> None:
        """Take the unweighted losses of a step into account; all workers call this for the same sources.

        Losses are averaged over the workers at once, so that the state that the main worker saves is that of all.
        """
        found = [list(of_source(losses, name).values()) for name in self.names]
        zero = torch.zeros_like(self.sums[0])
        totals = torch.stack([sum((loss.detach().float() for loss in of), start=zero) for of in found])
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(totals)
            totals /= comm.get_world_size()
        finite = totals.isfinite()
        self.sums += totals.where(finite, torch.zeros_like(totals))
        for k, of in enumerate(found):
            if of:
                self.counts[k] += finite[k]
        self.num_steps += 1
        if self.num_steps % self.window == 0:
            self._end_window()

    def _end_window(self) -> None:
        last = torch.where(self.counts > 0, self.sums / self.counts.clamp(min=1), self.means[0])
        self.means.copy_(torch.stack([last, self.means[0]]))
        self.sums.zero_()
        self.counts.zero_()
        if self.num_steps >= 2 * self.window:
            last, before = self.means.clamp(min=1e-12)
            self.current.copy_(len(self.names) * torch.softmax(last / before / self.temperature, dim=0))


class WeightedLosses(nn.Module):
    """A model whose losses are weighted in training.

    Args:
        model: gives losses named ``source/loss_x``, and any others, which stay as they are.
        weights: :class:`UncertaintyWeights` or :class:`AverageWeights`; saved apart from the model, which is used
            without them.
    """

    def __init__(self, model: nn.Module, weights: UncertaintyWeights | AverageWeights):
        super().__init__()
        self.model = model
        self.weights = weights

    def forward(self, batches: Mapping[str, list[dict[str, Any]]]) -> Any:
        """The model's losses, those of each source weighted; its predictions in inference mode."""
        losses = self.model(batches)
        if not self.training:
            return losses
        weighted = self._weigh(losses, batches)
        self.weights.end_step(losses)
        return weighted

    def losses_by_branch(self, batches: Mapping[str, list[dict[str, Any]]]) -> Iterator[Losses]:
        """The model's, see :meth:`XLearner.losses_by_branch`, those of each source weighted."""
        found: Losses = {}
        for losses in cast(Any, self.model).losses_by_branch(batches):
            yield self._weigh(losses, batches)
            found |= {name: loss.detach() for name, loss in losses.items()}
        self.weights.end_step(found)

    def _weigh(self, losses: Losses, sources: Iterable[str]) -> Losses:
        weighted = dict(losses)
        for source in sources:
            if own := of_source(losses, source):
                weighted |= self.weights(own, source)
        return weighted


def weigh_losses(
    model: nn.Module, method: str, loss_weights: Mapping[str, float], *, temperature: float, window: int
) -> nn.Module:
    """The model with weights by ``method``, one of :data:`METHODS`; for "fixed" the model itself."""
    makers: dict[str, Callable[[], UncertaintyWeights | AverageWeights]] = {
        "uncertainty": lambda: UncertaintyWeights(loss_weights),
        "dwa": lambda: AverageWeights(loss_weights, temperature=temperature, window=window),
    }
    if method == "fixed":
        return model
    device = next(model.parameters()).device
    return WeightedLosses(model, makers[method]()).to(device)


def current_weights(model: nn.Module) -> dict[str, float]:
    """By source, the weight of its losses at present, which waits for the device; empty where weights are fixed."""
    if not isinstance(model, WeightedLosses):
        return {}
    factors = model.weights.factors()
    return {source: factor * model.weights.loss_weights[source] for source, factor in factors.items()}


def weights_of(model: nn.Module) -> dict[str, nn.Module]:
    """What is to be saved beside the model that :func:`weigh_losses` was given: ``{"loss_weights": …}``, or nothing."""
    return {"loss_weights": model.weights} if isinstance(model, WeightedLosses) else {}
