"""Fused optimisers and joint clipping against the plain ones of torch and Detectron2."""

import copy
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from xlearner_d2 import add_xlearner_config
from xlearner_d2.engine.optimizer import (
    clip_each_norm,
    clip_each_value,
    clip_joint_norm,
    make_optimizer,
    make_schedule,
)
from xlearner_d2.specs import ConfigError


def config(*opts: Any) -> CfgNode:
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.merge_from_list(["SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.WEIGHT_DECAY_NORM", 0.01, *opts])
    return cfg


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
    return (model(images) ** 2).mean() * 10**step  # gradients below and above the limit


def reference(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """As Detectron2 builds it: one parameter after the other, each clipped by itself."""
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )
    plain: dict[str, Any] = {"lr": cfg.SOLVER.BASE_LR, "foreach": False, "fused": False}
    if cfg.SOLVER.OPTIMIZER == "SGD":
        kind = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
        return kind(groups, momentum=cfg.SOLVER.MOMENTUM, nesterov=cfg.SOLVER.NESTEROV, **plain)
    return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(groups, **plain)


CLIPPING = [
    ["SOLVER.CLIP_GRADIENTS.ENABLED", False],
    ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"],
    ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"],
    [
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm"),
        *("SOLVER.CLIP_GRADIENTS.NORM_TYPE", float("inf"), "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.1),
    ],
]

FULL_MODEL = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]


@pytest.mark.parametrize("kind", [["SGD"], ["SGD", "SOLVER.NESTEROV", True, "SOLVER.BIAS_LR_FACTOR", 2.0], ["AdamW"]])
@pytest.mark.parametrize("clipping", CLIPPING)
def test_steps_are_those_of_detectron2(kind: list[Any], clipping: list[Any]) -> None:
    """Both get the same gradients: of losses as large as these, one's own would soon differ by more than rounding."""
    cfg = config("SOLVER.OPTIMIZER", *kind, *clipping)
    model = network()
    plain = copy.deepcopy(model)
    ours, theirs = make_optimizer(cfg, model), reference(cfg, plain)
    for step in range(4):
        theirs.zero_grad()
        loss_of(plain, step).backward()
        for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert other.grad is not None
            mine.grad = other.grad.clone()
        ours.step()
        theirs.step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
@pytest.mark.parametrize("clipping", [*CLIPPING, FULL_MODEL])
def test_a_loss_scaler_changes_nothing(kind: str, clipping: list[Any]) -> None:
    """Fused optimisers get scaled gradients, so the limit has to be scaled as well."""
    cfg = config("SOLVER.OPTIMIZER", kind, *clipping)
    model = network()
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours, theirs = make_optimizer(cfg, model), make_optimizer(cfg, plain)
    for step in range(3):
        ours.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        scaler.step(ours)
        scaler.update()
        theirs.zero_grad()
        loss_of(plain, step).backward()
        theirs.step()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clipping", [CLIPPING[2], FULL_MODEL])
def test_a_scaler_skips_a_step_with_infinite_gradients(clipping: list[Any]) -> None:
    cfg = config("SOLVER.OPTIMIZER", "AdamW", *clipping)
    model = network()
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = make_optimizer(cfg, model)
    scaler.scale(loss_of(model, 0) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert scaler.get_scale() == 512.0


def test_clipping_limits_each_gradient_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [factor * torch.randn(50, generator=generator) for factor in (0.01, 1.0, 100.0)]
    before = [gradient.clone() for gradient in gradients]
    clip_each_norm(gradients, 2.0)
    assert torch.equal(gradients[0], before[0])
    for gradient, old in zip(gradients[1:], before[1:], strict=True):
        assert gradient.norm().item() == pytest.approx(2.0, rel=1e-5)
        torch.testing.assert_close(gradient / gradient.norm(), old / old.norm())
    clip_each_value(gradients, 0.1)
    assert max(gradient.abs().max().item() for gradient in gradients) == pytest.approx(0.1)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_joint_clipping_is_that_of_torch(norm_type: float, limit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 40, 7)]
    for factor, parameter in zip((0.01, 1.0, 100.0), parameters, strict=True):
        parameter.grad = factor * torch.randn(parameter.shape, generator=generator)
    gradients = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    torch.nn.utils.clip_grad_norm_(parameters, limit, norm_type=norm_type)
    clip_joint_norm(gradients, limit, norm_type=norm_type)
    for mine, parameter in zip(gradients, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_the_config_asks_for_joint_clipping() -> None:
    """Gradients of one norm each: together they are limited to the norm that each alone would be."""
    cfg = config("SOLVER.OPTIMIZER", "SGD", *FULL_MODEL, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1.0)
    model = network()
    optimizer = make_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    optimizer.step()
    joint = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert joint.item() == pytest.approx(1.0, rel=1e-5)


def test_frozen_parameters_and_parameters_without_gradient_stay() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(config("SOLVER.OPTIMIZER", "AdamW", *CLIPPING[2]), model)
    optimizer.step()  # before any backward pass
    model[3](torch.randn(2, 4 * 36)).sum().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"3.weight", "3.bias"}


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_what_is_loaded_goes_on_with_the_settings_of_now(kind: str) -> None:
    """With ten times the rate, the rest of the schedule is ten times that of a run that was left alone."""
    before = ["SOLVER.OPTIMIZER", kind, "SOLVER.MAX_ITER", 8, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
    after = ["SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.02, "SOLVER.MOMENTUM", 0.5]
    model = network()
    runs = {}
    for name, opts in {"alone": before, "resumed": before, "changed": [*before, *after]}.items():
        optimizer = make_optimizer(config(*opts), model)
        runs[name] = optimizer, make_schedule(config(*opts), optimizer)
    optimizer, schedule = runs["alone"]
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((schedule.state_dict(), optimizer.state_dict()))
            for other, its in (runs["resumed"], runs["changed"]):
                its.load_state_dict(saved[0])
                other.load_state_dict(saved[1])
        if step >= 3:
            rates = {name: [group["lr"] for group in of.param_groups] for name, (of, _) in runs.items()}
            assert rates["resumed"] == rates["alone"]
            assert rates["changed"] == pytest.approx([10 * rate for rate in rates["alone"]])
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        for of, its in runs.values() if step >= 3 else [runs["alone"]]:
            of.step()
            its.step()
    (resumed, _), (changed, _) = runs["resumed"], runs["changed"]
    assert [group["weight_decay"] for group in resumed.param_groups] == [0.05, 0.01]
    assert [group["weight_decay"] for group in changed.param_groups] == [0.02, 0.01]
    assert [group.get("momentum") for group in changed.param_groups] == [0.5 if kind == "SGD" else None] * 2


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_of_heads_that_take_turns_is_that_of_torch(nesterov: bool) -> None:
    """A trunk learns in every step, each of two heads in every other one."""
    cfg = config("SOLVER.OPTIMIZER", "SGD", "SOLVER.NESTEROV", nesterov)
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)])
    plain = copy.deepcopy(model)
    ours, theirs = make_optimizer(cfg, model), reference(cfg, plain)
    for step in range(4):
        images = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        for layers, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad(set_to_none=True)
            trunk, head = layers[0], layers[1 + step % 2]
            (head(trunk(images)) ** 2).sum().backward()
            optimizer.step()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, other)


def test_a_first_step_that_a_loss_scaler_skips_leaves_no_momentum() -> None:
    cfg = config("SOLVER.OPTIMIZER", "SGD", "SOLVER.CLIP_GRADIENTS.ENABLED", False)
    model = nn.Linear(4, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer, scaler = make_optimizer(cfg, model), torch.amp.GradScaler("cpu", init_scale=1e30)
    torch.use_deterministic_algorithms(True)  # which fills memory that is not set with NaN
    try:
        scaler.scale(model(torch.full((1, 4), 1e20)).sum()).backward()
        scaler.step(optimizer)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not optimizer.state[p]["momentum_buffer"].any() for p in model.parameters())


def test_decays_that_put_other_parameters_together_are_refused() -> None:
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM = 0.05, 0.0
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    saved = make_optimizer(cfg, model).state_dict()
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    with pytest.raises(ConfigError, match=r"make groups of \[4\] parameters, but the checkpoint has \[2, 2\]: a run"):
        make_optimizer(cfg, model).load_state_dict(saved)
