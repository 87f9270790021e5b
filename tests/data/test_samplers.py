"""The joint sampler's laws: one stream per source, however it is started, shared out or accompanied."""

from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.data.samplers import Draw, JointSampler

SIZES = {"a": 7, "b": 13, "c": 4}
BATCHES = {"a": 4, "b": 2, "c": 6}

Step = list[Draw]


def steps(count: int, *, seed: int = 0, start: int = 0, **options: Any) -> list[Step]:
    arguments = {"sizes": SIZES, "batch_sizes": BATCHES, **options}
    return list(islice(JointSampler(seed=seed, start=start, **arguments), count))


def of(source: str, found: list[Step]) -> Step:
    return [draw for step in found for draw in step if draw.source == source]


@settings(deadline=None)
@given(size=st.integers(1, 40), batch=st.integers(1, 9), seed=st.integers(0, 2**31), epochs=st.integers(1, 4))
def test_each_epoch_has_every_index_once(size: int, batch: int, seed: int, epochs: int) -> None:
    found = steps(-(-size * epochs // batch), seed=seed, sizes={"a": size}, batch_sizes={"a": batch})
    indices = [draw.index for draw in of("a", found)]
    for epoch in range(epochs):
        assert sorted(indices[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(deadline=None)
@given(start=st.integers(0, 60), seed=st.integers(0, 2**31))
def test_stream_from_a_step_is_the_tail_of_the_whole(start: int, seed: int) -> None:
    assert steps(5, seed=seed, start=start) == steps(start + 5, seed=seed)[start:]


@settings(deadline=None)
@given(world_size=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 2**31), start=st.integers(0, 9))
def test_ranks_partition_each_step(world_size: int, seed: int, start: int) -> None:
    options: Any = {"seed": seed, "start": start, "batch_sizes": {"a": 6, "b": 12}}
    whole = steps(6, **options)
    parts = [steps(6, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for number, step in enumerate(whole):
        for source, batch in options["batch_sizes"].items():
            shares = [of(source, [part[number]]) for part in parts]
            assert {len(share) for share in shares} == {batch // world_size}
            assert [draw for share in shares for draw in share] == of(source, [step])


def test_every_step_has_every_sources_share_in_order() -> None:
    for step in steps(20):
        assert [draw.source for draw in step] == ["a"] * 4 + ["b"] * 2 + ["c"] * 6


@pytest.mark.parametrize("other", [{}, {"z": 5}, {"b": 13, "z": 5}])
def test_other_sources_leave_a_stream_alone(other: dict[str, int]) -> None:
    sizes = {**other, "a": SIZES["a"]}
    batches = {**dict.fromkeys(other, 3), "a": BATCHES["a"]}
    assert of("a", steps(9, sizes=sizes, batch_sizes=batches)) == of("a", steps(9))


def test_another_batch_size_gives_the_same_stream() -> None:
    few, many = (of("a", steps(12 // size, sizes={"a": 7}, batch_sizes={"a": size})) for size in (2, 6))
    assert few == many


def test_seeds_and_sources_and_epochs_differ() -> None:
    def orders(**options: Any) -> list[list[int]]:
        found = steps(3, sizes={"a": 30, "b": 30}, batch_sizes={"a": 30, "b": 30}, **options)
        return [[draw.index for draw in of(source, [step])] for step in found for source in "ab"]

    everything = orders(seed=0) + orders(seed=1)
    assert len({tuple(order) for order in everything}) == len(everything)
    assert all(order != list(range(30)) for order in everything)


def test_augmentation_seeds_are_new_each_epoch_and_valid_for_numpy() -> None:
    found = of("a", steps(50))
    assert len({draw.seed for draw in found}) == len(found)
    assert all(0 <= draw.seed < 2**32 for draw in found)


def test_iterating_twice_gives_the_same() -> None:
    sampler = JointSampler(sizes=SIZES, batch_sizes=BATCHES, seed=3)
    first = list(islice(sampler, 8))
    assert list(islice(sampler, 8)) == first
    sampler.start = 5
    assert list(islice(sampler, 3)) == first[5:]


def test_one_image_is_enough() -> None:
    assert [draw.index for draw in of("a", steps(3, sizes={"a": 1}, batch_sizes={"a": 2}))] == [0] * 6


def test_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="4 images of source 'a' a step cannot be shared by 3 workers"):
        JointSampler(sizes=SIZES, batch_sizes=BATCHES, seed=0, world_size=3)


def test_source_without_images() -> None:
    with pytest.raises(ValueError, match="Source 'b' has no images"):
        JointSampler(sizes={**SIZES, "b": 0}, batch_sizes=BATCHES, seed=0)


def test_source_without_size() -> None:
    with pytest.raises(KeyError, match="c"):
        JointSampler(sizes={"a": 1, "b": 1}, batch_sizes=BATCHES, seed=0)
