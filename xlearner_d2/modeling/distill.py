"""The squeeze loss: hints from every branch, at several stages, to one plain network.

Not known from the paper; the loss, the normalisation and the projectors are our choice (docs/RESULTS.md has the
measurements). Everything here but the student is used in training only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from .branches import Branch
from .expanded import STAGES
from .normalisers import NORMALISERS, Normaliser
from .small_maps import multiply_small_maps
from .xlearner import ImageGroup, SourceBatches, XLearner, autocast

Features = Mapping[str, Tensor]


def _cosine(hint: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(hint, target, dim=1).mean()


#: name -> distance of a projected student feature and a normalised teacher feature, both (N, C, H, W) -> scalar
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine_smooth_l1": lambda hint, target: 0.5 * (_cosine(hint, target) + F.smooth_l1_loss(hint, target)),
    "mse": F.mse_loss,
    "cosine": _cosine,
    "smooth_l1": F.smooth_l1_loss,
}


def _projector(in_channels: int, out_channels: int, *, num_layers: int) -> nn.Module:
    """1x1 convolutions from a student's feature to a branch's; all but the last with BN and ReLU."""
    last = nn.Conv2d(in_channels if num_layers == 1 else out_channels, out_channels, kernel_size=1)
    hidden = [
        Conv2d(
            in_channels if index == 0 else out_channels,
            out_channels,
            kernel_size=1,
            bias=False,
            norm=get_norm("BN", out_channels),
            activation=F.relu,
        )
        for index in range(num_layers - 1)
    ]
    return nn.Sequential(*hidden, last) if hidden else last


class Distiller(nn.Module):
    """Trains the student to predict every branch's features, for the images of every source; no label is needed.

    The teacher belongs to the caller: it is in no state dict of this module, gets no gradient, and its statistics
    stay as they are even while it is being trained itself.

    Args:
        student: the plain network that will be exported.
        teacher: the expanded model.
        stage_weights: by stage of the student, the weight of its hints.
        teacher_stages: by stage of the student, the stage of the branches that gives it hints, averaged over positions
            to the student's stride; the same one where none is named.
        normaliser: a key of ``NORMALISERS``.
        distance: a key of ``DISTANCES``.
        projector_layers: 1x1 convolutions between a student's and a branch's feature, with BN and ReLU between them.
        hint_weight: factor on all hints, against the task losses.
        task_weights: by task, a factor on the hints of its branch; 1 for those that are not named. A branch whose hints
            have no weight is not asked for any.
        own_images: a branch gives hints for the images of its own task's sources alone, not for all.
        learner: a model whose one trunk is the student, with heads that learn from the sources' labels as well; None
            leaves labels out.
        autocast_dtype: precision of the steps; None leaves it to whoever runs them.
    """

    def __init__(
        self,
        *,
        student: Branch,
        teacher: XLearner,
        stage_weights: Mapping[str, float],
        teacher_stages: Mapping[str, str] | None = None,
        normaliser: str = "standardise",
        distance: str = "mse",
        projector_layers: int = 1,
        hint_weight: float = 1.0,
        task_weights: Mapping[str, float] | None = None,
        own_images: bool = False,
        learner: XLearner | None = None,
        autocast_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.student = student
        self.heads = nn.ModuleDict() if learner is None else learner.heads
        self._learner = (learner,)
        self._teacher = (teacher,)  # a tuple hides it from nn.Module's registration
        factors = {task: hint_weight * (task_weights or {}).get(task, 1.0) for task in teacher.backbone.tasks}
        self.task_weights = {task: factor for task, factor in factors.items() if factor}
        self.own_images = own_images
        self.autocast_dtype = autocast_dtype
        self.projector_layers = projector_layers
        self.stage_weights = dict(stage_weights)
        self.teacher_stages = {stage: (teacher_stages or {}).get(stage, stage) for stage in stage_weights}
        self.distance = DISTANCES[distance]
        shapes = {task: teacher.backbone.output_shape(task) for task in self.task_weights}
        self.projectors = self._per_hint(shapes, self._projector)
        self.normalisers = self._per_hint(shapes, lambda stage, shape: NORMALISERS[normaliser](shape.channels))
        multiply_small_maps(self)
        self.to(teacher.device)
        self.to(memory_format=teacher.backbone.memory_format)

    def _per_hint(
        self, shapes: Mapping[str, Mapping[str, ShapeSpec]], make: Callable[[str, ShapeSpec], nn.Module]
    ) -> nn.ModuleDict:
        """One module per task and stage of the student for which the task's branch has what gives hints."""
        pairs = self.teacher_stages.items()
        return nn.ModuleDict(
            {
                task: nn.ModuleDict({stage: make(stage, of[giver]) for stage, giver in pairs if giver in of})
                for task, of in shapes.items()
            }
        )

    def _projector(self, stage: str, shape: ShapeSpec) -> nn.Module:
        own = self.student.output_shape()[stage]
        if own.stride % shape.stride:
            giver = f"a branch's {self.teacher_stages[stage]} {shape.stride}"
            raise ValueError(f"XLEARNER.SQUEEZE: the student's {stage} has stride {own.stride}, but {giver}.")
        return _projector(own.channels, shape.channels, num_layers=self.projector_layers)

    @property
    def learner(self) -> XLearner | None:
        return self._learner[0]

    @property
    def teacher(self) -> XLearner:
        return self._teacher[0]

    def forward(self, batches: SourceBatches) -> dict[str, Tensor]:
        """``{"loss_hint_<task>": scalar}``, averaged over the step's images, and in training the task heads' losses."""
        batches = self.teacher.with_images_here(batches)
        with autocast(self.teacher.device, self.autocast_dtype):
            hints: dict[str, list[Tensor]] = {task: [] for task in self.projectors}
            task_losses: dict[str, Tensor] = {}
            # Together, because the student's batch statistics should be those of the mix it will be used on.
            groups = self.teacher.image_groups(batches, together=True)
            total = sum(len(group.images) for group in groups)
            for group in groups:
                features = self.student(group.images.contiguous(memory_format=self.teacher.backbone.memory_format))
                for task, own, targets in self._matched(group, features):
                    share = len(next(iter(own.values()))) / total
                    hints[task] += self._hint_losses(task, own, targets, weight=self.task_weights[task] * share)
                if self.learner is not None and self.training:
                    task_losses |= self.learner.head_losses(batches, group, features)
            losses = {f"loss_hint_{task}": self._total(parts) for task, parts in hints.items()}
            ordered = {name: task_losses[name] for source in batches for name in task_losses if _of(name, source)}
            return losses | ordered

    def _matched(self, group: ImageGroup, features: Features) -> list[tuple[str, Features, Features]]:
        """Tasks, the student's features of the images that the branch of each gives hints for, and the branch's."""
        backbone, deepest = self.teacher.backbone, max(self.teacher_stages.values(), default=STAGES[0])
        with torch.no_grad():
            if not self.own_images:
                targets_of = backbone.forward_all(group.images, self.task_weights, deepest=deepest)
                return [(task, features, targets) for task, targets in targets_of.items()]
            every = [(self.teacher.task_of[source], rows) for source, rows in group.rows.items()]
            parts = [(task, rows) for task, rows in every if task in self.task_weights]
            targets = [backbone.forward_all(group.images[rows], [task], deepest=deepest)[task] for task, rows in parts]
        own = [{stage: feature[rows] for stage, feature in features.items()} for _, rows in parts]
        return [(task, mine, theirs) for (task, _), mine, theirs in zip(parts, own, targets, strict=True)]

    def _hint_losses(self, task: str, features: Features, targets: Features, *, weight: float) -> list[Tensor]:
        """By stage, the mean over the images of the distance to one branch's features, times the weights."""
        losses = []
        normalisers = cast(nn.ModuleDict, self.normalisers[task])
        for stage, projector in cast(nn.ModuleDict, self.projectors[task]).items():
            target = targets[self.teacher_stages[stage]].float()
            height, width = features[stage].shape[2:]
            if target.shape[2:] != (height, width):
                target = F.adaptive_avg_pool2d(target, (height, width))
            normaliser = cast(Normaliser, normalisers[stage])
            if self.training:
                normaliser.update(target)
            hint = projector(features[stage]).float()
            losses.append(weight * self.stage_weights[stage] * self.distance(hint, normaliser(target)))
        return losses

    def _total(self, losses: Sequence[Tensor]) -> Tensor:
        """Their sum; zero where there are none."""
        return sum(losses[1:], start=losses[0]) if losses else torch.zeros((), device=self.teacher.device)


def _of(name: str, source: str) -> bool:
    return name.startswith(f"{source}/")


def matched_stages(stages: Sequence[str], weights: Sequence[float]) -> dict[str, float]:
    """Weights by stage, without the stages of weight zero."""
    return {stage: weight for stage, weight in zip(stages, weights, strict=True) if weight}
