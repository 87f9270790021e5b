"""What the steps of each stage draw from, and how losses are weighed: settings checked and applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from detectron2.config import CfgNode

from ..data.balance import share_images
from ..data.samplers import Turns
from ..data.sources import SourceData
from ..modeling.weighting import METHODS
from ..settings import STEPS
from ..specs import ConfigError, SourceSpec, one_of


@dataclass(frozen=True)
class Drawn:
    """What the steps of a stage draw from.

    Attributes:
        sources: with the images of a step that draws from each.
        turns: by source, how many of so many steps are its own; empty when every step draws from every source.
    """

    sources: tuple[SourceSpec, ...]
    turns: Mapping[str, int]

    @property
    def round_length(self) -> int:
        """After how many steps the sources have their turns anew; 1 when every step draws from every source."""
        return max(1, len(Turns(tuple(self.turns), self.turns).round))

    def part(self, source: SourceSpec) -> float:
        """The part of the steps that draw from a source."""
        return self.turns[source.name] / sum(self.turns.values()) if self.turns else 1.0

    @property
    def images_per_step(self) -> float:
        """Of all sources; of alternating steps the mean."""
        return sum(self.part(source) * source.ims_per_batch for source in self.sources)


def check_sampling(cfg: CfgNode, world_size: int) -> list[str]:
    """Problems of ``XLEARNER.STEPS`` and ``XLEARNER.SAMPLING``."""
    sampling, problems = cfg.XLEARNER.SAMPLING, one_of("STEPS", cfg.XLEARNER.STEPS, STEPS)
    if sampling.IMS_PER_BATCH < 0 or sampling.IMS_PER_BATCH % world_size:
        wish = f"a multiple of the number of workers, {world_size}," if world_size > 1 else "a number of at least 0"
        problems.append(f"XLEARNER.SAMPLING.IMS_PER_BATCH is {sampling.IMS_PER_BATCH}, but {wish} is expected.")
    if not sampling.TEMPERATURE > 0:
        problems.append(f"XLEARNER.SAMPLING.TEMPERATURE is {sampling.TEMPERATURE}, but a positive number is expected.")
    return problems


def check_weighting(cfg: CfgNode, drawn: Mapping[str, Drawn]) -> list[str]:
    """Problems of ``XLEARNER.WEIGHTING``."""
    weighting = cfg.XLEARNER.WEIGHTING
    problems = one_of("WEIGHTING.METHOD", weighting.METHOD, ("fixed", *METHODS))
    if not weighting.TEMPERATURE > 0:
        got = f"XLEARNER.WEIGHTING.TEMPERATURE is {weighting.TEMPERATURE}"
        problems.append(f"{got}, but a positive number is expected.")
    least = max(of.round_length for of in drawn.values())
    if weighting.METHOD == "dwa" and least > weighting.WINDOW:
        round_ = ", a round of alternating steps," if least > 1 else ""
        got = f"XLEARNER.WEIGHTING.WINDOW is {weighting.WINDOW}"
        problems.append(f"{got}, but a number of at least {least}{round_} is expected.")
    return problems


def balance(cfg: CfgNode, sources: Sequence[SourceSpec], data: Mapping[str, SourceData], world_size: int) -> Drawn:
    """The images of each source in a step that draws from it, and the turns of the sources.

    Raises:
        ConfigError: when the images of a step cannot be shared.
    """
    total, alternating = cfg.XLEARNER.SAMPLING.IMS_PER_BATCH, cfg.XLEARNER.STEPS == "alternating"
    if not total:
        return Drawn(tuple(sources), {source.name: 1 for source in sources} if alternating else {})
    sizes = {source.name: len(data[source.name].train) for source in sources}
    temperature = cfg.XLEARNER.SAMPLING.TEMPERATURE
    try:
        shares = share_images(total, sizes, temperature=temperature, workers=1 if alternating else world_size)
    except ValueError as error:
        raise ConfigError([f"XLEARNER.SAMPLING.IMS_PER_BATCH: {error}."]) from error
    if alternating:
        return Drawn(tuple(replace(source, ims_per_batch=total) for source in sources), shares)
    return Drawn(tuple(replace(source, ims_per_batch=shares[source.name]) for source in sources), {})
