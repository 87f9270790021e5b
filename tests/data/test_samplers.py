"""The joint sampler's laws: one stream per source, however it is started, shared out or accompanied."""

from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.data.samplers import Draw, JointSampler, Turns
from xlearner_d2.data.streams import Shuffled

SIZES = {"a": 7, "b": 13, "c": 4}
BATCHES = {"a": 4, "b": 2, "c": 6}

Step = list[Draw]


def sampler(*, seed: int = 0, sizes: dict[str, int] = SIZES, **options: Any) -> JointSampler:
    streams = {source: Shuffled(size, seed=(seed, source)) for source, size in sizes.items()}
    return JointSampler(streams=streams, seed=seed, **{"batch_sizes": BATCHES, **options})


def steps(count: int, **options: Any) -> list[Step]:
    return list(islice(sampler(**options), count))


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
    joint = sampler(seed=3)
    first = list(islice(joint, 8))
    assert list(islice(joint, 8)) == first
    joint.start = 5
    assert list(islice(joint, 3)) == first[5:]


def test_one_image_is_enough() -> None:
    assert [draw.index for draw in of("a", steps(3, sizes={"a": 1}, batch_sizes={"a": 2}))] == [0] * 6


def test_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="4 images of source 'a' a step cannot be shared by 3 workers"):
        sampler(world_size=3)


def test_source_without_stream() -> None:
    with pytest.raises(KeyError, match="c"):
        sampler(sizes={"a": 1, "b": 1})


TURNS = {"a": 6, "b": 2, "c": 4}


def test_alternating_steps_have_one_source_and_each_its_part_of_any_round() -> None:
    found = steps(60, turns=TURNS)
    assert all(len({draw.source for draw in step}) == 1 for step in found)
    order = [step[0].source for step in found]
    for first in range(54):  # 6 is a round, as 6 : 2 : 4 is 3 : 1 : 2
        part = order[first : first + 6]
        assert {source: part.count(source) for source in "abc"} == {"a": 3, "b": 1, "c": 2}


@settings(deadline=None)
@given(turns=st.fixed_dictionaries({source: st.integers(1, 9) for source in "abc"}))
def test_turns_are_spread_over_the_round(turns: dict[str, int]) -> None:
    """No source is ever further than one turn a source from its even share."""
    total, drawn = sum(turns.values()), dict.fromkeys(turns, 0)
    schedule = Turns(tuple(turns), turns)
    for step in range(2 * total):
        ((source, before),) = schedule.at(step)
        assert before == drawn[source]
        drawn[source] += 1
        assert all(abs(drawn[s] - (step + 1) * turns[s] / total) < len(turns) for s in turns)


def test_alternating_gives_each_source_the_stream_of_joint_steps() -> None:
    joint, alternating = steps(4), steps(24, turns=TURNS)
    for source in "abc":
        assert of(source, joint) == of(source, alternating)[: len(of(source, joint))]


@settings(deadline=None)
@given(start=st.integers(0, 60), seed=st.integers(0, 2**31))
def test_alternating_stream_from_a_step_is_the_tail_of_the_whole(start: int, seed: int) -> None:
    whole = steps(start + 5, seed=seed, turns=TURNS)
    assert steps(5, seed=seed, start=start, turns=TURNS) == whole[start:]
