"""Which images of which source each worker sees in each step; a pure function of seed and step, so resume is exact."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import gcd

from torch.utils.data import Sampler

from .streams import Stream, seed_of


@dataclass(frozen=True, slots=True)
class Draw:
    """One image of a step: its source, its index there, and the seed of its augmentation."""

    source: str
    index: int
    seed: int


class Turns:
    """Which sources a step draws from.

    Args:
        turns: by source, how many steps of a round are its own; empty: every step draws from every source. The steps
            of a source are spread evenly over the round.
        sources: all of them, in order.
    """

    def __init__(self, sources: tuple[str, ...], turns: Mapping[str, int]):
        self.sources = sources
        divisor = gcd(*turns.values()) if turns else 1
        self.turns = {source: turns[source] // divisor for source in sources} if turns else {}
        times = [((n + 0.5) / count, source) for source, count in self.turns.items() for n in range(count)]
        #: the sources of a round's steps; sorting is stable, so that equal times follow the order of the sources
        self.round = [source for _, source in sorted(times, key=lambda item: item[0])]

    def at(self, step: int) -> list[tuple[str, int]]:
        """(source, how often it was drawn before) for each source of a step."""
        if not self.round:
            return [(source, step) for source in self.sources]
        rounds, offset = divmod(step, len(self.round))
        source = self.round[offset]
        return [(source, rounds * self.turns[source] + self.round[:offset].count(source))]


class JointSampler(Sampler[list[Draw]]):
    """Endless steps, each with images of every source, or of one source after the other.

    The ``n``-th step that draws from a source takes the next ``batch_sizes[source]`` positions of its stream, and of
    these each rank its own part, so any number of ranks sees the same images in a step.

    Args:
        streams: of each source.
        batch_sizes: images of each source in a step that draws from it, over all ranks; divisible by ``world_size``.
        turns: see :class:`Turns`.
        seed: of the augmentations; alike on all ranks.
        start: first step to give, when resuming.
        rank, world_size: this worker and the number of workers.
    """

    def __init__(
        self,
        *,
        streams: Mapping[str, Stream],
        batch_sizes: Mapping[str, int],
        seed: int,
        turns: Mapping[str, int] | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        for source, size in batch_sizes.items():
            if size % world_size:
                raise ValueError(f"{size} images of source {source!r} a step cannot be shared by {world_size} workers.")
        self.streams = {source: streams[source] for source in batch_sizes}
        self.batch_sizes = dict(batch_sizes)
        self.turns = Turns(tuple(batch_sizes), turns or {})
        self.seed = seed
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[Draw]]:
        step = self.start
        while True:
            yield [draw for source, number in self.turns.at(step) for draw in self._draw(source, number)]
            step += 1

    def _draw(self, source: str, number: int) -> Iterator[Draw]:
        """This rank's part of a source's batch."""
        batch = self.batch_sizes[source]
        share = batch // self.world_size
        first = number * batch + self.rank * share
        for position in range(first, first + share):
            index, draw = self.streams[source].draw(position)
            # By name, so that adding or dropping a source leaves the streams of the others alone.
            yield Draw(source, index, seed_of(self.seed, source, "augmentation", draw))
