"""Shares of the sources and sampling within a source, against counts made by hand and laws."""

from collections import Counter
from typing import Any

import pytest
from detectron2.config import CfgNode, get_cfg
from hypothesis import assume, given
from hypothesis import strategies as st

from xlearner_d2.data.balance import build_stream, classes_of, sampler_of, share_images
from xlearner_d2.data.streams import ClassAware, Grouped, RepeatFactor, Shuffled
from xlearner_d2.settings import add_head_config
from xlearner_d2.specs import ConfigError, SourceSpec

SIZES = {"big": 900, "middle": 100, "small": 25}


@pytest.mark.parametrize(
    ("total", "temperature", "workers", "expected"),
    [
        (41, 1, 1, {"big": 36, "middle": 4, "small": 1}),  # by size: 36, 4, 1
        (45, 2, 1, {"big": 30, "middle": 10, "small": 5}),  # by root: 30 : 10 : 5
        (90, 2, 2, {"big": 60, "middle": 20, "small": 10}),
        (12, 1e9, 4, {"big": 4, "middle": 4, "small": 4}),
        (16, 1, 1, {"big": 14, "middle": 1, "small": 1}),  # 14.05, 1.56, 0.39: the least first, then 13.5 : 1.5
        (3, 1, 1, {"big": 1, "middle": 1, "small": 1}),
    ],
)
def test_shares_by_hand(total: int, temperature: float, workers: int, expected: dict[str, int]) -> None:
    assert share_images(total, SIZES, temperature=temperature, workers=workers) == expected


@given(
    sizes=st.dictionaries(st.text("abcdef", min_size=1), st.integers(1, 10**7), min_size=1, max_size=8),
    units=st.integers(1, 200),
    workers=st.integers(1, 8),
    temperature=st.floats(0.5, 100),
)
def test_shares_are_whole_exact_and_fair(sizes: dict[str, int], units: int, workers: int, temperature: float) -> None:
    assume(units >= len(sizes))
    shares = share_images(units * workers, sizes, temperature=temperature, workers=workers)
    assert list(shares) == list(sizes)
    assert sum(shares.values()) == units * workers
    assert all(share >= workers and share % workers == 0 for share in shares.values())
    for one in sizes:
        for other in sizes:
            assert sizes[one] <= sizes[other] or shares[one] >= shares[other]


@given(units=st.integers(3, 400), workers=st.integers(1, 4))
def test_no_share_is_a_whole_unit_off_its_part(units: int, workers: int) -> None:
    """Where every part is above the least."""
    sizes = {"a": 5, "b": 4, "c": 3}
    assume(units * 3 / 12 >= 1)
    for source, share in share_images(units * workers, sizes, temperature=1, workers=workers).items():
        assert abs(share / workers - units * sizes[source] / 12) < 1


@pytest.mark.parametrize(
    ("total", "workers", "message"),
    [
        (2, 1, "2 images a step cannot be shared by 3 sources: at least 3 is needed"),
        (10, 4, "10 images a step cannot be shared by 3 sources: a multiple of 4 of at least 12 is needed"),
        (8, 4, "8 images a step cannot be shared by 3 sources: a multiple of 4 of at least 12 is needed"),
    ],
)
def test_images_that_cannot_be_shared(total: int, workers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        share_images(total, SIZES, temperature=1, workers=workers)


def head(*opts: Any) -> CfgNode:
    cfg = get_cfg()
    add_head_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


def source(**options: Any) -> SourceSpec:
    return SourceSpec(name="s", task="t", config="c.yaml", train=("x",), ims_per_batch=2, **options)


def boxes(*classes: int) -> dict[str, Any]:
    return {"annotations": [{"category_id": c} for c in classes]}


def test_the_classes_of_any_kind_of_record() -> None:
    assert classes_of({"category_id": 3}) == {3}
    assert classes_of({"category_ids": [2, 0]}) == {0, 2}
    assert classes_of({"category_ids": []}) == set()
    assert classes_of(boxes(1, 2, 1)) == {1, 2}
    assert classes_of({"annotations": [{"category_id": 1, "iscrowd": 1}, {"category_id": 2}]}) == {2}
    assert classes_of({"segments_info": [{"category_id": 7}]}) == {7}
    assert classes_of({"sem_seg_file_name": "x.png"}) == set()


def test_class_aware_by_label_and_by_box() -> None:
    records = [boxes(0), boxes(0), boxes(0), boxes(5), boxes()]
    stream = build_stream(source(sampler="class_aware"), head(), records, seed=0)
    assert isinstance(stream, ClassAware)
    assert Counter(stream.draw(p)[0] for p in range(12)) == {0: 2, 1: 2, 2: 2, 3: 6}


def test_samplers_go_by_every_label_of_an_image() -> None:
    records = [{"category_ids": ids} for ids in ([0], [0], [0, 5], [])]
    stream = build_stream(source(sampler="class_aware"), head(), records, seed=0)
    # All 6 turns of class 5 and a third of those of class 0 show the image of both.
    assert Counter(stream.draw(p)[0] for p in range(12)) == {0: 2, 1: 2, 2: 8}
    options = head("DATALOADER.REPEAT_THRESHOLD", 1.0)
    repeating = build_stream(source(sampler="repeat_factor"), options, records, seed=0)
    assert isinstance(repeating, RepeatFactor)
    assert repeating.length == 5  # 1.15 + 1.15 for class 0 in 3 of 4 images, 2 for class 5 in one, 1 without a label


def test_repeat_factors_are_those_of_detectron2() -> None:
    """Class 1 is in one image of 16: with a threshold of 1/4 it comes twice as often, the square root of 4."""
    records = [boxes(0)] * 15 + [boxes(0, 1)]
    options = head("DATALOADER.REPEAT_THRESHOLD", 0.25)
    stream = build_stream(source(sampler="repeat_factor"), options, records, seed=0)
    assert isinstance(stream, RepeatFactor)
    assert stream.length == 17
    assert Counter(stream.draw(p)[0] for p in range(17)) == {**dict.fromkeys(range(15), 1), 15: 2}
    linear = head("DATALOADER.REPEAT_THRESHOLD", 0.25, "DATALOADER.REPEAT_SQRT", False)
    assert build_stream(source(sampler="repeat_factor"), linear, records, seed=0).length == 19  # type: ignore[attr-defined]


def test_the_heads_config_decides_unless_the_source_does() -> None:
    lvis = head("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    assert sampler_of(source(), head()) == "shuffle"
    assert sampler_of(source(), lvis) == "repeat_factor"
    assert sampler_of(source(sampler="shuffle"), lvis) == "shuffle"
    with pytest.raises(ConfigError, match=r"SOURCES\.s: c\.yaml asks for DATALOADER\.SAMPLER_TRAIN 'RandomSubset"):
        sampler_of(source(), head("DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"))


def test_repeating_without_threshold_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"SOURCES\.s: .* repeats nothing, as DATALOADER\.REPEAT_THRESHOLD .* is 0"):
        build_stream(source(sampler="repeat_factor"), head(), [boxes(0)], seed=0)


@pytest.mark.parametrize("kind", ["class_aware", "repeat_factor"])
def test_label_maps_have_no_classes_to_go_by(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"TRAIN \['x'\]: the records have no class .* the sampler '{kind}' goes by"):
        build_stream(source(sampler=kind), head(), [{"sem_seg_file_name": "x.png"}], seed=0)


def sized(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"width": width, "height": height} for width, height in sizes]


def test_images_are_grouped_by_orientation_unless_nothing_is_won() -> None:
    both, one = sized((9, 6), (6, 9)), sized((9, 6), (8, 6))
    assert isinstance(build_stream(source(), head(), both, seed=0), Grouped)
    for options, records in (
        (head(), one),
        (head(), [*both, {}]),
        (head("DATALOADER.ASPECT_RATIO_GROUPING", False), both),
        (head("MODEL.META_ARCHITECTURE", "ImageClassifier"), both),
    ):
        assert isinstance(build_stream(source(), options, records, seed=0), Shuffled)
