"""What the statistics of a transfer study consist of; docs/TRANSFER.md defines every figure."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.special import stdtrit

#: In the order in which tables and figures show them; other names follow.
ROLES = ("random", "single", "shared", "separate", "expanded", "squeezed")
FAMILIES = ("classification", "detection", "segmentation")
OVERALL = "overall"
#: What a goal can be about; names of fields of Comparison.
MEASURES = ("difference", "gain", "retention")
#: Probability with which an interval covers the mean.
LEVEL = 0.95


def role_of(backbone: str) -> str:
    """``single`` of ``single/caltech``."""
    return backbone.partition("/")[0]


def backbone_order(backbone: str) -> tuple[int, str]:
    """Key that sorts backbones by role, then by name."""
    role = role_of(backbone)
    return ROLES.index(role) if role in ROLES else len(ROLES), backbone


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds with its Student t interval.

    Attributes:
        by_seed: the values, in order of the seeds.
        mean: None without a value.
        std: sample standard deviation; None below two seeds.
        half_width: of the 95 % interval around the mean; None below two seeds.
    """

    by_seed: Mapping[int, float]
    mean: float | None = None
    std: float | None = None
    half_width: float | None = None

    @classmethod
    def of(cls, by_seed: Mapping[int, float]) -> "Estimate":
        ordered = dict(sorted(by_seed.items()))
        values, n = list(ordered.values()), len(ordered)
        if n < 2:
            return cls(by_seed=ordered, mean=values[0] if values else None)
        std = stdev(values)
        half_width = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * std / math.sqrt(n)
        return cls(by_seed=ordered, mean=fmean(values), std=std, half_width=half_width)

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its lower and upper end; None below two seeds."""
        if self.mean is None or self.half_width is None:
            return None
        return self.mean - self.half_width, self.mean + self.half_width


@dataclass(frozen=True, kw_only=True)
class SetMean:
    """One backbone on one set under one protocol. ``curve`` holds (x, mean y, seeds) if the cells have curves."""

    set_name: str
    family: str
    protocol: str
    metric: str
    backbone: str
    value: Estimate
    curve: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True, kw_only=True)
class FamilyMean:
    """One backbone over the sets of a family, or overall, over the seeds that have all of them."""

    family: str
    backbone: str
    value: Estimate


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The subject against the representative of a role, paired by seed.

    Attributes:
        role: of the baseline.
        baseline: the role's representative in the family, or overall.
        choice: where it is the strongest of its role: "family", in the family at hand; "overall", in the mean of all.
        kind: set, family or overall.
        name: of the set or family; "overall".
        difference: subject minus baseline, in points.
        gain: mean over sets of the difference relative to the baseline, in percent; empty if a baseline is not above 0.
        retention: mean of the subject over that of the baseline, in percent; empty if a baseline is not above 0.
    """

    role: str
    baseline: str
    choice: str
    kind: str
    name: str
    difference: Estimate
    gain: Estimate
    retention: Estimate


@dataclass(frozen=True, kw_only=True)
class Goal:
    """``measure`` against the representative of ``role``, in a family or overall, should be ``at_least`` this.

    ``choice`` says which representative of the role, as in :class:`Comparison`.
    """

    role: str
    family: str
    measure: str
    at_least: float
    choice: str = "family"


#: The gains over a pre-trained model that X-Learner's abstract states, in points.
_PUBLISHED = {"classification": 3.0, "detection": 3.3, "segmentation": 1.8}
#: These gains over the best specialist of each family, and over the one single-task file that is best for all; no loss
#: against hard sharing; what squeezing may cost.
GOALS = (
    *(
        Goal(role="single", family=family, measure="difference", at_least=points, choice=choice)
        for choice in ("family", OVERALL)
        for family, points in _PUBLISHED.items()
    ),
    *(Goal(role="shared", family=family, measure="difference", at_least=0.0) for family in FAMILIES),
    Goal(role="expanded", family=OVERALL, measure="retention", at_least=98.0),
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A goal and what was found; everything but the goal is "" or None where it cannot be judged.

    Attributes:
        missed_by: 0 when the goal is reached.
        certain: the whole interval reaches the goal; None below two seeds.
        excludes_zero: the interval does; None below two seeds and for retention.
    """

    goal: Goal
    baseline: str = ""
    found: Estimate | None = None
    reached: bool | None = None
    missed_by: float | None = None
    certain: bool | None = None
    excludes_zero: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """Whether a set under a protocol tells backbones apart. "Trained" is every backbone but those of the role random.

    Attributes:
        trivial: value of a predictor that learns nothing from the images; None where none is known.
        random: best mean of the random backbones.
        best: best mean of the trained ones; here and below, of those that have every seed, if there are two.
        spread: best minus worst mean of the trained ones; None below two of them.
        noise: standard deviation over seeds, pooled over the trained ones.
        flat: the spread is less than the noise.
        chance: probability that trained backbones that are alike would differ as much as these do (one-way analysis of
            variance); None below two of them or two seeds. Without noise, any difference is beyond it.
    """

    set_name: str
    protocol: str
    trivial: float | None
    random: float | None
    best: float | None
    spread: float | None
    noise: float | None
    flat: bool | None
    chance: float | None


@dataclass(frozen=True, kw_only=True)
class MissingCell:
    """A primary cell that the study should have but has not."""

    set_name: str
    protocol: str
    backbone: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that is computed from the cells.

    Attributes:
        subject: the backbone that is compared with the others.
        backbones, families, seeds: in the order in which they are shown; families hold their sets.
        primary: protocol of each set that means over sets and comparisons take.
        representatives: role -> family or "overall" -> backbone, where there is one.
        missing: of the full grid of sets, backbones and seeds under the primary protocols.
    """

    subject: str
    backbones: tuple[str, ...]
    families: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    primary: Mapping[str, str]
    representatives: Mapping[str, Mapping[str, str]]
    verdicts: tuple[Verdict, ...]
    family_means: tuple[FamilyMean, ...]
    comparisons: tuple[Comparison, ...]
    set_means: tuple[SetMean, ...]
    checks: tuple[Check, ...]
    missing: tuple[MissingCell, ...]
