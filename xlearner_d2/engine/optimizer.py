"""The optimiser of either stage: SGD or AdamW with Detectron2's parameter groups and clipping, in few passes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler, get_default_optimizer_params
from detectron2.solver.lr_scheduler import LRMultiplier
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor, nn

from ..specs import ConfigError

OPTIMIZERS = ("SGD", "AdamW")
#: What ``SOLVER.CLIP_GRADIENTS`` may limit: each number, the norm of each parameter's gradient, that of all together.
CLIP_TYPES = ("value", "norm", "full_model")
#: By a parameter's own name: what holds for it instead. Decay would draw the weights of losses towards their start.
OVERRIDES = {"log_variance": {"weight_decay": 0.0}}


class AdamW(torch.optim.AdamW):
    """PyTorch's, whose fused step on CPUs copies every tensor that is channels last in memory, there and back."""

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        found = super()._init_group(group, *lists)
        parameters, gradients, averages, squares, *_ = lists
        for index, parameter in enumerate(parameters):
            if parameter.device.type == "cpu" and not parameter.is_contiguous() and _is_channels_last(parameter):
                for tensors in (parameters, gradients, averages, squares):
                    tensors[index] = tensors[index].permute(0, 2, 3, 1)  # the same numbers, contiguous
        return found


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def make_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that ``cfg.SOLVER.OPTIMIZER`` names, with the other keys of ``SOLVER`` as in Detectron2.

    It is fused: all parameters of a group are updated in one pass over memory, on CPUs as well as on GPUs, and a loss
    scaler does not have to wait for the GPU to know whether a gradient is infinite.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides=dict(OVERRIDES),  # Detectron2 adds to what it is given
    )
    optimizer: torch.optim.Optimizer
    if solver.OPTIMIZER == "SGD":
        momentum, nesterov = solver.MOMENTUM, solver.NESTEROV
        optimizer = torch.optim.SGD(groups, lr=solver.BASE_LR, momentum=momentum, nesterov=nesterov, fused=True)
        optimizer.register_step_pre_hook(_start_momentum)
    else:
        optimizer = AdamW(groups, lr=solver.BASE_LR, fused=True)
    optimizer.register_load_state_dict_pre_hook(_with_own_settings)
    if solver.CLIP_GRADIENTS.ENABLED:
        optimizer.register_step_pre_hook(_clipping(solver.CLIP_GRADIENTS))
    return optimizer


@torch.no_grad()
def _start_momentum(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Zeros, from which the first step is that of PyTorch.

    PyTorch's fused step fails where some parameters had a gradient before and others did not, and keeps what memory
    happens to hold where a loss scaler finds an infinite gradient in the first one.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _with_own_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint has of each parameter, with the settings of now: decays may be changed before a run goes on.

    Raises:
        ConfigError: where they are changed so that other parameters have the same.
    """
    own = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    saved = state["param_groups"]
    sizes, before = ([len(group["params"]) for group in groups] for groups in (optimizer.param_groups, saved))
    if sizes != before:
        wish = "a run goes on with other values of these, but not with equal ones for what differed, or the reverse"
        text = f"SOLVER.WEIGHT_DECAY, WEIGHT_DECAY_NORM and WEIGHT_DECAY_BIAS make groups of {sizes} parameters, but "
        raise ConfigError([f"{text}the checkpoint has {before}: {wish}."], what="The run")
    return {**state, "param_groups": [{**of, **(own[k] if k < len(own) else {})} for k, of in enumerate(saved)]}


class Schedule(LRMultiplier):
    """Detectron2's, of which a checkpoint has the step alone: a run goes on at the rate that its config has now.

    It is to be loaded before its optimiser, which keeps the rates that it has then.
    """

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


def make_multiplier(cfg: CfgNode) -> ParamScheduler:
    """What ``SOLVER`` multiplies learning rates by in the course of a stage."""
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    return build_lr_scheduler(cfg, unused)._multiplier  # Detectron2 does not give it otherwise


def make_schedule(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Schedule:
    """The schedule of an optimiser's learning rates that ``SOLVER`` describes."""
    return Schedule(optimizer, make_multiplier(cfg), cfg.SOLVER.MAX_ITER)


def _clipping(options: CfgNode) -> Callable[[torch.optim.Optimizer, Any, Any], None]:
    """What ``maybe_add_gradient_clipping`` of Detectron2 does before each step, for all parameters at once.

    Detectron2's projects add ``full_model`` in their training scripts, as :func:`torch.nn.utils.clip_grad_norm_`.
    """
    limit, norm_type = options.CLIP_VALUE, options.NORM_TYPE

    def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Under a loss scaler, a fused optimiser gets the gradients as they are, and divides them itself.
        scale = getattr(optimizer, "grad_scale", None)
        if options.CLIP_TYPE == "value":
            clip_each_value(gradients, limit, scale=scale)
        elif options.CLIP_TYPE == "norm":
            clip_each_norm(gradients, limit, norm_type=norm_type, scale=scale)
        else:
            clip_joint_norm(gradients, limit, norm_type=norm_type, scale=scale)

    return clip


@torch.no_grad()
def clip_each_norm(
    gradients: list[Tensor], max_norm: float, *, norm_type: float = 2.0, scale: Tensor | None = None
) -> None:
    """Limit the norm of each parameter's gradient, in place.

    Args:
        scale: scalar; the gradients are to be limited as if they were divided by it.
    """
    if not gradients:
        return
    norms = torch.stack(torch._foreach_norm(gradients, norm_type))
    factors = (max_norm / (norms / (1.0 if scale is None else scale) + 1e-6)).clamp(max=1.0)
    if factors.is_cuda:  # where one does not ask, for the answer is long in coming
        torch._foreach_mul_(gradients, list(factors.unbind()))
        return
    large = [(gradient, factor) for gradient, factor in zip(gradients, factors.tolist(), strict=True) if factor < 1.0]
    for gradient, factor in large:
        gradient.mul_(factor)


@torch.no_grad()
def clip_joint_norm(
    gradients: list[Tensor], max_norm: float, *, norm_type: float = 2.0, scale: Tensor | None = None
) -> None:
    """Limit the norm of all gradients together, in place; ``scale`` as in :func:`clip_each_norm`."""
    if not gradients:
        return
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, norm_type)), norm_type)
    factor = (max_norm / (norm / (1.0 if scale is None else scale) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)


@torch.no_grad()
def clip_each_value(gradients: list[Tensor], max_value: float, *, scale: Tensor | None = None) -> None:
    """Limit the absolute value of each number of a gradient, in place; ``scale`` as in :func:`clip_each_norm`."""
    if not gradients:
        return
    if scale is None:
        torch._foreach_clamp_min_(gradients, -max_value)
        torch._foreach_clamp_max_(gradients, max_value)
        return
    limit = max_value * scale
    for gradient in gradients:
        gradient.clamp_(-limit, limit)
