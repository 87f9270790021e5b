"""Sources that share a branch go through it together, and no head notices."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from xlearner_d2 import XLearner
from xlearner_d2.modeling.expanded import STAGES
from xlearner_d2.modeling.xlearner import ImageGroup

Batches = dict[str, list[dict[str, Any]]]
MakeModel = Callable[..., XLearner]
MakeBatches = Callable[..., Batches]


def losses_of(model: XLearner, batches: Batches, *, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)  # of proposals and mixup
    with EventStorage():
        return model(batches)


def freeze_norms(model: XLearner) -> XLearner:
    """In training, but with the statistics that the norm layers have: an image's features are then its own."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model


def resized(batches: Batches, source: str, height: int, width: int) -> None:
    """Give a source other images, of that size, with its labels where they still fit."""
    generator = torch.Generator().manual_seed(height)
    for item in batches[source]:
        item["image"] = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        if "sem_seg" in item:
            item["sem_seg"] = torch.randint(0, 3, (height, width), generator=generator)
        if "instances" in item:
            item["instances"]._image_size = (height, width)


def running_means(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in backbone.state_dict().items() if "running_mean" in name}


def set_opts(cfg: CfgNode, source: str, *opts: Any) -> None:
    record = cfg.XLEARNER.SOURCES[source]
    record.OPTS = [*record.get("OPTS", []), *opts]


# Groups


@pytest.mark.parametrize(
    ("sharing", "together", "expected"),
    [
        ("shared", False, [{"pics", "boxes", "areas"}]),
        ("separate", False, [{"pics"}, {"boxes"}, {"areas"}]),
        ("detached", False, [{"pics"}, {"boxes"}, {"areas"}]),
        ("detached", True, [{"pics", "boxes", "areas"}]),
    ],
)
def test_groups_are_those_of_a_branch(
    make_model: MakeModel, make_batches: MakeBatches, sharing: str, together: bool, expected: list[set[str]]
) -> None:
    model = make_model("XLEARNER.SHARING", sharing)
    groups = model.image_groups(make_batches(), together=together)
    assert [set(group.rows) for group in groups] == expected


def test_workers_tell_each_other_sizes_only_where_sources_share_a_branch(
    make_model: MakeModel, make_batches: MakeBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every exchange makes each worker wait for the slowest."""
    told: list[Any] = []
    monkeypatch.setattr(comm, "all_gather", lambda sizes: [told.append(sizes) or sizes])
    make_model().image_groups(make_batches())
    assert not told
    make_model("XLEARNER.SHARING", "shared").image_groups(make_batches())
    assert told == [dict.fromkeys(make_batches(), (64, 64))]


def test_groups_are_those_of_a_size(make_model: MakeModel, make_batches: MakeBatches) -> None:
    batches = make_batches()
    resized(batches, "boxes", 40, 70)  # an FPN pads to multiples of 32
    groups = make_model("XLEARNER.SHARING", "shared").image_groups(batches)
    assert [tuple(group.images.shape) for group in groups] == [(4, 3, 64, 64), (2, 3, 64, 96)]
    assert [dict(group.rows) for group in groups] == [
        {"pics": slice(0, 2), "areas": slice(2, 4)},
        {"boxes": slice(0, 2)},
    ]


def test_images_are_padded_as_their_head_pads_them(make_model: MakeModel, make_batches: MakeBatches) -> None:
    """A classifier pools over its image, so it gets no margin; an FPN needs sides that its strides divide."""
    batches = make_batches()
    for source in batches:
        resized(batches, source, 40, 70)
    shapes = [tuple(group.images.shape[2:]) for group in make_model().image_groups(batches)]
    assert shapes == [(40, 70), (64, 96), (64, 96)]


def test_a_group_holds_each_sources_normalised_images(make_model: MakeModel, make_batches: MakeBatches) -> None:
    model, batches = make_model("XLEARNER.SHARING", "shared"), make_batches()
    (group,) = model.image_groups(batches)
    for source, rows in group.rows.items():
        for image, item in zip(group.images[rows], batches[source], strict=True):
            torch.testing.assert_close(image * model.pixel_std + model.pixel_mean, item["image"].float())


def test_images_are_brought_to_the_models_device(make_model: MakeModel, make_batches: MakeBatches) -> None:
    batches = make_batches()
    assert make_model().with_images_here(batches) is batches
    moved = make_model().to("meta").with_images_here(batches)
    for source, records in batches.items():
        for before, after in zip(records, moved[source], strict=True):
            assert after["image"].is_meta
            assert not before["image"].is_meta
            assert {**after, "image": None} == {**before, "image": None}


def test_images_of_two_sizes_are_no_group() -> None:
    with pytest.raises(RuntimeError, match=r"[Ss]izes of tensors must match"):
        ImageGroup.join({"a": torch.zeros(1, 3, 64, 64), "b": torch.zeros(1, 3, 64, 32)})


def test_an_unknown_source_is_an_error(make_model: MakeModel, make_batches: MakeBatches) -> None:
    with pytest.raises(KeyError, match="picks"):
        make_model().image_groups({"picks": make_batches("pics")["pics"]})


# Statistics


def test_statistics_are_those_of_the_joint_batch(make_model: MakeModel, make_batches: MakeBatches) -> None:
    """An oracle: the trunk of a second model sees all images in one call."""
    model, oracle = (make_model("XLEARNER.SHARING", "shared").train() for _ in range(2))
    batches = make_batches()
    losses_of(model, batches)
    images = torch.stack([(x["image"] - oracle.pixel_mean) / oracle.pixel_std for of in batches.values() for x in of])
    with torch.no_grad():
        oracle.backbone(images, "detection")
    expected = running_means(oracle.backbone)
    assert expected
    for name, value in running_means(model.backbone).items():
        torch.testing.assert_close(value, expected[name])
    counts = {int(v) for name, v in model.backbone.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counts == {1}


def test_features_in_a_joint_batch_depend_on_the_others(make_model: MakeModel, make_batches: MakeBatches) -> None:
    """As they should: each source's loss is that under the statistics of the mix."""
    model, batches = make_model("XLEARNER.SHARING", "shared").train(), make_batches()
    together, alone = losses_of(model, batches), losses_of(model, {"pics": batches["pics"]})
    assert not torch.allclose(together["pics/loss_cls"], alone["pics/loss_cls"], rtol=1e-3)


def test_sources_of_other_branches_do_not_mix(make_model: MakeModel, make_batches: MakeBatches) -> None:
    together, alone = (make_model("XLEARNER.SHARING", "separate").train() for _ in range(2))
    batches = make_batches()
    losses = losses_of(together, batches)
    for source in batches:
        for name, loss in losses_of(alone, {source: batches[source]}).items():
            if "rpn" not in name and "loss_box" not in name:  # these draw proposals
                torch.testing.assert_close(loss, losses[name])
    assert running_means(together.backbone).keys() == running_means(alone.backbone).keys()
    for name, value in running_means(together.backbone).items():
        assert torch.equal(value, running_means(alone.backbone)[name])


# Losses


@pytest.mark.parametrize("size", [(64, 64), (40, 70)])
@pytest.mark.parametrize("sharing", ["shared", "detached"])
def test_losses_are_those_of_separate_calls(
    make_model: MakeModel, make_batches: MakeBatches, sharing: str, size: tuple[int, int]
) -> None:
    """Of the heads as Detectron2 calls them, each on its own images, when norm layers have no batch statistics."""
    model, batches = freeze_norms(make_model("XLEARNER.SHARING", sharing)), make_batches()
    for source in batches:
        resized(batches, source, *size)
    together = losses_of(model, batches)
    torch.manual_seed(0)
    with EventStorage():
        alone = {
            f"{source}/{name}": loss for source, of in batches.items() for name, loss in model.heads[source](of).items()
        }
    assert list(together) == list(alone)
    for name, loss in together.items():
        torch.testing.assert_close(loss, alone[name], msg=name)


@pytest.mark.parametrize("mix", ["MIXUP", "CUTMIX"])
def test_a_head_that_mixes_its_images_gets_their_features(
    tiny_cfg: CfgNode, make_model: MakeModel, make_batches: MakeBatches, mix: str
) -> None:
    set_opts(tiny_cfg, "pics", f"MODEL.CLASSIFIER.{mix}", 1.0)
    model, batches = freeze_norms(make_model("XLEARNER.SHARING", "shared")), make_batches()
    seen: list[Tensor] = []
    model.backbone.branches["trunk"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(0)
    state = np.random.get_state()
    with EventStorage():
        together = model(batches)["pics/loss_cls"]
    assert [len(images) for images in seen] == [4, 2]  # boxes and areas; then the mixed pictures
    np.random.set_state(state)
    with EventStorage():
        torch.testing.assert_close(together, model.heads["pics"](batches["pics"])["loss_cls"])
    plain = torch.stack([(x["image"] - model.pixel_mean) / model.pixel_std for x in batches["pics"]])
    assert not torch.allclose(seen[1], plain)


def test_losses_are_weighted_and_in_the_order_of_the_sources(
    tiny_cfg: CfgNode, make_model: MakeModel, make_batches: MakeBatches
) -> None:
    plain = losses_of(freeze_norms(make_model("XLEARNER.SHARING", "shared")), make_batches())
    tiny_cfg.XLEARNER.SOURCES.boxes.LOSS_WEIGHT = 3.0
    batches = make_batches("areas", "boxes", "pics")
    resized(batches, "boxes", 40, 70)  # a group of its own, after the others
    model = freeze_norms(make_model("XLEARNER.SHARING", "shared"))
    losses = losses_of(model, batches)
    assert [name.split("/")[0] for name in losses] == ["areas"] + ["boxes"] * (len(plain) - 2) + ["pics"]
    assert losses.keys() == plain.keys()
    again = losses_of(model, {"boxes": batches["boxes"]})
    with EventStorage():
        torch.manual_seed(0)
        unweighted = model.heads["boxes"](batches["boxes"])
    torch.testing.assert_close(again["boxes/loss_mask"], 3 * unweighted["loss_mask"])


def test_gradient_of_every_source_reaches_the_trunk(make_model: MakeModel, make_batches: MakeBatches) -> None:
    model, batches = make_model("XLEARNER.SHARING", "shared").train(), make_batches()
    losses = losses_of(model, batches)
    weight = model.backbone.branches["trunk"].stem.conv1.weight
    for source in batches:
        total = sum(loss for name, loss in losses.items() if name.startswith(f"{source}/"))
        (gradient,) = torch.autograd.grad(total, weight, retain_graph=True)
        assert gradient.any(), source


def test_heads_log_under_the_name_of_their_source(make_model: MakeModel, make_batches: MakeBatches) -> None:
    model = make_model("XLEARNER.SHARING", "shared").train()
    model.log_prefix = "squeeze/"
    with EventStorage() as storage:
        model(make_batches())
    assert storage.latest()
    assert all(name.startswith("squeeze/boxes/") for name in storage.latest())


# Given features


def some_features(value: float) -> dict[str, Tensor]:
    return {name: torch.full((2, 1, 1, 1), value) for name in STAGES}


def test_given_features_answer_for_their_images_alone(make_model: MakeModel) -> None:
    backbone = make_model().backbone.eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = backbone(images.flip(0), "detection")
    with backbone.given(images, some_features(1.0)):
        assert backbone(images.clone(), "detection")["res3"].eq(1.0).all()
        channels_last = images.contiguous(memory_format=torch.channels_last)
        assert backbone(channels_last, "detection")["res3"].eq(1.0).all()
        assert torch.equal(backbone(images.flip(0), "detection")["res3"], expected["res3"])
        assert backbone(images[:1], "detection")["res3"].shape[0] == 1
        assert backbone(images[..., :32], "detection")["res3"].shape[3] == 4
    assert backbone(images, "detection")["res3"].shape[1] > 1


def test_given_features_are_forgotten_after_an_error(make_model: MakeModel) -> None:
    backbone = make_model().backbone.eval()
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ZeroDivisionError), backbone.given(images, some_features(1.0)):
        raise ZeroDivisionError
    assert backbone(images, "detection")["res3"].shape[1] > 1


@pytest.mark.parametrize("sizes", [[(40, 48), (40, 48)], [(40, 48), (56, 32)], [(64, 64)]], ids=str)
@pytest.mark.parametrize("source", ["pics", "boxes"])
def test_images_are_normalised_and_padded_as_detectron2_does(
    make_model: MakeModel, source: str, sizes: list[tuple[int, int]]
) -> None:
    model = make_model()
    images = [torch.randint(0, 256, (3, height, width), dtype=torch.uint8) for height, width in sizes]
    backbone = model.heads[source].backbone
    expected = ImageList.from_tensors(
        [(image - model.pixel_mean) / model.pixel_std for image in images],
        backbone.size_divisibility,
        padding_constraints=backbone.padding_constraints,
    )
    assert torch.equal(model.preprocess(source, [{"image": image} for image in images]), expected.tensor)


def test_a_head_that_pads_by_a_number_of_its_own(make_model, make_batches):
    """As Panoptic-DeepLab may: else the branch would run again, on images of another size."""
    model = make_model()
    model.heads["areas"].size_divisibility = 96
    assert model.preprocess("areas", make_batches("areas")["areas"]).shape[2:] == (96, 96)
