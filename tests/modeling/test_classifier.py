"""ImageClassifier against its definition, written out in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone, build_model
from torch import Tensor

from xlearner_d2 import add_xlearner_config
from xlearner_d2.modeling.classifier import ImageClassifier

MEAN, STD, CLASSES = [10.0, 20.0, 30.0], [1.0, 2.0, 4.0], 5


class Pixels(Backbone):
    """The normalised image itself, so that the head alone is tested."""

    def __init__(self) -> None:
        super().__init__()
        self._out_features, self._out_feature_channels, self._out_feature_strides = ["res5"], {"res5": 3}, {"res5": 1}
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.seen.append(x)
        return {"res5": x}


def make(**options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    arguments = {"in_feature": "res5", "num_classes": CLASSES, "pixel_mean": MEAN, "pixel_std": STD, **options}
    model = ImageClassifier(backbone=Pixels(), **arguments)
    torch.nn.init.normal_(model.linear.weight)
    return model


def inputs(count: int = 4, *, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, 8, 6)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return [{"image": image, "category_id": number % CLASSES} for number, image in enumerate(images)]


def logits(model: ImageClassifier, batch: list[dict[str, Any]]) -> np.ndarray:
    """The definition: normalise, average, map."""
    images = np.stack([x["image"].numpy() for x in batch]).astype("float64")
    pooled = (images.mean((2, 3)) - np.array(MEAN)) / np.array(STD)
    weight, bias = model.linear.weight.detach().double().numpy(), model.linear.bias.detach().double().numpy()
    return pooled @ weight.T + bias


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_loss_is_the_smoothed_cross_entropy(smoothing: float) -> None:
    model, batch = make(label_smoothing=smoothing), inputs()
    log_p = log_softmax(logits(model, batch))
    own = log_p[np.arange(4), [x["category_id"] for x in batch]]
    expected = -((1 - smoothing) * own + smoothing * log_p.mean(1)).mean()
    losses = model(batch)
    assert set(losses) == {"loss_cls"}
    assert losses["loss_cls"].item() == pytest.approx(expected, rel=1e-5)


def test_scores_are_probabilities() -> None:
    model, batch = make(dropout=0.5).eval(), inputs()
    expected = np.exp(log_softmax(logits(model, batch)))
    for found, row in zip(model(batch), expected, strict=True):
        assert set(found) == {"scores"}
        np.testing.assert_allclose(found["scores"].detach(), row, rtol=1e-4, atol=1e-6)


def test_inference_needs_no_label() -> None:
    scores = make().eval()([{"image": inputs()[0]["image"]}])[0]["scores"]
    assert scores.sum().item() == pytest.approx(1)


def test_mean_image_is_zero_to_the_backbone() -> None:
    model = make().eval()
    model([{"image": torch.tensor(MEAN).view(3, 1, 1).expand(3, 4, 4)}])
    assert not model.backbone.seen[0].any()


def test_dropout_acts_in_training_only() -> None:
    model, batch = make(dropout=0.5), inputs()
    assert model(batch)["loss_cls"] != model(batch)["loss_cls"]
    model.eval()
    assert torch.equal(model(batch)[0]["scores"], model(batch)[0]["scores"])


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixing_changes_images_in_training_only(options: dict[str, float]) -> None:
    np.random.seed(0)
    model, plain, batch = make(**options), make(), inputs()
    loss = model(batch)["loss_cls"]
    loss.backward()
    assert model.linear.weight.grad.any()
    plain(batch)
    assert not torch.equal(model.backbone.seen[0], plain.backbone.seen[0])
    assert torch.equal(model.eval()(batch)[0]["scores"], plain.eval()(batch)[0]["scores"])


def test_mixup_is_linear_in_images_and_labels() -> None:
    """With images of one class, mixing leaves the target alone: the loss is that of the mixed images."""
    np.random.seed(0)
    model = make(mixup=1.0, label_smoothing=0.2)
    batch = [{**x, "category_id": 2} for x in inputs()]
    loss = model(batch)["loss_cls"]
    log_p = model.linear(model.backbone.seen[0].mean((2, 3))).log_softmax(1)
    torch.testing.assert_close(loss, -(0.8 * log_p[:, 2] + 0.2 * log_p.mean(1)).mean())


def test_built_from_a_config(tiny_cfg: CfgNode) -> None:
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.MODEL.RESNETS = tiny_cfg.MODEL.RESNETS.clone()
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "ImageClassifier"])
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res5"]])
    cfg.merge_from_list(["MODEL.CLASSIFIER.NUM_CLASSES", 7, "MODEL.CLASSIFIER.LABEL_SMOOTHING", 0.0])
    model = build_model(cfg)
    assert (model.linear.in_features, model.linear.out_features, model.label_smoothing) == (128, 7, 0.0)
    assert [name for name in model.state_dict() if name.startswith("pixel")] == []
    assert model.eval()(inputs(1))[0]["scores"].shape == (7,)


def test_width_is_asked_of_the_backbone() -> None:
    backbone = Pixels()
    assert make().linear.in_features == backbone.output_shape()["res5"].channels
    assert backbone.output_shape()["res5"] == ShapeSpec(channels=3, stride=1)


def test_unknown_feature_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"IN_FEATURE is 'res4', but the backbone offers \['res5'\]"):
        make(in_feature="res4")


def test_mixing_an_odd_batch_is_refused() -> None:
    with pytest.raises(AssertionError, match="even"):
        make(mixup=0.8)(inputs(3))


def test_training_without_label_is_refused() -> None:
    with pytest.raises(KeyError, match="category_id"):
        make()([{"image": inputs()[0]["image"]}])


def test_label_out_of_range_is_refused() -> None:
    with pytest.raises(IndexError, match="Target 5 is out of bounds"):
        make()([{**inputs()[0], "category_id": CLASSES}])
