"""What a cell does with a backbone: train or not, on which images, and what comes out."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import Backbone, build_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_suite import TinySuite, fine_tune, one_set
from torch import Tensor

from xlearner_d2 import add_xlearner_config
from xlearner_d2.data.subset import random_share
from xlearner_d2.evaluation.build import build_evaluator
from xlearner_d2.evaluation.probe import extract_features, linear_probe
from xlearner_d2.specs import ConfigError
from xlearner_d2.transfer import protocols, reading
from xlearner_d2.transfer.backbones import BackboneSpec, load_backbone
from xlearner_d2.transfer.suite import Suite

HEADS = "configs/transfer/heads"
FREE = ("MODEL.BACKBONE.FREEZE_AT", 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinySuite:
    """With free and frozen protocols for every family, and checkpoints."""
    suite = TinySuite(tmp_path_factory.mktemp("protocols"))
    suite.student()
    suite.expanded()
    found = suite.content["TRANSFER"]["PROTOCOLS"]
    found["tuned_free"] = fine_tune("classification/top1", "configs/heads/classifier.yaml", *FREE)
    found["dense_free"] = fine_tune("bbox/AP", f"{HEADS}/retinanet.yaml", *FREE)
    found["linear_free"] = fine_tune("sem_seg/mIoU", f"{HEADS}/linear_segmentation.yaml", *FREE)
    two_stages = [
        "MODEL.ROI_BOX_HEAD.FC_DIM",
        32,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN",
        20,
        "MODEL.RPN.POST_NMS_TOPK_TEST",
        20,
    ]
    found["faster_rcnn"] = fine_tune("bbox/AP", f"{HEADS}/faster_rcnn.yaml", *two_stages, *FREE)
    found["mask_rcnn"] = fine_tune("segm/AP", f"{HEADS}/mask_rcnn.yaml", *two_stages, *FREE)
    found["semantic_fpn"] = fine_tune(
        "sem_seg/mIoU", f"{HEADS}/semantic_fpn.yaml", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, *FREE
    )
    found["dense_half"] = fine_tune("bbox/AP", f"{HEADS}/retinanet.yaml", TRAIN_SHARE=0.5)
    found["dense_large"] = fine_tune("bbox/APl", f"{HEADS}/retinanet.yaml")
    found["dense_sigmas"] = fine_tune("bbox/AP", f"{HEADS}/retinanet.yaml", "TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.2])
    found["dense_masks"] = fine_tune("segm/AP", f"{HEADS}/retinanet.yaml")
    found["diverging"] = fine_tune("sem_seg/mIoU", f"{HEADS}/linear_segmentation.yaml", "SOLVER.BASE_LR", 1e38)
    found["diverging"]["OPTS"] += ["SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.MAX_ITER", 3]
    found["pixels"] = fine_tune("sem_seg/mACC", f"{HEADS}/linear_segmentation.yaml")
    suite.content["TRANSFER"]["SETS"] = {
        "pics": one_set("classification", "s_pics", "probe", "knn", "few", "tuned_free"),
        "boxes": one_set(
            "detection", "s_boxes", *(name for name in found if name.startswith(("dense", "faster", "mask")))
        ),
        "areas": one_set("segmentation", "s_areas", "linear", "linear_free", "diverging", "pixels", "semantic_fpn"),
    }
    suite.write()
    return suite


@pytest.fixture(scope="module")
def suite(tiny: TinySuite) -> Suite:
    return tiny.parse()


def backbone(tiny: TinySuite, name: str) -> BackboneSpec:
    """ "student", "branch" or "random"."""
    paths = {"student": tiny.root / "student.pth", "branch": tiny.root / "expanded.pth", "random": "random"}
    return BackboneSpec(name=name, path=str(paths[name]), task="objects" if name == "branch" else "")


def run(
    suite: Suite, protocol: str, of: BackboneSpec, *, seed: int = 0, cache: Path = Path("/dev/null/unused")
) -> tuple[float, dict[str, Any]]:
    spec = next(spec for spec in suite.sets.values() if protocol in spec.protocols)
    return protocols.run_protocol(suite, spec, suite.protocols[protocol], of, seed=seed, cache=cache)


class Spy:
    """Keeps the backbone that a cell loads, its state at that time, and the number of images it is given."""

    network: Backbone
    before: dict[str, Tensor]
    num_images = 0

    def load(self, *args: Any, **kwargs: Any) -> Backbone:
        self.network = load_backbone(*args, **kwargs)
        self.before = self.state()
        self.network.register_forward_pre_hook(self._count)
        return self.network

    def _count(self, network: Backbone, args: tuple[Tensor]) -> None:
        self.num_images += len(args[0])

    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def moved(self) -> set[str]:
        after = self.state()
        assert after.keys() == self.before.keys()
        return {name for name, value in after.items() if not torch.equal(value, self.before[name])}


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    found = Spy()
    monkeypatch.setattr(protocols, "load_backbone", found.load)
    return found


# Fine-tuning


@pytest.mark.parametrize("name", ["student", "branch", "random"])
@pytest.mark.parametrize("protocol", ["dense", "linear"])
def test_a_frozen_backbone_stays_bit_for_bit(tiny: TinySuite, suite: Suite, spy: Spy, protocol: str, name: str) -> None:
    value, details = run(suite, protocol, backbone(tiny, name))
    assert spy.moved() == set()
    assert not spy.network.training
    assert not any(parameter.requires_grad for parameter in spy.network.parameters())
    assert 0 <= value <= 100
    assert len(details["losses"]) == 2
    assert details["losses"][0] != details["losses"][1]  # the head has learnt


@pytest.mark.parametrize("name", ["student", "branch"])
@pytest.mark.parametrize("protocol", ["linear", "probe"])
def test_weights_kept_in_low_precision_change_nothing(
    tiny: TinySuite, spy: Spy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, protocol: str, name: str
) -> None:
    """Also on a CPU for which bfloat16 is slow."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    suite = tiny.parse("SOLVER.AMP.ENABLED", True)
    kept = run(suite, protocol, backbone(tiny, name), cache=tmp_path / "kept")
    low = {key for key, value in spy.state().items() if value.dtype == torch.bfloat16}
    assert low == {key for key, value in spy.state().items() if value.dim() == 4}  # those of convolutions
    monkeypatch.setattr(protocols, "keep_convolutions_in", lambda *_args: None)
    assert repr(run(suite, protocol, backbone(tiny, name), cache=tmp_path / "as they are")) == repr(kept)


@pytest.mark.parametrize("name", ["student", "branch"])
@pytest.mark.parametrize("protocol", ["tuned_free", "dense_free", "linear_free"])
def test_a_free_backbone_moves(tiny: TinySuite, suite: Suite, spy: Spy, protocol: str, name: str) -> None:
    run(suite, protocol, backbone(tiny, name))
    moved = spy.moved()
    own = "backbone.branches.objects." if name == "branch" else ""
    for part in ("stem.conv1.weight", "stem.conv1.norm.running_mean", "res4.0.conv1.weight"):
        assert own + part in moved
    others = {text for text in moved if name == "branch" and not text.startswith(own)}
    assert {text.split(".")[1] for text in others} <= {"reconciliation"}
    assert bool(others) == (name == "branch")


def test_features_of_a_frozen_backbone_are_computed_once(tiny: TinySuite, suite: Suite, spy: Spy) -> None:
    """Two steps of four out of eight images, and eight test images that are the same."""
    run(suite, "dense", backbone(tiny, "student"))
    assert spy.num_images == 8


@pytest.mark.parametrize("protocol", ["dense", "linear_free", "tuned_free"])
def test_a_seed_decides_everything(tiny: TinySuite, suite: Suite, protocol: str) -> None:
    first, second = (run(suite, protocol, backbone(tiny, "student"), seed=3) for _ in range(2))
    assert repr(first) == repr(second)  # NaN is unequal to itself
    assert run(suite, protocol, backbone(tiny, "student"), seed=4)[1]["losses"] != first[1]["losses"]


def test_what_was_measured_before_does_not_matter(tiny: TinySuite, suite: Suite) -> None:
    alone = run(suite, "linear", backbone(tiny, "student"))
    run(suite, "tuned_free", backbone(tiny, "random"))
    torch.rand(7)
    assert run(suite, "linear", backbone(tiny, "student")) == alone


def test_details_tell_what_evaluation_gave(tiny: TinySuite, suite: Suite) -> None:
    value, details = run(suite, "dense", backbone(tiny, "random"))
    assert details["num_train"] == 8
    assert {"bbox/AP", "bbox/AP50", "bbox/APl"} <= details.keys()
    assert details["bbox/AP"] == value
    assert not [name for name in details if "cat" in name]


@pytest.mark.parametrize("protocol", ["faster_rcnn", "mask_rcnn", "semantic_fpn"])
def test_the_heavier_heads_are_trained_and_evaluated(tiny: TinySuite, suite: Suite, protocol: str) -> None:
    """From the weights of the backbone, which is fine-tuned."""
    value, details = run(suite, protocol, backbone(tiny, "student"))
    assert 0 <= value <= 100
    assert all(np.isfinite(details["losses"]))
    assert details[suite.protocols[protocol].metric] == value


@pytest.mark.parametrize("protocol", ["tuned_free", "dense_free"])
def test_processes_that_read_the_images_change_nothing(tiny: TinySuite, protocol: str) -> None:
    found = [
        run(tiny.parse("DATALOADER.NUM_WORKERS", number), protocol, backbone(tiny, "student"), seed=3)
        for number in (0, 2)
    ]
    np.testing.assert_equal(found[0], found[1])  # APs of sizes that no box has are not a number


def test_a_suite_need_not_say_how_many_processes_read(tiny: TinySuite, tmp_path: Path) -> None:
    """Which is what -1, the default of a config, stands for."""
    values = [
        run(tiny.parse("DATALOADER.NUM_WORKERS", number), "knn", backbone(tiny, "student"), cache=tmp_path / name)[0]
        for number, name in ((-1, "some.npz"), (0, "none.npz"))
    ]
    assert values[0] == values[1]
    assert {path.name for path in tmp_path.iterdir()} == {"some.npz", "none.npz"}


def test_only_the_share_is_trained_on(tiny: TinySuite, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    draw = reading.Mapped.draw

    def note(self: reading.Mapped, index: int, *, seed: int) -> dict[str, Any]:
        seen.append(index)
        return draw(self, index, seed=seed)

    monkeypatch.setattr(reading.Mapped, "draw", note)
    _, details = run(suite, "dense_half", backbone(tiny, "student"), seed=1)
    trained = seen[:8]  # two steps of four; then the eight test images
    assert details["num_train"] == 4
    assert sorted(trained) == sorted(2 * random_share(8, 0.5, seed=1))
    assert sorted(seen[8:]) == list(range(8))


def test_a_metric_that_is_not_defined_is_an_error(tiny: TinySuite, suite: Suite) -> None:
    """A record of NaN would keep all others out of the report."""
    with pytest.raises(
        ConfigError, match=r"PROTOCOLS\.dense_large\.METRIC is 'bbox/APl', which is not defined on 's_box"
    ):
        run(suite, "dense_large", backbone(tiny, "random"))


def test_the_evaluator_follows_the_heads_config(tiny: TinySuite, suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    sigmas = []

    def build(*args: Any, head: CfgNode, **options: Any) -> DatasetEvaluator:
        sigmas.extend(head.TEST.KEYPOINT_OKS_SIGMAS)
        return build_evaluator(*args, head=head, **options)

    monkeypatch.setattr(protocols, "build_evaluator", build)
    run(suite, "dense_sigmas", backbone(tiny, "random"))
    assert sigmas == [0.1, 0.2]


def test_a_metric_that_a_model_lacks_is_an_error(tiny: TinySuite, suite: Suite) -> None:
    with pytest.raises(ConfigError, match=r"PROTOCOLS\.dense_masks\.METRIC is 'segm/AP'\. Known: bbox/AP"):
        run(suite, "dense_masks", backbone(tiny, "random"))


def test_a_training_that_diverges_is_an_error(tiny: TinySuite, suite: Suite) -> None:
    with pytest.raises(FloatingPointError, match="The loss of step 1 is not finite: loss_sem_seg is nan"):
        run(suite, "diverging", backbone(tiny, "random"))


# The config of a head


@pytest.mark.parametrize("protocol", ["tuned_free", "dense", "linear"])
def test_a_dumped_config_is_an_ordinary_one(tiny: TinySuite, suite: Suite, protocol: str) -> None:
    """A user may train it by hand, with the classes, the data and the architecture of the cell."""
    spec = next(spec for spec in suite.sets.values() if protocol in spec.protocols)
    found = protocols.fine_tune_config(suite, spec, suite.protocols[protocol])
    path = tiny.root / "dumped.yaml"
    path.write_text(found.dump())
    cfg = get_cfg()
    add_xlearner_config(cfg)
    cfg.merge_from_file(str(path))
    kept = yaml.safe_load(cfg.dump())
    del kept["XLEARNER"], kept["TRANSFER"], kept["SOLVER"]["OPTIMIZER"]
    assert kept == yaml.safe_load(found.dump())
    assert tuple(kept["DATASETS"]["TRAIN"]) == spec.train
    assert (kept["SOLVER"]["MAX_ITER"], kept["SOLVER"]["IMS_PER_BATCH"]) == (2, 4)
    resnet = build_model(cfg).state_dict()
    assert next(value for name, value in resnet.items() if name.endswith("stem.conv1.weight")).shape[0] == 8


def test_a_head_that_learns_something_else_is_refused(tiny: TinySuite) -> None:
    suite = tiny.parse("TRANSFER.SETS.boxes.TRAIN", "[s_areas]")
    where = r"TRANSFER\.SETS\.boxes with TRANSFER\.PROTOCOLS\.dense"
    with pytest.raises(ConfigError, match=rf"{where}: the data set 's_areas' has no thing_classes"):
        run(suite, "dense", backbone(tiny, "random"))


# Augmentation


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        ((), True),
        (("INPUT.RANDOM_FLIP", "horizontal"), False),
        (("INPUT.MIN_SIZE_TRAIN", [48, 64]), False),
        (("INPUT.CROP.ENABLED", True), False),
        (("INPUT.COLOR_JITTER", 0.4), False),
    ],
)
def test_only_what_is_always_the_same_is_kept(tiny: TinySuite, opts: tuple[Any, ...], expected: bool) -> None:
    record = fine_tune("sem_seg/mIoU", f"{HEADS}/linear_segmentation.yaml", *opts)
    suite = tiny.parse("TRANSFER.PROTOCOLS.linear", record)
    spec, protocol = suite.sets["areas"], suite.protocols["linear"]
    train, test = protocols.read_mapped(suite, spec, protocol)
    drawn = [train.draw(0, seed=seed)["image"] for seed in (1, 1, *range(2, 8))]
    assert torch.equal(drawn[0], drawn[1])
    assert all(image is drawn[0] for image in drawn) == expected
    assert test[0]["image"] is test[0]["image"]
    assert protocols.read_mapped(suite, spec, protocol)[0] is train
    other = tiny.parse("TRANSFER.PROTOCOLS.linear", record, "XLEARNER.DATASETS.s_areas.IGNORE_VALUE", 254)
    assert protocols.read_mapped(other, other.sets["areas"], other.protocols["linear"])[0] is not train


def test_crops_of_a_classifier_are_drawn_anew(suite: Suite) -> None:
    train, _ = protocols.read_mapped(suite, suite.sets["pics"], suite.protocols["tuned_free"])
    first, again, other = (train.draw(0, seed=seed)["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


# Probes


def test_a_probe_is_that_of_the_features(tiny: TinySuite, suite: Suite, tmp_path: Path) -> None:
    student = backbone(tiny, "student")
    value, details = run(suite, "probe", student, cache=tmp_path / "cache.npz")
    network = load_backbone(student, suite.cfg, seed=0).eval()
    labelled = extract_features(
        network,
        protocols._records(("s_pics",)),
        image_size=64,
        pixel_mean=suite.cfg.MODEL.PIXEL_MEAN,
        pixel_std=suite.cfg.MODEL.PIXEL_STD,
        num_workers=0,
    )
    expected = linear_probe(labelled, labelled, seed=0)
    assert value == pytest.approx(expected.accuracy)
    assert details["num_train"] == 8


def test_protocols_share_the_features(
    tiny: TinySuite, suite: Suite, spy: Spy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for protocol in ("probe", "knn", "few"):
        run(suite, protocol, backbone(tiny, "student"), cache=tmp_path / "cache.npz")
    assert spy.num_images == 16  # training and test images, once
    assert [path.name for path in tmp_path.iterdir()] == ["cache.npz"]


def test_few_shot_takes_so_many_of_each_class(tiny: TinySuite, suite: Suite, tmp_path: Path) -> None:
    student = backbone(tiny, "student")
    value, details = run(suite, "few", student, cache=tmp_path / "cache.npz")
    assert details["num_train"] == 6
    assert value == details["mean_class_acc"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 9), st.integers(0, 3))
def test_images_per_class(labels: list[int], count: int, seed: int) -> None:
    x, y = np.arange(len(labels), dtype=np.float32)[:, None], np.array(labels)
    drawn_x, drawn_y = protocols._draw_per_class((x, y), count, seed=seed)
    rows = drawn_x[:, 0].astype(int)
    assert sorted({*rows.tolist()}) == rows.tolist()
    assert (y[rows] == drawn_y).all()
    expected = [size if not count else min(count, size) for size in np.bincount(y)]
    assert np.bincount(drawn_y, minlength=len(expected)).tolist() == expected
    again, _ = protocols._draw_per_class((x, y), count, seed=seed)
    assert (again == drawn_x).all()


# What learns nothing


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [("probe", 37.5), ("knn", 37.5), ("few", 100 / 3), ("tuned_free", 37.5), ("dense", 0.0)],
)
def test_trivial_value(suite: Suite, protocol: str, expected: float) -> None:
    spec = next(spec for spec in suite.sets.values() if protocol in spec.protocols)
    assert protocols.trivial_value(spec, suite.protocols[protocol]) == pytest.approx(expected)


def test_trivial_value_of_segmentation_is_of_the_most_frequent_class(tiny: TinySuite, suite: Suite) -> None:
    """Background and the class cat share the index 0; a square of 28 pixels is dog or eel in five of eight images."""
    share = 1 - 5 * 28**2 / (8 * 64**2)
    found = protocols.trivial_value(suite.sets["areas"], suite.protocols["linear"])
    assert found == pytest.approx(100 * share / 3)


def test_a_metric_may_have_no_trivial_value(suite: Suite) -> None:
    assert protocols.trivial_value(suite.sets["areas"], suite.protocols["pixels"]) is None


@pytest.mark.parametrize(("fixed", "max_bytes", "calls"), [(True, 1000, 3), (True, 10, 7), (False, 1000, 6)])
def test_records_are_kept_where_they_are_fixed_and_small(fixed: bool, max_bytes: int, calls: int) -> None:
    drawn = []

    def mapper(record: dict[str, Any], seed: int) -> dict[str, Any]:
        drawn.append(record)
        return {"image": torch.full((3, 4), record["value"], dtype=torch.uint8), "seed": seed}

    data = reading.Mapped([{"value": 1}, {"value": 2}], mapper, fixed=fixed, max_bytes=max_bytes)  # type: ignore[arg-type]
    for _ in range(3):
        assert [data[index]["image"][0, 0] for index in range(len(data))] == [1, 2]
    assert len(drawn) == calls
