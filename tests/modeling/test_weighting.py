"""Weights of losses that training finds, against optima in closed form and numbers worked out by hand."""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from xlearner_d2.engine.optimizer import make_optimizer
from xlearner_d2.modeling.weighting import (
    LOG_VARIANCE_LIMIT,
    METHODS,
    WeightedLosses,
    current_weights,
    weigh_losses,
    weights_of,
)

WEIGHTS = {"a": 1.0, "b": 0.5}


class Given(nn.Module):
    """Gives fixed losses of the sources in a batch, two of source ``a``, and one of no source; already weighted."""

    def __init__(self, a: float = 0.75, b: float = 20.0):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.losses = {"a": a, "b": b}

    def forward(self, batches):
        if not self.training:
            return "predictions"
        found = {}
        if "a" in batches:
            found |= {"a/loss_x": 2 / 3 * self.losses["a"], "a/loss_y": 1 / 3 * self.losses["a"]}
        if "b" in batches:
            found["b/loss_x"] = WEIGHTS["b"] * self.losses["b"]
        return {name: value * self.scale for name, value in {**found, "loss_hint": 7.0}.items()}


def weighted(method, model=None, temperature=2.0, window=2):
    return weigh_losses(model or Given(), method, WEIGHTS, temperature=temperature, window=window)


def forward(model, *sources):
    with EventStorage():
        return model({source: [] for source in sources or WEIGHTS})


def test_fixed_is_the_model_itself():
    model = Given()
    assert weighted("fixed", model) is model
    assert weights_of(model) == {}


@pytest.mark.parametrize("method", METHODS)
def test_starts_as_the_fixed_weights_with_the_same_gradient(method):
    model = weighted(method)
    fixed, found = forward(Given()), forward(model)
    extra = {name: value for name, value in found.items() if name not in fixed}
    assert {name: float(value) for name, value in fixed.items()} == {name: float(found[name]) for name in fixed}
    assert all(name.endswith("loss_uncertainty") and float(value) == 0 for name, value in extra.items())
    sum(found.values()).backward()
    assert float(model.model.scale.grad) == pytest.approx(sum(map(float, fixed.values())))


@pytest.mark.parametrize("method", METHODS)
def test_inference_and_losses_of_no_source_are_left_alone(method):
    model = weighted(method)
    assert float(forward(model)["loss_hint"]) == 7
    assert forward(model.eval()) == "predictions"


def test_uncertainty_finds_its_optimum_in_closed_form():
    """d/ds of w (exp(-s) L + s) is 0 where exp(s) = L: each source then counts by its LOSS_WEIGHT."""
    model = weighted("uncertainty")
    optimizer = torch.optim.SGD(model.weights.parameters(), lr=0.2)
    for _ in range(400):
        optimizer.zero_grad()
        found = forward(model)
        sum(found.values()).backward()
        optimizer.step()
    assert model.weights.factors() == pytest.approx({"a": 1 / 0.75, "b": 1 / 20}, rel=1e-3)
    assert float(found["a/loss_x"] + found["a/loss_y"]) == pytest.approx(WEIGHTS["a"], rel=1e-3)
    assert float(found["b/loss_x"]) == pytest.approx(WEIGHTS["b"], rel=1e-3)


@pytest.mark.parametrize("loss", [1e-9, 1e9])
def test_uncertainty_stays_in_its_range_and_comes_back(loss):
    model = weighted("uncertainty", Given(a=loss))
    optimizer = torch.optim.SGD(model.weights.parameters(), lr=3.0)
    for _ in range(10):
        optimizer.zero_grad()
        sum(forward(model).values()).backward()
        optimizer.step()
    forward(model)
    log_variance = -math.log(model.weights.factors()["a"])
    assert abs(log_variance) == pytest.approx(LOG_VARIANCE_LIMIT)
    model.model.losses["a"] = 1.0
    for _ in range(60):
        optimizer.zero_grad()
        sum(forward(model).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert abs(math.log(model.weights.factors()["a"])) < 4


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_log_variances_have_no_weight_decay(tiny_cfg, kind):
    tiny_cfg.merge_from_list(["SOLVER.OPTIMIZER", kind, "SOLVER.WEIGHT_DECAY", 0.3])
    model = weighted("uncertainty")
    decay = {p: g["weight_decay"] for g in make_optimizer(tiny_cfg, model).param_groups for p in g["params"]}
    assert {decay[p] for p in model.weights.parameters()} == {0.0}
    assert decay[model.model.scale] == 0.3


def test_a_source_that_is_not_drawn_gets_no_gradient():
    """Zeros would let momentum move its log-variance."""
    model = weighted("uncertainty")
    sum(forward(model, "a").values()).backward()
    grads = {name: p.grad for name, p in model.weights.named_parameters()}
    assert grads["sources.b.log_variance"] is None
    assert grads["sources.a.log_variance"] is not None


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_one_branch_after_another_are_weighed_alike(make_model, make_batches, method):
    """Over two windows, so that DWA's weights differ as well: losses, and what the weights know after each step."""
    found = []
    for by_branch in (False, True):
        torch.manual_seed(0)
        own = make_model("XLEARNER.SHARING", "detached", without=("boxes",))
        model = weigh_losses(own, method, {"pics": 1.0, "areas": 0.5}, temperature=2.0, window=1)
        batches = make_batches("pics", "areas")
        for _ in range(3):
            with EventStorage():
                parts = model.losses_by_branch(batches) if by_branch else [model(batches)]
                losses = {name: loss for part in parts for name, loss in part.items()}
            found.append(({name: loss.item() for name, loss in losses.items()}, model.weights.factors()))
    assert found[:3] == found[3:]


def run_dwa(model, losses):
    """Factors in each step; ``losses`` of a and b, step by step."""
    found = []
    for a, b in losses:
        model.model.losses = {"a": a, "b": b}
        losses_now = forward(model)
        sum(losses_now.values()).backward()
        found.append((float(losses_now["a/loss_x"]) / (2 / 3 * a), float(losses_now["b/loss_x"]) / (0.5 * b)))
    return found


#: Windows of two steps. Their means are (4, 8), (2, 8), (1.5, 2): ratios (1/2, 1), then (3/4, 1/4).
DWA_LOSSES = [(3, 7), (5, 9), (2, 8), (2, 8), (1, 3), (2, 1), (1, 1), (1, 1)]
DWA_FACTORS = [
    *[(1.0, 1.0)] * 4,
    *[tuple(2 * math.exp(r / 2) / (math.exp(0.25) + math.exp(0.5)) for r in (0.5, 1))] * 2,
    *[tuple(2 * math.exp(r / 2) / (math.exp(0.375) + math.exp(0.125)) for r in (0.75, 0.25))] * 2,
]


def test_dwa_by_hand():
    for found, expected in zip(run_dwa(weighted("dwa"), DWA_LOSSES), DWA_FACTORS, strict=True):
        assert found == pytest.approx(expected)


def test_dwa_of_alternating_steps_averages_over_a_sources_own():
    model = weighted("dwa", window=4)
    for a, b in DWA_LOSSES[:4]:
        model.model.losses = {"a": a, "b": b}
        forward(model, "a")
        forward(model, "b")
    assert tuple(model.weights.factors().values()) == pytest.approx(DWA_FACTORS[4])


@pytest.mark.parametrize("stop", range(1, 8))
def test_dwa_goes_on_exactly_from_its_state(stop):
    first, second = weighted("dwa"), weighted("dwa")
    run_dwa(first, DWA_LOSSES[:stop])
    second.weights.load_state_dict(first.weights.state_dict())
    assert run_dwa(second, DWA_LOSSES[stop:]) == run_dwa(first, DWA_LOSSES[stop:])


def test_dwa_leaves_out_what_is_not_finite():
    model = weighted("dwa")
    run_dwa(model, [(3, 7), (float("nan"), 9), (2, 8), (2, 8)])  # means of a: 3, 2
    ratios = {"a": 2 / 3, "b": 1.0}
    total = sum(math.exp(r / 2) for r in ratios.values())
    assert model.weights.factors() == pytest.approx({k: 2 * math.exp(r / 2) / total for k, r in ratios.items()})


@pytest.mark.parametrize("method", METHODS)
def test_weights_in_use_are_the_factors_times_loss_weight(method):
    assert current_weights(weighted(method)) == {"a": 1.0, "b": 0.5}
    assert current_weights(Given()) == {}


def test_mixed_precision_keeps_the_weights_in_float32():
    model = weighted("uncertainty")
    assert isinstance(model, WeightedLosses)
    with torch.autocast("cpu", torch.bfloat16):
        found = forward(model)
    assert {value.dtype for value in found.values()} == {torch.float32}
