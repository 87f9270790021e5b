"""Endless streams of image indices of one source; each draw is a pure function of the seed and its position."""

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

#: How many batches are drawn at a time to be grouped by aspect ratio; of these, one at most holds both kinds.
WINDOW = 16


def seed_of(*parts: object) -> int:
    """A seed below 2**32 that differs for different parts."""
    return zlib.crc32("/".join(map(str, parts)).encode())


def permutation(size: int, seed: int) -> np.ndarray:
    """The numbers below ``size`` in an order that the seed decides; (size,), int64."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).numpy()


class Stream(Protocol):
    """What a source's images are drawn from."""

    def draw(self, position: int) -> tuple[int, int]:
        """(index of the image, the number of this draw, which seeds its augmentation)."""


class _Epochs:
    """A stream cut into epochs, of which the latest one is kept."""

    def __init__(self, length: int, order: Callable[[int], np.ndarray]):
        self.length = length
        self._order = order
        self._latest: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if self._latest[0] != epoch:
            self._latest = (epoch, self._order(epoch))
        return int(self._latest[1][offset])


class Shuffled:
    """Shuffled epochs: every image once in each.

    Args:
        size: number of images; at least 1.
        seed: parts of the seed; equal parts give equal streams.
    """

    def __init__(self, size: int, *, seed: Sequence[object]):
        self._epochs = _Epochs(size, lambda epoch: permutation(size, seed_of(*seed, "order", epoch)))

    def draw(self, position: int) -> tuple[int, int]:
        return self._epochs[position], position


class RepeatFactor:
    """Shuffled epochs in which each image comes as often as its repeat factor says, rounded up or down at random.

    Detectron2's RepeatFactorTrainingSampler rounds each factor by itself, so its epochs differ in length. Here the
    factors of an epoch are rounded together (systematic sampling): all epochs have the same length, the rounded sum of
    the factors, and any position is found without drawing those before it.

    Args:
        factors: by image, how often it comes in an epoch, on average; (N,).
        seed: parts of the seed.
    """

    def __init__(self, factors: torch.Tensor, *, seed: Sequence[object]):
        length = max(round(float(factors.double().sum())), 1)
        self._shares = factors.double().numpy() * (length / float(factors.double().sum()))
        self._seed = tuple(seed)
        self.length = length
        self._epochs = _Epochs(length, self._order)

    def _order(self, epoch: int) -> np.ndarray:
        generator = np.random.default_rng(seed_of(*self._seed, "repeat", epoch))
        images = generator.permutation(len(self._shares))
        edges = np.cumsum(self._shares[images])
        edges[-1] = self.length  # exactly, so that rounding loses no image
        counts = np.diff(np.floor(edges + generator.random()).astype(int), prepend=0)
        return generator.permutation(np.repeat(images, counts))

    def draw(self, position: int) -> tuple[int, int]:
        return self._epochs[position], position


class ClassAware:
    """Rounds in which every class comes once, each time with the next of its images; those are shuffled in turn.

    Args:
        images_of: by class, the indices of the images that show it; none is empty.
        seed: parts of the seed.
    """

    def __init__(self, images_of: Sequence[Sequence[int]], *, seed: Sequence[object]):
        self._images_of = images_of
        number = len(images_of)
        self._rounds = _Epochs(number, lambda round_: permutation(number, seed_of(*seed, "classes", round_)))
        self._visits = [Shuffled(len(images), seed=(*seed, "class", c)) for c, images in enumerate(images_of)]

    def draw(self, position: int) -> tuple[int, int]:
        chosen = self._rounds[position]
        visit, _ = self._visits[chosen].draw(position // len(self._images_of))
        return self._images_of[chosen][visit], position


class Grouped:
    """Another stream, reordered so that almost every batch has images of one kind; see :data:`WINDOW`.

    The draws of a window are sorted by kind, cut into batches, and the batches are shuffled.

    Args:
        stream: the draws to reorder.
        kinds: by image, its kind, such as landscape or portrait.
        batch_size: over all workers.
        seed: parts of the seed.
    """

    def __init__(self, stream: Stream, *, kinds: Sequence[int], batch_size: int, seed: Sequence[object]):
        self._stream = stream
        self._kinds = kinds
        self._batch_size = batch_size
        self._seed = tuple(seed)
        self._latest: tuple[int, list[tuple[int, int]]] = (-1, [])

    def draw(self, position: int) -> tuple[int, int]:
        window, offset = divmod(position, WINDOW * self._batch_size)
        if self._latest[0] != window:
            self._latest = (window, self._arrange(window))
        return self._latest[1][offset]

    def _arrange(self, window: int) -> list[tuple[int, int]]:
        size = self._batch_size
        drawn = [self._stream.draw(p) for p in range(window * WINDOW * size, (window + 1) * WINDOW * size)]
        drawn.sort(key=lambda draw: self._kinds[draw[0]])
        order = permutation(WINDOW, seed_of(*self._seed, "window", window))
        return [draw for number in order for draw in drawn[number * size : (number + 1) * size]]
