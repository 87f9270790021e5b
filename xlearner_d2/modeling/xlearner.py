"""The meta-architecture: an expanded backbone and one head per source."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from ..specs import ConfigError, SourceSpec, parse_sources
from .expanded import ExpandedBackbone, build_expanded_backbone
from .heads import build_head, derive_tasks, head_config
from .pixels import normalise
from .small_maps import CONVOLUTIONS, multiply_small_maps

#: source name -> what its mapper made of this step's images
SourceBatches = Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class ImageGroup:
    """Images that go through a branch together.

    Attributes:
        images: normalised, (N, 3, H, W) float32.
        rows: by source, which of them are its own.
    """

    images: Tensor
    rows: Mapping[str, slice]

    @classmethod
    def join(cls, images: Mapping[str, Tensor]) -> "ImageGroup":
        """From the images of each source, all of one size."""
        rows, start = {}, 0
        for source, of in images.items():
            rows[source] = slice(start, start + len(of))
            start += len(of)
        return cls(images=torch.cat(list(images.values())), rows=rows)

    def split(self, features: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """By source, its rows of each stage's features; their gradients are joined, not padded with zeros and added."""
        sizes = [rows.stop - rows.start for rows in self.rows.values()]
        parts = {stage: feature.split(sizes) for stage, feature in features.items()}
        return {source: {stage: of[number] for stage, of in parts.items()} for number, source in enumerate(self.rows)}


def _log_scope(name: str) -> AbstractContextManager[Any]:
    """Heads log diagnostics of their own, such as accuracies: under the name of their source."""
    return get_event_storage().name_scope(name) if has_event_storage() else nullcontext()


@META_ARCH_REGISTRY.register()
class XLearner(nn.Module):
    """Train every source's head and branch in one step; each head alone is an ordinary Detectron2 model.

    Args:
        backbone: the branches and their reconciliation layers.
        heads: by source name, a model that holds a view of its task's branch.
        sources: name, task and loss weight of each.
        pixel_mean, pixel_std: per-channel normalisation, one for all sources.
        autocast_dtype: precision of forward passes where the trainer does not set one (CPUs); None: as given.

    Attributes:
        log_prefix: before the name of a source, in what its head logs.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: ExpandedBackbone,
        heads: Mapping[str, nn.Module],
        sources: Sequence[SourceSpec],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        autocast_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.frozen = False
        self._frozen_parts: tuple[nn.Module, ...] = ()  # a tuple hides them from nn.Module's registration
        assert set(heads) == {source.name for source in sources}
        self.backbone = backbone
        self.heads = nn.ModuleDict(heads)
        self.task_of = {source.name: source.task for source in sources}
        self.loss_weights = {source.name: source.loss_weight for source in sources}
        self.autocast_dtype = autocast_dtype
        self.log_prefix = ""
        multiply_small_maps(self)
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        problems: list[str] = []
        sources = parse_sources(cfg.XLEARNER.SOURCES, problems, frozen_tasks=cfg.XLEARNER.FREEZE)
        if problems:
            raise ConfigError(problems)
        configs = {source.name: head_config(source, cfg) for source in sources}
        backbone = build_expanded_backbone(cfg, derive_tasks(sources, configs))
        return {
            "backbone": backbone,
            "heads": {source.name: build_head(source, configs[source.name], backbone) for source in sources},
            "sources": sources,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "autocast_dtype": cpu_autocast_dtype(cfg),
        }

    def train(self, mode: bool = True) -> "XLearner":
        """Set training mode; what is frozen stays in inference mode, whoever asks."""
        super().train(mode and not self.frozen)
        for part in self._frozen_parts:
            part.eval()
        return self

    def freeze_parts(self, *, tasks: Sequence[str], heads: Sequence[str]) -> None:
        """Stop training the branches of ``tasks``, the layers into them, and ``heads``: no gradient, inference mode."""
        branches = [self.backbone.branch_of[task] for task in tasks]
        incoming = [self.backbone.incoming(name) for name in branches]
        self._frozen_parts = (
            *(self.backbone.branch(name) for name in branches),
            *(layers for layers in incoming if layers is not None),
            *(self.heads[source] for source in heads),
        )
        for part in self._frozen_parts:
            part.requires_grad_(False)
        self.train(self.training)

    def freeze(self) -> "XLearner":
        """Make this model a teacher: no gradient, running statistics, inference mode from now on."""
        self.frozen = True
        self.requires_grad_(False)
        return self.eval()

    def keep_in(self, dtype: torch.dtype | None) -> None:
        """Keep the convolutions of a frozen backbone in the precision of mixed precision; None computes without it.

        The features stay the same, from half the memory and without converting every weight in every step.
        """
        assert self.frozen
        self.autocast_dtype = dtype
        keep_convolutions_in(self.backbone, dtype)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batches: SourceBatches) -> dict[str, Tensor] | dict[str, list[dict[str, Any]]]:
        """Weighted losses ``{source/loss_x: scalar}`` in training, else each source's predictions.

        Every source that is given contributes the same keys in every call, as distributed logging needs.
        """
        if not self.training:
            with self.autocast():
                return {source: self.heads[source](inputs) for source, inputs in batches.items()}
        losses = {name: loss for part in self.losses_by_branch(batches) for name, loss in part.items()}
        return {name: losses[name] for source in batches for name in losses if name.startswith(f"{source}/")}

    def losses_by_branch(self, batches: SourceBatches) -> Iterator[dict[str, Tensor]]:
        """The losses of training, those of one branch after another; of all at once where a loss reaches several.

        What branches send each other is computed at first, and each branch runs when its losses are asked for: who
        learns from them before the next ones keeps what one branch needs for its backward pass, not what all do.
        """
        with self.autocast():
            batches = self.with_images_here(batches)
            joint = self._joint_sources(batches)
            groups = self.image_groups({source: batches[source] for source in joint})
            tasks = [self.task_of[next(iter(group.rows))] for group in groups]
            received = self.backbone.received([(group.images, task) for group, task in zip(groups, tasks, strict=True)])
        names = tuple(dict.fromkeys(self.backbone.branch_of[self.task_of[source]] for source in batches))
        with self._sending(batches, joint):
            for part in [(name,) for name in names] if self.backbone.learn_apart else [names]:
                losses: dict[str, Tensor] = {}
                with self.autocast():
                    for group, task, sent in zip(groups, tasks, received, strict=True):
                        if self.backbone.branch_of[task] in part:
                            features = self.backbone.forward_received(group.images, task, sent)
                            losses |= self.head_losses(batches, group, features)
                    for source in batches:
                        if source not in joint and self.backbone.branch_of[self.task_of[source]] in part:
                            losses |= self._losses(source, batches[source])
                yield losses

    def _sending(self, batches: SourceBatches, joint: Sequence[str]) -> AbstractContextManager[None]:
        """What branches send is that of the step's start, also to heads that ask when others have trained already."""
        asking = [source for source in batches if source not in joint or not self._passes_images_on(source)]
        return self.backbone.sending_as_now() if asking and len(batches) > 1 else nullcontext()

    def _joint_sources(self, batches: SourceBatches) -> list[str]:
        """Sources whose images go through a branch together with others'; a lone one's head calls it itself."""
        branches = {s: self.backbone.branch_of[self.task_of[s]] for s in batches if not self._mixes(s)}
        if self.backbone.sends_without_gradient and len(branches) > 1:
            return list(branches)
        counts = Counter(branches.values())
        return [source for source, branch in branches.items() if counts[branch] > 1]

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """The precision this model runs in, for callers that use its parts."""
        return autocast(self.device, self.autocast_dtype)

    def with_images_here(self, batches: SourceBatches) -> SourceBatches:
        """The batches with their images on this model's device.

        Heads of Detectron2 copy each image of a batch by itself and wait for it; images that are there already are not
        copied, neither by a head nor twice for sources whose images are needed before their head sees them.
        """
        if self.device.type == "cpu":
            return batches
        return {
            source: [{**x, "image": x["image"].to(self.device, non_blocking=True)} for x in inputs]
            for source, inputs in batches.items()
        }

    def image_groups(self, batches: SourceBatches, *, together: bool = False) -> list["ImageGroup"]:
        """Normalised images of the sources that go through one branch, those of one size together.

        Together, because a branch's batch statistics should be those of the mix it is used on, as its running ones are.
        Workers form the same groups, as they exchange statistics for each of them: where sources share a branch, all of
        them call this together.

        Args:
            together: all sources, whatever their branch.
        """
        images = {source: self.preprocess(source, inputs) for source, inputs in batches.items()}
        branches = {s: None if together else self.backbone.branch_of[self.task_of[s]] for s in images}
        sizes = {source: tuple(of.shape[2:]) for source, of in images.items()}
        alone = len(set(branches.values())) == len(branches)
        everywhere = [sizes] if alone else comm.all_gather(sizes)
        members: dict[Any, dict[str, Tensor]] = {}
        for source, of in images.items():
            key = (branches[source], *(found[source] for found in everywhere))
            members.setdefault(key, {})[source] = of
        return [ImageGroup.join(of) for of in members.values()]

    def head_losses(
        self, batches: SourceBatches, group: "ImageGroup", features: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Weighted losses ``{source/loss_x: scalar}`` of the sources in a group.

        Args:
            features: of the group's images, by stage.
        """
        losses: dict[str, Tensor] = {}
        for source, own in group.split(features).items():
            images = group.images[group.rows[source]]
            # Workers that draw other mixtures have to agree on whether the branch runs again for them.
            ready = self.backbone.given(images, own, trusted=self._passes_images_on(source))
            with nullcontext() if self._mixes(source) else ready:
                losses |= self._losses(source, batches[source])
        return losses

    def _losses(self, source: str, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        with _log_scope(self.log_prefix + source):
            found = self.heads[source](inputs)
        return {f"{source}/{name}": self.loss_weights[source] * loss for name, loss in found.items()}

    def _mixes(self, source: str) -> bool:
        """Whether a head changes its images in training, so that features of the unchanged ones are of no use to it."""
        return getattr(self.heads[source], "mixup", None) is not None

    def _passes_images_on(self, source: str) -> bool:
        """Whether a head is known to give its backbone the normalised images as they are: Detectron2's and ours do."""
        package = type(self.heads[source]).__module__.partition(".")[0]
        return package in ("detectron2", __name__.partition(".")[0]) and not self._mixes(source)

    def preprocess(self, source: str, inputs: list[dict[str, Any]]) -> Tensor:
        """Normalised images of one source, padded to one size as its head pads them: (N, 3, H, W) float32."""
        images = [x["image"].to(self.device, non_blocking=True) for x in inputs]
        normalised = normalise(images, self.pixel_mean, self.pixel_std)
        head = self.heads[source]
        backbone, own = getattr(head, "backbone", None), getattr(head, "size_divisibility", 0)
        if isinstance(own, int) and own > 0:  # as Panoptic-DeepLab may have
            padded = ImageList.from_tensors(normalised, own)
        elif isinstance(backbone, Backbone):
            constraints = backbone.padding_constraints
            padded = ImageList.from_tensors(normalised, backbone.size_divisibility, padding_constraints=constraints)
        else:  # of a meta-architecture that keeps it elsewhere
            padded = ImageList.from_tensors(normalised, size_divisibility=32)
        return padded.tensor.flatten(0, -4)


def keep_convolutions_in(network: nn.Module, dtype: torch.dtype | None) -> None:
    """Keep the convolutions of a frozen network in the precision of mixed precision; None leaves them as they are.

    What it computes stays the same, without converting every weight in every call.
    """
    for module in network.modules() if dtype is not None else ():
        # Others, as those of timm that standardise their weights first, may need these as they are.
        if type(module) in CONVOLUTIONS:
            for parameter in module.parameters(recurse=False):  # a norm layer within stays as it is
                parameter.data = parameter.data.to(dtype)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast | nullcontext[None]:
    """Mixed precision; None leaves it as it is."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def cpu_autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """bfloat16 where ``SOLVER.AMP.ENABLED`` meets a CPU that has it; on GPUs Detectron2's AMPTrainer decides."""
    wanted = cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu"
    return torch.bfloat16 if wanted and torch.cpu._is_avx512_bf16_supported() else None


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """What training computes in where not in float32: as above, or ``XLEARNER.AMP_PRECISION`` on a GPU."""
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE.startswith("cuda"):
        return cast(torch.dtype, getattr(torch, cfg.XLEARNER.AMP_PRECISION))
    return cpu_autocast_dtype(cfg)
