"""Statistics of a transfer study from its finished cells alone; docs/TRANSFER.md defines every figure."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from statistics import fmean

from scipy.special import fdtrc

from ..specs import ConfigError
from .consistency import cell_key, curve_of, record_problems
from .records import CellRecord
from .study import (
    FAMILIES,
    GOALS,
    MEASURES,
    OVERALL,
    Check,
    Comparison,
    Estimate,
    FamilyMean,
    Goal,
    MissingCell,
    SetMean,
    Study,
    Verdict,
    backbone_order,
    role_of,
)

#: The backbone that is judged unless another one is named.
SUBJECT = "squeezed"
#: Set -> seed -> value; a set or a seed that is not there has no cell.
Values = Mapping[str, Mapping[int, float]]
#: Sets in groups: what is averaged within each group, then over the groups.
Groups = Sequence[Sequence[str]]
_ROUNDING = 1e-9  # of sums of floats, where a goal is met exactly


@dataclass(frozen=True, kw_only=True)
class _Scope:
    """What a mean is taken over: a set, a family, or all; ``family`` is where a representative is chosen."""

    kind: str
    name: str
    family: str
    groups: Groups


def analyse(
    records: Iterable[CellRecord],
    *,
    subject: str = SUBJECT,
    primary: Mapping[str, str] | None = None,
    goals: Sequence[Goal] = GOALS,
) -> Study:
    """All statistics of a study; the order of the records does not matter.

    Args:
        records: at most one for each cell; cells may be missing.
        subject: a backbone, or a role that has one backbone only.
        primary: set -> protocol, for sets whose primary protocol is not to be the one with most cells.
        goals: of the verdicts, which come in this order; none if no backbone has a role that a goal is about.

    Raises:
        ConfigError: for no record, records that contradict one another, and names that are not there.
    """
    records, primary = list(records), primary or {}
    problems = [*record_problems(records), *_primary_problems(records, primary)]
    problems += [
        f"A goal's measure is {goal.measure!r}, but one of {', '.join(MEASURES)} is expected."
        for goal in goals
        if goal.measure not in MEASURES
    ]
    backbones = tuple(sorted({record.backbone for record in records}, key=backbone_order))
    problems += _subject_problems(subject, backbones) if records else []
    if problems:
        raise ConfigError(problems, what="The transfer study")
    records.sort(key=cell_key)
    return _analyse(records, backbones, _variants(subject, backbones)[0], _primary(records, primary), goals)


def _analyse(
    records: Sequence[CellRecord],
    backbones: tuple[str, ...],
    subject: str,
    primary: Mapping[str, str],
    goals: Sequence[Goal],
) -> Study:
    families = _families(records)
    scopes = _scopes(families)
    values = _primary_values(records, primary)
    representatives = _representatives(values, scopes, backbones, subject)
    comparisons = tuple(_comparisons(values, scopes, representatives, subject))
    roles = {role_of(name) for name in backbones if name != subject}
    goals = goals if any(goal.role in roles for goal in goals) else ()
    set_means = tuple(_set_means(records, families))
    seeds = tuple(sorted({record.seed for record in records}))
    return Study(
        subject=subject,
        backbones=backbones,
        families=families,
        seeds=seeds,
        primary={name: primary[name] for names in families.values() for name in names},
        representatives=representatives,
        verdicts=tuple(_verdict(goal, comparisons) for goal in goals),
        family_means=tuple(
            FamilyMean(family=scope.name, backbone=name, value=Estimate.of(_mean(values[name], scope.groups)))
            for scope in scopes
            if scope.kind != "set"
            for name in backbones
        ),
        comparisons=comparisons,
        set_means=set_means,
        checks=tuple(_checks(records, set_means)),
        missing=tuple(
            MissingCell(set_name=scope.name, protocol=primary[scope.name], backbone=name, seed=seed)
            for scope in scopes
            if scope.kind == "set"
            for name in backbones
            for seed in seeds
            if seed not in values[name][scope.name]
        ),
    )


def _primary_problems(records: Sequence[CellRecord], primary: Mapping[str, str]) -> Iterator[str]:
    protocols: dict[str, set[str]] = defaultdict(set)
    first: dict[str, set[str]] = defaultdict(set)
    for record in records:
        protocols[record.set_name].add(record.protocol)
        if record.primary:
            first[record.set_name].add(record.protocol)
    for name, found in first.items():
        if len(found) > 1 and name not in primary:
            yield f"{name} has several primary protocols, {', '.join(sorted(found))}: choose one with --primary."
    for name, protocol in primary.items():
        if name not in protocols:
            yield f"There is a primary protocol for {name}, but the sets are {', '.join(sorted(protocols))}."
        elif protocol not in protocols[name]:
            yield f"The primary protocol of {name} is {protocol!r}, but it has {', '.join(sorted(protocols[name]))}."


def _variants(name: str, backbones: Sequence[str]) -> list[str]:
    """The backbone of that name, or else those of that role."""
    return [name] if name in backbones else [backbone for backbone in backbones if role_of(backbone) == name]


def _subject_problems(name: str, backbones: Sequence[str]) -> Iterator[str]:
    found = _variants(name, backbones)
    if not found:
        yield f"The subject is {name!r}, but the backbones are {', '.join(backbones)}."
    if len(found) > 1:  # to take the best one would favour it over its baselines
        yield f"The subject is {name!r}, of which there are {len(found)}: choose one of {', '.join(found)}."


def check_subject(name: str, backbones: Iterable[str]) -> None:
    """See that a backbone, or a role of one, is there to be judged; known before anything is measured.

    Raises:
        ConfigError: when it is not, or is a role of several.
    """
    problems = list(_subject_problems(name, sorted(set(backbones), key=backbone_order)))
    if problems:
        raise ConfigError(problems, what="The command line")


# --- means over sets


def _families(records: Iterable[CellRecord]) -> dict[str, tuple[str, ...]]:
    """Family -> its sets."""
    sets = defaultdict(set)
    for record in records:
        sets[record.family].add(record.set_name)
    order = {name: rank for rank, name in enumerate(FAMILIES)}
    names = sorted(sets, key=lambda name: (order.get(name, len(order)), name))
    return {name: tuple(sorted(sets[name])) for name in names}


def _scopes(families: Mapping[str, Sequence[str]]) -> list[_Scope]:
    """Each family followed by its sets, then overall."""
    found = []
    for family, sets in families.items():
        found.append(_Scope(kind="family", name=family, family=family, groups=(sets,)))
        found += [_Scope(kind="set", name=name, family=family, groups=((name,),)) for name in sets]
    return [*found, _Scope(kind=OVERALL, name=OVERALL, family=OVERALL, groups=tuple(families.values()))]


def _primary(records: Sequence[CellRecord], given: Mapping[str, str]) -> dict[str, str]:
    """Set -> its primary protocol: the given one, that of the suite, or that with most cells, the first of equals."""
    suite = {record.set_name: record.protocol for record in records if record.primary}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[record.set_name][record.protocol] += 1
    most = {name: min(found, key=lambda protocol: (-found[protocol], protocol)) for name, found in counts.items()}
    return {**most, **suite, **given}


def _primary_values(records: Iterable[CellRecord], primary: Mapping[str, str]) -> Mapping[str, Values]:
    """Backbone -> set -> seed -> value; empty where nothing is."""
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for record in records:
        if record.protocol == primary[record.set_name]:
            values[record.backbone][record.set_name][record.seed] = record.value
    return values


def _mean(values: Values, groups: Groups) -> dict[int, float]:
    """Mean over groups of the mean over a group's sets, for the seeds that have every set."""
    seeds = set.intersection(*(set(values[name]) for names in groups for name in names))
    return {seed: fmean(fmean(values[name][seed] for name in names) for names in groups) for seed in sorted(seeds)}


# --- comparisons


def _representatives(
    values: Mapping[str, Values], scopes: Iterable[_Scope], backbones: Sequence[str], subject: str
) -> dict[str, dict[str, str]]:
    """Role -> family or overall -> the strongest backbone of that role there, the subject left out; random last.

    It is chosen over the subject's seeds, over which it is compared, of the backbones that have all of these.
    """
    roles = sorted(map(role_of, backbones), key=lambda role: role == "random")
    found: dict[str, dict[str, str]] = {role: {} for role in roles}
    for scope in (scope for scope in scopes if scope.kind != "set"):
        wanted = set(_mean(values[subject], scope.groups))
        for role in found:
            candidates = [name for name in backbones if role_of(name) == role and name != subject]
            series = {name: _mean(values[name], scope.groups) for name in candidates}
            best = _best({name: by_seed for name, by_seed in series.items() if by_seed}, wanted)
            if best is not None:
                found[role][scope.name] = best
    return {role: names for role, names in found.items() if names}


def _best(series: Mapping[str, Mapping[int, float]], wanted: Set[int]) -> str | None:
    """The name with the highest mean over the wanted seeds, of those that have them all; the first of equals.

    Where none has, over the seeds that all have; where these share none, the name with most seeds.
    """
    whole = {name: by_seed for name, by_seed in series.items() if wanted and wanted <= set(by_seed)} or series
    seeds = set.intersection(*map(set, whole.values())) if whole else set()
    seeds = seeds & wanted or seeds
    if not seeds:
        return max(series, key=lambda name: len(series[name]), default=None)
    return max(whole, key=lambda name: fmean(whole[name][seed] for seed in sorted(seeds)))


def _comparisons(
    values: Mapping[str, Values],
    scopes: Sequence[_Scope],
    representatives: Mapping[str, Mapping[str, str]],
    subject: str,
) -> Iterator[Comparison]:
    for role, baselines in representatives.items():
        for scope, choice in ((scope, choice) for scope in scopes for choice in ("family", OVERALL)):
            baseline = baselines.get(scope.family if choice == "family" else OVERALL)
            # Of sets, and of all of them together, the second comparison would repeat the first or say little more.
            if baseline is not None and (choice == "family" or scope.kind == "family"):
                difference, gain, retention = _paired(values[subject], values[baseline], scope.groups)
                yield Comparison(
                    role=role,
                    baseline=baseline,
                    choice=choice,
                    kind=scope.kind,
                    name=scope.name,
                    difference=Estimate.of(difference),
                    gain=Estimate.of(gain),
                    retention=Estimate.of(retention),
                )


def _paired(subject: Values, baseline: Values, groups: Groups) -> tuple[dict[int, float], ...]:
    """Difference, relative gain and retention by seed, for the seeds that have every set of both."""
    names = [name for group in groups for name in group]
    seeds = set(_mean(subject, groups)) & set(_mean(baseline, groups))

    def along(measure: Callable[[float, float], float]) -> dict[int, float]:
        pairs = {name: {seed: measure(subject[name][seed], baseline[name][seed]) for seed in seeds} for name in names}
        return _mean(pairs, groups)

    difference = along(lambda mine, other: mine - other)
    mine, other = along(lambda mine, _: mine), along(lambda _, other: other)
    positive = all(baseline[name][seed] > 0 for name in names for seed in seeds)
    gain = along(lambda mine, other: 100 * (mine - other) / other) if positive else {}
    retention = {seed: 100 * mine[seed] / other[seed] for seed in mine} if min(other.values(), default=0) > 0 else {}
    return difference, gain, retention


def _verdict(goal: Goal, comparisons: Iterable[Comparison]) -> Verdict:
    for comparison in comparisons:
        found_at = (comparison.role, comparison.name, comparison.choice)
        if comparison.kind != "set" and found_at == (goal.role, goal.family, goal.choice):
            found: Estimate = getattr(comparison, goal.measure)
            if found.mean is not None:
                return _judge(goal, comparison.baseline, found, found.mean)
    return Verdict(goal=goal)


def _judge(goal: Goal, baseline: str, found: Estimate, mean: float) -> Verdict:
    reached = mean >= goal.at_least - _ROUNDING
    interval = found.interval
    return Verdict(
        goal=goal,
        baseline=baseline,
        found=found,
        reached=reached,
        missed_by=0.0 if reached else goal.at_least - mean,
        certain=None if interval is None else interval[0] >= goal.at_least - _ROUNDING,
        excludes_zero=None if interval is None or goal.measure == "retention" else not interval[0] <= 0 <= interval[1],
    )


# --- sets


def _set_means(records: Iterable[CellRecord], families: Mapping[str, Sequence[str]]) -> Iterator[SetMean]:
    """In the order of families, sets, protocols and backbones."""
    cells = defaultdict(list)
    for record in records:
        cells[record.family, record.set_name, record.protocol, record.backbone].append(record)
    order = list(families)
    for key in sorted(cells, key=lambda key: (order.index(key[0]), key[1:3], backbone_order(key[3]))):
        family, set_name, protocol, backbone = key
        yield SetMean(
            family=family,
            set_name=set_name,
            protocol=protocol,
            metric=cells[key][0].metric,
            backbone=backbone,
            value=Estimate.of({record.seed: record.value for record in cells[key]}),
            curve=_mean_curve(cells[key]),
        )


def _mean_curve(records: Iterable[CellRecord]) -> tuple[tuple[float, float, int], ...]:
    found = defaultdict(list)
    for record in records:
        for x, y in curve_of(record):
            found[x].append(y)
    return tuple((x, fmean(found[x]), len(found[x])) for x in sorted(found))


def _checks(records: Iterable[CellRecord], set_means: Iterable[SetMean]) -> Iterator[Check]:
    trivial, found = defaultdict(list), defaultdict(list)
    for record in records:
        if record.trivial is not None:
            trivial[record.set_name, record.protocol].append(record.trivial)
    for item in set_means:
        found[item.set_name, item.protocol].append(item)
    for (set_name, protocol), items in found.items():
        trained = _comparable([item.value for item in items if role_of(item.backbone) != "random"])
        random = [item.value for item in items if role_of(item.backbone) == "random"]
        means, noise = _means(trained), _pooled_std(trained)
        spread = max(means) - min(means) if len(means) > 1 else None
        yield Check(
            set_name=set_name,
            protocol=protocol,
            trivial=fmean(known) if (known := trivial[set_name, protocol]) else None,
            random=max(_means(random), default=None),
            best=max(means, default=None),
            spread=spread,
            noise=noise,
            flat=None if spread is None or noise is None else spread < noise,
            chance=_chance(trained, noise),
        )


def _comparable(estimates: Sequence[Estimate]) -> Sequence[Estimate]:
    """Those that have every seed, if there are two: seeds may differ more than backbones."""
    seeds = {seed for estimate in estimates for seed in estimate.by_seed}
    whole = [estimate for estimate in estimates if set(estimate.by_seed) == seeds]
    return whole if len(whole) > 1 else estimates


def _means(estimates: Iterable[Estimate]) -> list[float]:
    return [estimate.mean for estimate in estimates if estimate.mean is not None]


def _pooled_std(estimates: Iterable[Estimate]) -> float | None:
    """Of the seeds around the mean of their own backbone."""
    found = [(estimate.n - 1, estimate.std**2) for estimate in estimates if estimate.std is not None]
    return math.sqrt(sum(n * variance for n, variance in found) / sum(n for n, _ in found)) if found else None


def _chance(estimates: Sequence[Estimate], noise: float | None) -> float | None:
    """P value of a one-way analysis of variance."""
    values = [value for estimate in estimates for value in estimate.by_seed.values()]
    between, within = len(estimates) - 1, len(values) - len(estimates)
    if noise is None or between < 1:
        return None
    if not noise:  # as of files that are the same for all seeds, and protocols without chance
        return 0.0 if len(set(_means(estimates))) > 1 else 1.0
    centre = fmean(values)
    variance = sum(
        estimate.n * (mean - centre) ** 2 for estimate, mean in zip(estimates, _means(estimates), strict=True)
    )
    return float(fdtrc(between, within, variance / between / noise**2))
