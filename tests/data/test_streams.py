"""Laws of the streams that images are drawn from: how often each comes, and that any position can be asked for."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xlearner_d2.data.streams import WINDOW, ClassAware, Grouped, RepeatFactor, Shuffled, Stream

KINDS = [int(n % 3 == 0) for n in range(50)]
FACTORS = torch.tensor([1.0, 1.0, 2.5, 1.0, 4.25, 1.0, 1.5])
MEMBERS = [[0, 1, 2, 3, 4, 5], [5, 6], [7]]


def grouped(seed: int, batch_size: int = 4) -> Grouped:
    return Grouped(Shuffled(50, seed=(seed,)), kinds=KINDS, batch_size=batch_size, seed=(seed,))


STREAMS: dict[str, Callable[[int], Stream]] = {
    "shuffled": lambda seed: Shuffled(20, seed=(seed,)),
    "repeat": lambda seed: RepeatFactor(FACTORS, seed=(seed,)),
    "classes": lambda seed: ClassAware(MEMBERS, seed=(seed,)),
    "grouped": grouped,
}


def indices(stream: Stream, count: int, start: int = 0) -> list[int]:
    return [stream.draw(position)[0] for position in range(start, start + count)]


@pytest.mark.parametrize("kind", STREAMS)
@given(positions=st.lists(st.integers(0, 900), min_size=1, max_size=8), seed=st.integers(0, 9))
def test_a_draw_depends_on_seed_and_position_alone(kind: str, positions: list[int], seed: int) -> None:
    """In whatever order the positions are asked for, as a resumed run does."""
    used = STREAMS[kind](seed)
    assert [used.draw(p) for p in positions] == [STREAMS[kind](seed).draw(p) for p in positions]


@pytest.mark.parametrize("kind", STREAMS)
def test_each_draw_has_a_number_of_its_own(kind: str) -> None:
    stream = STREAMS[kind](0)
    numbers = [stream.draw(position)[1] for position in range(640)]
    assert sorted(numbers) == list(range(640))


@pytest.mark.parametrize("kind", STREAMS)
def test_seeds_differ(kind: str) -> None:
    assert indices(STREAMS[kind](0), 60) != indices(STREAMS[kind](1), 60)


@given(st.lists(st.floats(1, 9), min_size=1, max_size=30), st.integers(0, 2**31))
def test_repeat_factors_are_rounded_up_or_down(factors: list[float], seed: int) -> None:
    stream = RepeatFactor(torch.tensor(factors), seed=(seed,))
    exact = np.array(factors, dtype=np.float32).astype(float)
    exact *= stream.length / exact.sum()
    assert abs(stream.length - exact.sum()) < 0.5 + 1e-6
    for epoch in range(3):
        found = Counter(indices(stream, stream.length, epoch * stream.length))
        for image, factor in enumerate(exact):
            assert np.floor(factor - 1e-9) <= found[image] <= np.ceil(factor + 1e-9), image


def test_repeat_factors_hold_on_average() -> None:
    stream = RepeatFactor(FACTORS, seed=(0,))
    epochs = 4000
    found = np.bincount(indices(stream, epochs * stream.length), minlength=7) / epochs
    expected = FACTORS.numpy() * stream.length / float(FACTORS.sum())
    assert np.abs(found - expected).max() < 5 * 0.5 / epochs**0.5  # five standard deviations of rounding


def test_ones_are_shuffled_epochs() -> None:
    stream = RepeatFactor(torch.ones(9), seed=(0,))
    for epoch in range(5):
        assert sorted(indices(stream, 9, 9 * epoch)) == list(range(9))


def test_class_aware_draws_classes_evenly_and_their_images_evenly() -> None:
    """Image 5 has two classes, and comes for either."""
    found = Counter(indices(ClassAware(MEMBERS, seed=(0,)), 3 * 60))
    assert found == {0: 10, 1: 10, 2: 10, 3: 10, 4: 10, 5: 10 + 30, 6: 30, 7: 60}


def test_every_class_comes_once_a_round() -> None:
    stream = ClassAware([[0], [1], [2], [3]], seed=(0,))
    rounds = [tuple(indices(stream, 4, 4 * number)) for number in range(20)]
    assert all(sorted(found) == [0, 1, 2, 3] for found in rounds)
    assert len(set(rounds)) > 5


@given(batch_size=st.integers(1, 9), seed=st.integers(0, 99), window=st.integers(0, 5))
def test_grouping_mixes_one_batch_of_a_window_at_most(batch_size: int, seed: int, window: int) -> None:
    size = WINDOW * batch_size
    found = indices(grouped(seed, batch_size), size, window * size)
    batches = [found[start : start + batch_size] for start in range(0, size, batch_size)]
    mixed = [batch for batch in batches if len({KINDS[index] for index in batch}) > 1]
    assert len(mixed) <= 1
    assert sorted(found) == sorted(indices(Shuffled(50, seed=(seed,)), size, window * size))


def test_batches_of_a_kind_do_not_come_in_a_row() -> None:
    found = [KINDS[index] for index in indices(grouped(0, 1), WINDOW * 4)]
    assert found != sorted(found)
