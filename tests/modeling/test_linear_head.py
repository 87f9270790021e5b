"""The linear segmentation head: one linear map of upsampled features, learnt with Detectron2's own model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from xlearner_d2.modeling.heads import head_config
from xlearner_d2.modeling.linear_head import LARGEST_PRODUCT, LinearSemSegHead, upsample
from xlearner_d2.specs import ConfigError, SourceSpec

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 3
SHAPES = {
    "res2": ShapeSpec(channels=5, stride=4),
    "res4": ShapeSpec(channels=2, stride=16),
    "res5": ShapeSpec(channels=7, stride=32),
}


def make_head(seed: int = 0, **options: Any) -> LinearSemSegHead:
    """With weights and statistics that are no longer those of the start."""
    head = LinearSemSegHead(**{"input_shape": SHAPES, "num_classes": CLASSES, **options})
    torch.manual_seed(seed)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    for norm in head.norms.values():
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return head.eval()


def features(height: int, width: int, *, seed: int = 0, count: int = 2) -> dict[str, Tensor]:
    """Of images of that size, as a ResNet gives them: sides divided by the stride, rounded up."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: ShapeSpec) -> Tensor:
        sides = [-(-side // shape.stride) for side in (height, width)]
        return torch.randn(count, shape.channels, *sides, generator=generator)

    return {name: draw(shape) for name, shape in SHAPES.items()}


def targets(height: int, width: int, *, count: int = 2) -> Tensor:
    return torch.randint(0, CLASSES, (count, height, width), generator=torch.Generator().manual_seed(1))


def oracle(head: LinearSemSegHead, found: dict[str, Tensor], common_stride: int) -> Tensor:
    """Standardise, bring to the common stride, stack, apply one matrix, bring to the image."""
    stacked = []
    for name, x in found.items():
        norm = head.norms[name]
        x = (x - norm.running_mean.view(-1, 1, 1)) / (norm.running_var + norm.eps).sqrt().view(-1, 1, 1)
        factor = SHAPES[name].stride // common_stride
        stacked.append(F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False))
    sides = [min(x.shape[axis] for x in stacked) for axis in (2, 3)]
    stack = torch.cat([x[:, :, : sides[0], : sides[1]] for x in stacked], dim=1)
    weight = torch.cat([head.classifiers[name].weight[:, :, 0, 0] for name in found], dim=1)
    bias = torch.stack([head.classifiers[name].bias for name in found]).sum(dim=0)
    logits = torch.einsum("nchw,kc->nkhw", stack, weight) + bias.view(-1, 1, 1)
    return F.interpolate(logits, scale_factor=common_stride, mode="bilinear", align_corners=False)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 100), st.integers(1, 100), st.sampled_from([2, 4]), st.integers(0, 9))
def test_it_is_one_linear_map_of_all_features(height: int, width: int, common_stride: int, seed: int) -> None:
    head = make_head(seed, common_stride=common_stride)
    found = features(height, width, seed=seed)
    logits, losses = head(found)
    assert losses == {}
    torch.testing.assert_close(logits, oracle(head, found, common_stride), rtol=1e-4, atol=1e-4)
    assert all(0 <= got - side < 4 for got, side in zip(logits.shape[2:], (height, width), strict=True))


def test_it_starts_undecided() -> None:
    head = LinearSemSegHead(input_shape=SHAPES, num_classes=CLASSES)
    _, losses = head(features(64, 64), targets(64, 64))
    torch.testing.assert_close(losses["loss_sem_seg"], torch.tensor(float(CLASSES)).log())


def test_features_are_standardised_over_the_data() -> None:
    """Scale and offset of a stage have no influence in training."""
    head = make_head().train()
    found = features(64, 64)
    moved = {name: 100 * x + 7 for name, x in found.items()}
    losses = [head(x, targets(64, 64))[1]["loss_sem_seg"] for x in (found, moved)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (61, 35)])
def test_gradient_reaches_every_parameter(size: tuple[int, int]) -> None:
    for head in (make_head().train(), LinearSemSegHead(input_shape=SHAPES, num_classes=CLASSES).train()):
        head(features(*size), targets(*size))[1]["loss_sem_seg"].backward()
        assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 64 * 64 - 1), st.integers(0, 3))
def test_loss_is_the_mean_over_labelled_pixels(num_ignored: int, seed: int) -> None:
    head = make_head().train()
    wanted = targets(64, 64)
    wanted.view(2, -1)[:, :num_ignored] = 255
    loss = head(features(64, 64, seed=seed), wanted)[1]["loss_sem_seg"]
    maps = F.interpolate(head._sum(features(64, 64, seed=seed)), scale_factor=4, mode="bilinear")
    chances = maps.softmax(dim=1).gather(1, wanted.clamp(max=CLASSES - 1)[:, None])[:, 0]
    torch.testing.assert_close(loss, -chances.log()[wanted != 255].mean(), rtol=1e-4, atol=1e-5)


def test_images_without_a_label_give_no_loss() -> None:
    """Not NaN, which would stop the training."""
    head = make_head(ignore_value=9).train()
    loss = head(features(64, 64), torch.full((2, 64, 64), 9))[1]["loss_sem_seg"]
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in head.parameters())


def test_a_stage_finer_than_the_common_stride_is_refused() -> None:
    with pytest.raises(ValueError, match=r"COMMON_STRIDE is 8, but its IN_FEATURES: \{'res2': 4\}"):
        make_head(common_stride=8)


# In Detectron2's model


def stock_config(tiny_cfg: CfgNode, *opts: Any) -> CfgNode:
    """Nothing of this project's but the head and its registration."""
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    for key in ("WIDTH_PER_GROUP", "RES2_OUT_CHANNELS", "STEM_OUT_CHANNELS"):
        cfg.MODEL.RESNETS[key] = tiny_cfg.MODEL.RESNETS[key]
    stages = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.OUT_FEATURES = stages
    cfg.MODEL.SEM_SEG_HEAD.NAME, cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = "LinearSemSegHead", stages
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = CLASSES
    cfg.merge_from_list(list(opts))
    return cfg


def inputs(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "image": torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator),
            "sem_seg": torch.randint(0, CLASSES, size, generator=generator),
            "height": size[0],
            "width": size[1],
        }
        for size in sizes
    ]


@pytest.mark.parametrize("sizes", [[(64, 64), (64, 64)], [(96, 144)], [(50, 75), (64, 33)], [(37, 37)]])
def test_stock_model_learns_and_predicts_in_any_size(tiny_cfg: CfgNode, sizes: list[tuple[int, int]]) -> None:
    """A plain ResNet asks for no padding, so sides that its strides do not divide come as they are."""
    model = build_model(stock_config(tiny_cfg))
    with EventStorage():
        losses = model(inputs(*sizes))
    assert list(losses) == ["loss_sem_seg"]
    losses["loss_sem_seg"].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.sem_seg_head.parameters())
    with torch.no_grad():
        found = model.eval()(inputs(*sizes))
    assert [tuple(item["sem_seg"].shape) for item in found] == [(CLASSES, *size) for size in sizes]


def test_it_learns_what_a_pixel_shows(tiny_cfg: CfgNode) -> None:
    """Left and right halves of different brightness, through a frozen random ResNet."""
    torch.manual_seed(0)
    model = build_model(stock_config(tiny_cfg, "MODEL.BACKBONE.FREEZE_AT", 5))
    (item,) = inputs((64, 64))
    item["image"][:, :, :32] //= 8
    item["sem_seg"][:, :32], item["sem_seg"][:, 32:] = 0, 1
    optimizer = torch.optim.SGD(model.sem_seg_head.parameters(), lr=0.5)
    with EventStorage():
        for _ in range(20):
            optimizer.zero_grad()
            model([item])["loss_sem_seg"].backward()
            optimizer.step()
    with torch.no_grad():
        (found,) = model.eval()([item])
    assert (found["sem_seg"].argmax(dim=0) == item["sem_seg"]).float().mean() > 0.9


def test_shipped_config_takes_classes_and_ignored_label_from_the_data(tiny_cfg: CfgNode) -> None:
    MetadataCatalog.get("tiny_ignoring_nine").set(stuff_classes=["a", "b", "c", "d"], ignore_label=9)
    config = str(ROOT / "configs/transfer/heads/linear_segmentation.yaml")
    source = SourceSpec(name="a", task="t", config=config, train=("tiny_ignoring_nine",))
    head = build_model(head_config(source, tiny_cfg)).sem_seg_head
    assert isinstance(head, LinearSemSegHead)
    assert head.classifiers["res5"].out_channels == 4
    assert head.ignore_value == 9


def test_unknown_setting_of_the_shipped_config(tiny_cfg: CfgNode) -> None:
    config = str(ROOT / "configs/transfer/heads/linear_segmentation.yaml")
    source = SourceSpec(name="a", task="t", config=config, train=("tiny_seg",), opts=("MODEL.SEM_SEG_HEAD.CLASES", 3))
    with pytest.raises(ConfigError, match=r"XLEARNER\.SOURCES\.a .*SEM_SEG_HEAD\.CLASES"):
        head_config(source, tiny_cfg)


@pytest.mark.parametrize("factor", [1, 2, 2.5, 8.0])
@pytest.mark.parametrize("sides", [(5, 7), (3, 2 * LARGEST_PRODUCT)])
def test_upsampling_is_that_of_torch(sides: tuple[int, int], factor: float) -> None:
    """With its gradient, also in mixed precision, which lowers neither."""
    maps = torch.randn(2, 3, *sides, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = upsample(maps, factor)
    expected = F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((of * weight).sum(), maps)[0] for of in (found, expected)))
