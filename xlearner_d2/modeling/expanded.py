"""The expanded backbone: one branch per task, joined by reconciliation layers, and views of its branches."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ..specs import ConfigError, TaskSpec
from .branches import Branch, branch_config, build_branch, compile_stages
from .norm_statistics import Statistics, copied_statistics, inference_mode_norm
from .reconciliation import Features, Reconciliation
from .timm_backbone import STAGES as STAGES

#: Name of the one branch of SHARING "shared".
TRUNK = "trunk"


def _truncate(branch: Branch, deepest: str) -> None:
    """Drop the stages after ``deepest``."""
    for name in branch.stage_names:
        if name > deepest:
            delattr(branch, name)
    branch.stage_names = tuple(name for name in branch.stage_names if name <= deepest)
    branch.stages = branch.stages[: len(branch.stage_names)]
    branch._out_features = [name for name in branch._out_features if name <= deepest]


@dataclass(frozen=True)
class _Given:
    """Features that were computed for these images already."""

    images: Tensor
    features: dict[str, Tensor]
    trusted: bool

    def fit(self, images: Tensor) -> bool:
        # Values are compared where they must be: on a GPU, the processor waits for the answer.
        return images.shape == self.images.shape and (self.trusted or torch.equal(images, self.images))


class ExpandedBackbone(nn.Module):
    """Branches by task, and what each receives from the others.

    For images of task ``t``, each other branch computes its own, un-reconciled stages as deep as some layer reads
    them, with its running BN statistics. Branch ``t`` computes its stages one by one and adds to each the reconciled
    features of the others.

    Args:
        branches: one plain network per branch.
        branch_of: the branch of each task; several tasks may name one branch (SHARING "shared").
        reconciliation: layers into a branch, by branch name; a branch without an entry receives nothing.
        detach: the others compute without gradient (SHARING "detached"), so a source's loss moves its own branch only.
        channels_last: memory format of the images given to the branches.
    """

    def __init__(
        self,
        *,
        branches: Mapping[str, Branch],
        branch_of: Mapping[str, str],
        reconciliation: Mapping[str, Reconciliation],
        detach: bool = True,
        channels_last: bool = True,
    ):
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.reconciliation = nn.ModuleDict(reconciliation)
        self.branch_of = dict(branch_of)
        self.detach = detach
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)
        self._given: _Given | None = None
        self._statistics: dict[str, Statistics] = {}

    @property
    def sends_without_gradient(self) -> bool:
        """Whether branches receive features that carry no gradient, so that one pass can serve several of them."""
        return self.detach and len(self.reconciliation) > 0

    @property
    def learn_apart(self) -> bool:
        """Whether no loss reaches more than one branch, so that each can learn by itself."""
        return self.detach or len(self.reconciliation) == 0

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.branch_of)

    def branch(self, name: str) -> Branch:
        """The branch of that name."""
        return self.branches[name]

    def incoming(self, name: str) -> Reconciliation | None:
        """The layers that lead into a branch, if any do."""
        return cast(Reconciliation, self.reconciliation[name]) if name in self.reconciliation else None

    def output_shape(self, task: str) -> dict[str, ShapeSpec]:
        """Channels and stride of each stage that the task's branch offers."""
        return self.branch(self.branch_of[task]).output_shape()

    def forward(self, images: Tensor, task: str) -> dict[str, Tensor]:
        """Features of normalised images (N, 3, H, W) from the task's branch, by stage, stride as in output_shape."""
        if self._given is not None and self._given.fit(images):
            return self._given.features
        return self.forward_received(images, task, *self.received([(images, task)]))

    def forward_received(self, images: Tensor, task: str, received: Mapping[str, Features]) -> dict[str, Tensor]:
        """The same, given what the branch receives for these images: see :meth:`received`."""
        return self._main(self.branch_of[task], images.contiguous(memory_format=self.memory_format), received)

    def received(self, groups: Sequence[tuple[Tensor, str]]) -> list[dict[str, Features]]:
        """What the branches of several groups of images, each with its task, receive from the others: by branch.

        What is sent without gradient is computed in one pass for all images of one size: with running BN statistics,
        each image's features are the same in any company. These are the statistics as the step found them.
        """
        names = [self.branch_of[task] for _, task in groups]
        images = [of.contiguous(memory_format=self.memory_format) for of, _ in groups]
        if not self.detach:
            return [self._auxiliary(of, self._sources_of(name)) for name, of in zip(names, images, strict=True)]
        readers: dict[tuple[str, str, torch.Size], list[int]] = {}
        for reader, (name, of) in enumerate(zip(names, images, strict=True)):
            for source, deepest in self._sources_of(name).items():
                readers.setdefault((source, deepest, of.shape[1:]), []).append(reader)
        received: list[dict[str, Features]] = [{} for _ in names]
        for (source, deepest, _), of_source in readers.items():
            given = [images[reader] for reader in of_source]
            joined = torch.cat(given) if len(given) > 1 else given[0]
            sent = self._auxiliary(joined, {source: deepest})[source]
            parts = {stage: features.split([len(of) for of in given]) for stage, features in sent.items()}
            for number, reader in enumerate(of_source):
                read = self._reads(names[reader])[source]
                received[reader][source] = {stage: of[number] for stage, of in parts.items() if stage in read}
        return received

    def forward_all(
        self, images: Tensor, tasks: Iterable[str] | None = None, *, deepest: str = STAGES[-1]
    ) -> dict[str, dict[str, Tensor]]:
        """Features of the same images from the branches of these tasks, or of all, with running BN statistics.

        What the branches send is computed once, and so is each branch's first stage, as nothing is received before it.

        Args:
            deepest: no stage after it is computed.
        """
        images = images.contiguous(memory_format=self.memory_format)
        asked = {task: self.branch_of[task] for task in (self.tasks if tasks is None else tasks)}
        names = tuple(dict.fromkeys(asked.values()))
        needed: dict[str, str] = {}
        for name in names:
            for source, read in self._sources_of(name).items():
                needed[source] = max(read, needed.get(source, read))
        with inference_mode_norm(self):
            aux = self._auxiliary(images, needed)
            features = {name: self._main(name, images, aux, deepest) for name in names}
        return {task: features[name] for task, name in asked.items()}

    @contextmanager
    def given(self, images: Tensor, features: dict[str, Tensor], *, trusted: bool = False) -> Iterator[None]:
        """Answer with these features of ``images``, as they were computed for several sources at once.

        Those of other images are computed: a head may change what it is given, as mixup does.

        Args:
            trusted: images of the same shape are taken to be the same, without a look at their values.
        """
        self._given = _Given(images, features, trusted)
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def sending_as_now(self) -> Iterator[None]:
        """Branches send with the running statistics that they have now, whatever passes in training make of these."""
        if self.reconciliation:
            self._statistics = {name: copied_statistics(self.branch(name)) for name in self.branches}
        try:
            yield
        finally:
            self._statistics = {}

    def only(self, task: str, *, deepest: str) -> "ExpandedBackbone":
        """Drop what a task's stages up to ``deepest`` do not need, and the gradient of what only informs them."""
        own = self.branch_of[task]
        self.branch_of = {task: own}
        self.reconciliation = nn.ModuleDict({n: r for n, r in self.reconciliation.items() if n == own})
        reconcile = self.incoming(own)
        if reconcile is not None:
            reconcile.truncate(deepest)
        needed = {**self._sources_of(own), own: deepest}
        self.branches = nn.ModuleDict({name: branch for name, branch in self.branches.items() if name in needed})
        for name, branch in self.branches.items():
            _truncate(branch, needed[name])
            if self.detach and name != own:
                branch.requires_grad_(False)
        return self

    def _sources_of(self, name: str) -> dict[str, str]:
        """Auxiliary branches of one branch, and the deepest of their stages that is read."""
        return {source: max(stages) for source, stages in self._reads(name).items()}

    def _reads(self, name: str) -> dict[str, tuple[str, ...]]:
        """Auxiliary branches of one branch, and their stages that are read."""
        reconcile = self.incoming(name)
        return {} if reconcile is None else reconcile.reads()

    def _auxiliary(self, images: Tensor, deepest: Mapping[str, str]) -> dict[str, Features]:
        """Un-reconciled features of the auxiliary branches, by branch and stage."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            return {name: self._plain(name, images, stage) for name, stage in deepest.items()}

    def _plain(self, name: str, images: Tensor, deepest: str) -> Features:
        branch = self.branch(name)
        features: dict[str, Tensor] = {}
        with inference_mode_norm(branch, self._statistics.get(name)):
            x = branch.stem(images)
            for stage in branch.stage_names:
                if stage > deepest:
                    break
                features[stage] = x = getattr(branch, stage)(x)
        return features

    def _main(
        self, name: str, images: Tensor, aux: Mapping[str, Features], deepest: str = STAGES[-1]
    ) -> dict[str, Tensor]:
        branch = self.branch(name)
        reconcile = self.incoming(name)
        if reconcile is None and deepest >= branch.stage_names[-1]:
            return branch(images)
        outputs: dict[str, Tensor] = {}
        first = branch.stage_names[0]
        x = aux[name][first] if name in aux else getattr(branch, first)(branch.stem(images))
        for stage in (name for name in branch.stage_names if name <= deepest):
            x = x if stage == first else getattr(branch, stage)(x)
            x = x if reconcile is None else reconcile(x, stage, aux)
            if stage in branch._out_features:
                outputs[stage] = x
        return outputs


class BranchView(Backbone):
    """One task's branch, seen as a Detectron2 backbone by a source's head.

    It does not own the branch: a head that holds a view has no parameters of the branch, so each tensor is in the
    model's state dict, its optimiser and its gradient all-reduce once.

    Args:
        backbone: owner of the branch.
        task: whose branch.
        out_features: stages that the head reads.
    """

    def __init__(self, *, backbone: ExpandedBackbone, task: str, out_features: Sequence[str]):
        super().__init__()
        shapes = backbone.output_shape(task)
        missing = [name for name in out_features if name not in shapes]
        if missing:
            raise ValueError(f"The branch of task {task!r} has no {missing}; it has {list(shapes)}.")
        self._owner = (backbone,)  # a tuple hides it from nn.Module's registration
        self.task = task
        self._out_features = list(out_features)
        self._out_feature_channels = {name: shapes[name].channels for name in out_features}
        self._out_feature_strides = {name: shapes[name].stride for name in out_features}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Features of normalised images (N, 3, H, W), by stage."""
        features = self._owner[0](x, self.task)
        return {name: features[name] for name in self._out_features}


def _check_strides(stages: Sequence[str], branches: Mapping[str, Branch]) -> None:
    """Features can be brought to a larger stride, but not to a smaller one, as that of a dilated res5."""
    shapes = {name: branch.output_shape() for name, branch in branches.items()}
    problems = [
        f"{stage} of branch {name!r} has stride {own[stage].stride} and cannot receive {stage} of branch {other!r}, "
        f"which has stride {aux[stage].stride}: take {stage} out of XLEARNER.RECONCILIATION.STAGES."
        for name, own in shapes.items()
        for other, aux in shapes.items()
        for stage in stages
        if stage in own and stage in aux and own[stage].stride < aux[stage].stride
    ]
    if problems:
        raise ConfigError(problems)


def _build_reconciliation(cfg: CfgNode, branches: Mapping[str, Branch]) -> dict[str, Reconciliation]:
    norm = cfg.MODEL.RESNETS.NORM
    _check_strides(cfg.XLEARNER.RECONCILIATION.STAGES, branches)
    return {
        name: Reconciliation(
            shapes=branch.output_shape(),
            aux_shapes={other: aux.output_shape() for other, aux in branches.items() if other != name},
            stages=cfg.XLEARNER.RECONCILIATION.STAGES,
            cross_scale=cfg.XLEARNER.RECONCILIATION.CROSS_SCALE,
            norm="BN" if norm == "FrozenBN" else norm,
        )
        for name, branch in branches.items()
    }


def build_expanded_backbone(cfg: CfgNode, tasks: Sequence[TaskSpec]) -> ExpandedBackbone:
    """Branches for ``tasks``, shared as ``cfg.XLEARNER.SHARING`` says."""
    sharing = cfg.XLEARNER.SHARING
    if sharing == "shared":
        features = sorted({name for task in tasks for name in task.out_features})
        dilation = max(task.res5_dilation for task in tasks)
        branches = {TRUNK: build_branch(cfg, out_features=features, res5_dilation=dilation)}
        branch_of = {task.name: TRUNK for task in tasks}
    else:
        branches = {
            task.name: build_branch(
                branch_config(cfg, task.name), out_features=task.out_features, res5_dilation=task.res5_dilation
            )
            for task in tasks
        }
        branch_of = {task.name: task.name for task in tasks}
    if cfg.XLEARNER.COMPILE:
        for branch in branches.values():
            compile_stages(branch, backend=cfg.XLEARNER.COMPILE)
    exchanging = sharing in ("detached", "bidirectional") and len(branches) > 1
    return ExpandedBackbone(
        branches=branches,
        branch_of=branch_of,
        reconciliation=_build_reconciliation(cfg, branches) if exchanging else {},
        detach=sharing == "detached",
        channels_last=cfg.XLEARNER.CHANNELS_LAST,
    )
