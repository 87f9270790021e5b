"""TRAIN_SHARE: what a random share of a data set is."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.data.subset import random_share, share_of_records
from xlearner_d2.specs import parse_sources


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.001, 1), st.integers(0, 5))
def test_share_is_a_random_part(size: int, share: float, seed: int) -> None:
    chosen = random_share(size, share, seed=seed)
    assert len(chosen) == max(1, round(size * share))
    assert sorted({*chosen}) == chosen
    assert 0 <= chosen[0] <= chosen[-1] < size
    assert chosen == random_share(size, share, seed=seed)


def labelled(count: int) -> list[dict[str, Any]]:
    return [{"image_id": number, "category_id": number % 3} for number in range(count)]


def unlabelled(count: int) -> list[dict[str, Any]]:
    return [{"image_id": number} for number in range(count)]


@pytest.mark.parametrize("make", [labelled, unlabelled])
def test_shares_of_one_seed_are_nested(make: Any) -> None:
    """So that a curve over shares is one of more data, not of other data."""
    small, large = (
        {record["image_id"] for record in share_of_records(make(90), share, seed=2)} for share in (0.1, 0.5)
    )
    assert len(small) == 9
    assert len(large) == 45
    assert small < large


def test_every_class_keeps_its_share() -> None:
    kept = share_of_records(labelled(120), 0.1, seed=0)
    assert [record["category_id"] for record in kept].count(0) == 4
    assert [record["category_id"] for record in kept].count(2) == 4
    assert [record["image_id"] for record in kept] == sorted(record["image_id"] for record in kept)
    # Not the same places in each class.
    assert len({record["image_id"] // 3 for record in kept}) > 4


def test_another_seed_draws_others() -> None:
    first, second = (share_of_records(unlabelled(100), 0.2, seed=seed) for seed in (0, 1))
    assert first != second


def test_the_whole_is_the_whole() -> None:
    records = labelled(7)
    assert share_of_records(records, 1.0, seed=3) is records
    assert share_of_records([], 0.5, seed=3) == []


@pytest.mark.parametrize("share", [0.0, 1.5, float("nan")])
def test_wrong_share(share: float) -> None:
    problems: list[str] = []
    record = {"TASK": "detection", "CONFIG": "c.yaml", "TRAIN": ["a"], "TRAIN_SHARE": share}
    parse_sources({"boxes": record}, problems)
    assert problems == [
        f"XLEARNER.SOURCES.boxes.TRAIN_SHARE is {share}, but more than 0 and at most 1 is expected.",
    ]
