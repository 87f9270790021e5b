"""A trial of each source before a run: two of its images through its head, to see that they fit and what they keep."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from ..data.mappers import SourceMapper, build_mapper, map_one
from ..modeling import XLearner
from ..specs import ConfigError, SourceSpec
from .plan import Plan

#: Bytes per parameter in training: float32 weight, gradient, and one (SGD) or two (AdamW) running averages.
_BYTES_PER_PARAMETER = {"SGD": 12, "AdamW": 16}
#: Images of a trial; more than one, for BN of features that have shrunk to one pixel.
_NUM_IMAGES = 2


def expected_memory(plan: Plan, model: XLearner) -> dict[str, float]:
    """By stage, GB that weights, gradients, optimiser and what is kept for the backward pass take in one worker's step.

    An upper bound on a GPU with mixed precision, as the trial runs in float32, and in the squeeze, where it has what
    each source keeps in the expansion.

    Raises:
        ConfigError: with every source whose images its head cannot learn from.
    """
    problems: list[str] = []
    kept: dict[str, float] = {}
    received: dict[str, float] = {}
    learning: set[Tensor] = set()
    model.train()
    drawn = plan.drawn[plan.stages[0]]
    for source in drawn.sources:
        try:
            images = _images(plan, source)
            found, losses = _kept_bytes(model, source.name, images)
            times = (source.ims_per_batch // plan.world_size) / len(images)
            kept[source.name] = found * times
            received[source.name] = _received_bytes(model, source.name, images) * times
            learning |= _leaves_of(losses)
        except ConfigError as error:
            problems += [f"XLEARNER.SOURCES.{source.name}: {problem}" for problem in error.problems]
        except Exception as error:  # whatever a third party's head raises
            problems.append(f"XLEARNER.SOURCES.{source.name}: a trial step with {source.config} failed: {error!r}")
    several = plan.world_size > 1 and not drawn.turns  # else they are looked for in every step
    if not problems and several:
        heads = tuple(f"heads.{source.name}." for source in drawn.sources)  # of which the student has copies
        expands, copied = plan.stages[0] == "expand", plan.cfg.XLEARNER.SQUEEZE.TASK_LOSSES
        problems = _check_gradients(model, learning, "" if expands else heads) if expands or copied else []
    if problems:
        raise ConfigError(problems)
    together = max(kept.values()) if drawn.turns else sum(kept.values())
    by_branch = together if drawn.turns else _kept_by_branch(model, kept, received)
    return {stage: sum(_step(plan, model, stage, together, by_branch)) / 1e9 for stage in plan.stages}


def _step(plan: Plan, model: XLearner, stage: str, together: float, by_branch: float) -> tuple[float, float]:
    """Bytes of weights and what belongs to them, and bytes that are kept for the backward pass."""
    each = _BYTES_PER_PARAMETER[plan.cfg.SOLVER.OPTIMIZER]
    expansion = sum(p.numel() * (each if p.requires_grad else 4) for p in model.parameters())
    # The student and its heads, about: the largest branch and all heads. Its images go through it together.
    network = max(_num_parameters(branch) for branch in model.backbone.branches.values())
    student = each * (network + _num_parameters(model.heads))
    if stage == "squeeze":
        copies = 2 if "expand" in plan.stages else 1  # the trained model waits for its report
        return copies * 4 * _num_parameters(model) + student, together
    if plan.cfg.XLEARNER.SQUEEZE.ONLINE:
        return expansion + student, max(together, by_branch)
    return expansion, max(together, by_branch) if plan.trunk_steps else by_branch


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _kept_by_branch(model: XLearner, kept: Mapping[str, float], received: Mapping[str, float]) -> float:
    """Bytes kept in a step of all sources: of all, or, where branches learn one after another, of the one with most.

    That one keeps what it has received, and all others' is held until they have learned.
    """
    if not model.backbone.learn_apart:
        return sum(kept.values())
    others = sum(received.values())
    branches: dict[str, float] = {}
    for source, own in kept.items():
        branch = model.backbone.branch_of[model.task_of[source]]
        branches[branch] = branches.get(branch, others) + own - received[source]
    return max(branches.values())


def _check_gradients(model: XLearner, learning: set[Tensor], parts: str | tuple[str, ...]) -> list[str]:
    """Several workers wait for one another's gradients, so that a parameter without one would end the second step.

    Args:
        parts: starts of the names of the parameters that learn.
    """
    trained = {name: value for name, value in model.named_parameters() if name.startswith(parts)}
    idle = [name for name, value in trained.items() if value.requires_grad and value not in learning]
    by_part = {".".join(name.split(".")[:2]): name for name in idle}
    return [
        f"{part}: {name} and perhaps others get no gradient from any loss, which only one worker can train. "
        "Set the head's options so that they are used, or freeze or remove them."
        for part, name in by_part.items()
    ]


def _leaves_of(losses: Iterable[Tensor]) -> set[Tensor]:
    """The tensors that get a gradient from any of these."""
    waiting, seen, found = [loss.grad_fn for loss in losses], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def _images(plan: Plan, source: SourceSpec) -> list[dict[str, Any]]:
    mapper = SourceMapper(source.name, build_mapper(plan.heads[source.name], is_train=True))
    records = plan.data[source.name].train
    return [map_one(mapper, records, number % len(records), seed=number) for number in range(_NUM_IMAGES)]


@torch.no_grad()
def _received_bytes(model: XLearner, source: str, images: list[dict[str, Any]]) -> int:
    """Bytes of the features that a source's branch receives before it learns."""
    if not model.backbone.sends_without_gradient:
        return 0
    with model.autocast():
        (received,) = model.backbone.received([(model.preprocess(source, images), model.task_of[source])])
    return sum(feature.nbytes for features in received.values() for feature in features.values())


def _kept_bytes(model: XLearner, source: str, images: list[dict[str, Any]]) -> tuple[int, list[Tensor]]:
    """Bytes of the distinct tensors that autograd keeps for the backward pass, parameters aside; and the losses."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with EventStorage(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = model({source: images})
        assert isinstance(losses, dict)
        assert losses
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values()), list(losses.values())
