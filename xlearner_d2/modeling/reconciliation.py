"""Reconciliation layers: what one branch receives from the others.

Known of the method (from inference code the same group released): features are added to the main branch, same-size
ones through 1x1 convolution + BN, larger ones through a chain of strided 3x3 convolutions + BN, starting as an exact
identity. Our choices: ReLU inside a chain, and that only a chain's *last* BN starts at zero; were all of them zero, no
gradient could pass a chain longer than one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec, get_norm
from fvcore.nn import weight_init
from torch import Tensor, nn

#: stage name -> features (N, C, H, W)
Features = Mapping[str, Tensor]


class ReconciliationLayer(nn.Sequential):
    """Bring an auxiliary feature to another stage's channels and stride; outputs exact zeros at first.

    Args:
        in_shape: channels and stride of the auxiliary stage.
        out_shape: channels and stride of the receiving stage; its stride is ``in_shape.stride * 2**n``.
        norm: a Detectron2 norm name with trainable scale, such as "BN", "SyncBN" or "GN"; "" for none.
    """

    def __init__(self, *, in_shape: ShapeSpec, out_shape: ShapeSpec, norm: str = "BN"):
        num_halvings = int(math.log2(out_shape.stride // in_shape.stride))
        assert in_shape.stride * 2**num_halvings == out_shape.stride, (in_shape, out_shape)
        super().__init__()
        kernel, stride = (3, 2) if num_halvings else (1, 1)
        for index in range(max(num_halvings, 1)):
            last = index == max(num_halvings, 1) - 1
            channels = out_shape.channels if last else in_shape.channels
            layer = Conv2d(
                in_shape.channels,
                channels,
                kernel,
                stride=stride,
                padding=kernel // 2,
                bias=False,
                norm=get_norm(norm, channels),
                activation=None if last else nn.functional.relu,
            )
            weight_init.c2_msra_fill(layer)
            self.append(layer)
        nn.init.zeros_((layer.norm or layer).weight)

    @property
    def is_silent(self) -> bool:
        """Whether it gives exact zeros, as it does until it is trained."""
        last: Any = self[-1].norm or self[-1]
        bias = getattr(last, "bias", None)
        return not last.weight.any() and (bias is None or not bias.any())


class Reconciliation(nn.Module):
    """All layers that lead into one branch.

    Args:
        shapes: stages of the receiving branch.
        aux_shapes: stages of each auxiliary branch, by branch name.
        stages: receiving stages; those that the branch or the auxiliary one lacks are left out.
        cross_scale: a stage receives the same and all shallower auxiliary stages, not the same one alone.
        norm: see :class:`ReconciliationLayer`.
    """

    def __init__(
        self,
        *,
        shapes: Mapping[str, ShapeSpec],
        aux_shapes: Mapping[str, Mapping[str, ShapeSpec]],
        stages: Sequence[str],
        cross_scale: bool = True,
        norm: str = "BN",
    ):
        super().__init__()
        self.layers = nn.ModuleDict()
        for name, aux in aux_shapes.items():
            self.layers[name] = nn.ModuleDict(
                {
                    f"{source}_to_{target}": ReconciliationLayer(
                        in_shape=aux[source], out_shape=shapes[target], norm=norm
                    )
                    for target in stages
                    for source in aux
                    if target in shapes and (source == target or (cross_scale and source < target))
                }
            )
        self.stages = tuple(stage for stage in stages if any(self._into(stage)))

    def reads(self) -> dict[str, tuple[str, ...]]:
        """By auxiliary branch, its stages that some layer reads."""
        read = {name: sorted({key.split("_to_")[0] for key in layers}) for name, layers in self._by_branch()}
        return {name: tuple(stages) for name, stages in read.items() if stages}

    def heard(self) -> list[str]:
        """Auxiliary branches of which something gets through."""
        return [name for name, of in self._by_branch() if any(not cast(Any, layer).is_silent for layer in of.values())]

    def _by_branch(self) -> list[tuple[str, nn.ModuleDict]]:
        return [(name, cast(nn.ModuleDict, layers)) for name, layers in self.layers.items()]

    def _into(self, stage: str) -> list[tuple[str, str, nn.Module]]:
        """(branch, auxiliary stage, layer) of every layer that leads into ``stage``."""
        return [
            (name, key.split("_to_")[0], layer)
            for name, layers in self._by_branch()
            for key, layer in layers.items()
            if key.endswith(f"_to_{stage}")
        ]

    def truncate(self, deepest: str) -> None:
        """Drop the layers that lead into stages after ``deepest``."""
        for _, layers in self._by_branch():
            for key in [key for key in layers if key.split("_to_")[1] > deepest]:
                del layers[key]

    def freeze(self, stage: str) -> None:
        """Stop training the layers that lead into ``stage``."""
        for _, _, layer in self._into(stage):
            layer.requires_grad_(False)
            FrozenBatchNorm2d.convert_frozen_batchnorm(layer)

    def forward(self, features: Tensor, stage: str, aux: Mapping[str, Features]) -> Tensor:
        """Add to ``features`` (N, C, H, W), the output of ``stage``, what the auxiliary branches have to say.

        Args:
            aux: by branch name, the auxiliary features of the same images.
        """
        for name, source, layer in self._into(stage):
            features = features + layer(aux[name][source])
        return features
