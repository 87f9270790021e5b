"""What some of Detectron2's own models need to serve as heads here."""

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.data import Metadata
from detectron2.modeling import PanopticFPN, SemanticSegmentor
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from torch import Tensor, nn

from ..labels import PanopticLabels


def adapt(model: nn.Module, metadata: Metadata) -> None:
    """Adapt a head in place.

    PanopticFPN names the categories of ``panoptic_seg`` as its data set does. The losses of semantic heads are 0 for
    images without a labelled pixel. Keypoint heads get their scores in the memory format that their loss can take,
    whatever that of the model (``XLEARNER.CHANNELS_LAST``).

    Args:
        metadata: of the head's data set.
    """
    labels = PanopticLabels.of(metadata)
    if isinstance(model, PanopticFPN) and labels is not None:
        model.register_forward_hook(_Renumber(labels))
    if isinstance(model, SemanticSegmentor | PanopticFPN):
        model.sem_seg_head.register_forward_hook(_without_labels_no_loss)
    for module in model.modules():
        if isinstance(module, BaseKeypointRCNNHead):
            *_, last = module.children()
            last.register_forward_hook(_contiguous)


@dataclass(frozen=True)
class _Renumber:
    """A forward hook that renumbers the categories of ``panoptic_seg``, in inference."""

    labels: PanopticLabels

    def __call__(self, model: nn.Module, _inputs: Any, outputs: Any) -> None:
        if model.training:
            return
        for output in outputs:
            for segment in output["panoptic_seg"][1]:
                category, is_thing = segment["category_id"], segment["isthing"]
                segment["category_id"] = self.labels.in_data_set(category, is_thing=is_thing)


def _without_labels_no_loss(head: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
    """The losses of a semantic head as they are, but 0 where no pixel has a label: the mean of no number is NaN.

    They are chosen, not left out, as every parameter needs a gradient where several workers train.
    """
    if not head.training:
        return None
    targets, (result, losses) = inputs[1], outputs
    labelled = (targets != head.ignore_value).any()
    return result, {name: torch.where(labelled, loss, torch.zeros_like(loss)) for name, loss in losses.items()}


def _contiguous(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.contiguous()
