"""Which images of which source each worker sees in each step; a pure function of seed and step, so resume is exact."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of a step: its source, its index there, and the seed of its augmentation."""

    source: str
    index: int
    seed: int


class JointSampler(Sampler[list[Draw]]):
    """Endless steps, each with images of every source.

    A source is an endless stream of shuffled epochs. Step ``i`` takes the next ``batch_sizes[source]`` positions of
    each stream, and of these each rank its own part, so any number of ranks sees the same images in a step.

    Args:
        sizes: number of images of each source.
        batch_sizes: images of each source in a step, over all ranks; divisible by ``world_size``.
        seed: of the streams; alike on all ranks.
        start: first step to give, when resuming.
        rank, world_size: this worker and the number of workers.
    """

    def __init__(
        self,
        *,
        sizes: Mapping[str, int],
        batch_sizes: Mapping[str, int],
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        for source, size in batch_sizes.items():
            if size % world_size:
                raise ValueError(f"{size} images of source {source!r} a step cannot be shared by {world_size} workers.")
            if not sizes[source]:
                raise ValueError(f"Source {source!r} has no images.")
        self.sizes = dict(sizes)
        self.batch_sizes = dict(batch_sizes)
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size
        self._epochs: dict[str, tuple[int, list[int]]] = {}

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start
        while True:
            yield [draw for source in self.batch_sizes for draw in self._draw(step, source)]
            step += 1

    def _draw(self, step: int, source: str) -> Iterator[Draw]:
        batch = self.batch_sizes[source]
        share = batch // self.world_size
        first = step * batch + self.rank * share
        for position in range(first, first + share):
            epoch, offset = divmod(position, self.sizes[source])
            yield Draw(source, self._order(source, epoch)[offset], self._seed_of(source, "augmentation", position))

    def _order(self, source: str, epoch: int) -> list[int]:
        """The shuffled indices of one epoch; only the latest one is kept."""
        if self._epochs.get(source, (-1, []))[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed_of(source, "order", epoch))
            self._epochs[source] = (epoch, torch.randperm(self.sizes[source], generator=generator).tolist())
        return self._epochs[source][1]

    def _seed_of(self, source: str, purpose: str, number: int) -> int:
        # By name, so that adding or dropping a source leaves the streams of the others alone.
        return zlib.crc32(f"{self.seed}/{source}/{purpose}/{number}".encode())
