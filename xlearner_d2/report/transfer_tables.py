"""The tables of a transfer study as text, and in Markdown."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..results.records import CellRecord
from ..results.study import LEVEL, OVERALL, Check, Estimate, Study, backbone_order, role_of
from .wording import NOTHING, estimate, goal_name, number, outcome, probability, sentence, values

NO_GOALS = "There are no goals, as no backbone has a role that they are about."


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first cell names the row.

    Attributes:
        words: how many columns from the left are words, not numbers.
        strong: (row, column) of cells that stand out.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1
    strong: frozenset[tuple[int, int]] = frozenset()

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), self.caption


def markdown(table: Table) -> str:
    """A pipe table below its caption."""

    def line(cells: Iterable[str]) -> str:
        escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells)
        return f"| {' | '.join(escaped)} |"

    rows = [
        [f"**{cell}**" if (row, column) in table.strong else cell for column, cell in enumerate(cells)]
        for row, cells in enumerate(table.rows)
    ]
    ruler = "|---" * table.words + "|---:" * (len(table.header) - table.words) + "|"
    return "\n".join([f"{table.caption}\n", line(table.header), ruler, *map(line, rows)])


def goals(study: Study) -> Table:
    """Each goal and whether it is reached."""
    return Table(
        caption=f"Goals for {study.subject}.",
        header=("goal", "outcome", "found"),
        words=3,
        rows=[(goal_name(item), outcome(item), sentence(item, study.subject)) for item in study.verdicts],
    )


def headline(study: Study) -> Table:
    """Backbones by families."""
    names = [*study.families, OVERALL]
    found = {(item.backbone, item.family): item.value for item in study.family_means}
    means = {key: value.mean for key, value in found.items() if value.mean is not None}
    # Seeds differ more than backbones may, so a mean over some of them is not to be ranked with one over all.
    whole = {key: mean for key, mean in means.items() if found[key].n == len(study.seeds)}
    best = {name: max((mean for key, mean in whole.items() if key[1] == name), default=None) for name in names}
    return Table(
        caption="Mean over the sets of a family under their primary protocols, in percent, ± half of the 95 % "
        "interval over the seeds that have all of these sets; overall is the mean of the families. The best of a "
        "column is bold, of the backbones that have every seed there.",
        header=("backbone", *names, "complete seeds"),
        rows=[
            (
                name,
                *(estimate(found[name, family]) for family in names),
                ", ".join(map(str, found[name, OVERALL].by_seed)) or NOTHING,
            )
            for name in study.backbones
        ],
        strong=frozenset(
            (row, column)
            for row, name in enumerate(study.backbones)
            for column, family in enumerate(names, 1)
            if best[family] is not None and whole.get((name, family)) == best[family]
        ),
    )


def comparisons(study: Study) -> Table:
    """The subject against the strongest backbone of each role, per family and overall.

    A family has a second row where another backbone of the role is the strongest overall.
    """
    chosen = {(item.role, item.name): item.baseline for item in study.comparisons if item.choice == "family"}
    return Table(
        caption=f"{study.subject} against the strongest backbone of each role, there or overall, paired by seed, "
        "± half of the 95 % interval: difference in points, mean relative gain, and mean as a share of the baseline's.",
        header=("against", "in", "backbone", "strongest", "difference", "gain %", "retention %", "seeds"),
        words=4,
        rows=[
            (
                item.role,
                item.name,
                item.baseline,
                "there" if item.choice == "family" else "overall",
                estimate(item.difference, signed=True),
                estimate(item.gain, signed=True),
                estimate(item.retention),
                str(item.difference.n),
            )
            for item in study.comparisons
            if item.kind != "set" and (item.choice == "family" or item.baseline != chosen.get((item.role, item.name)))
        ],
    )


def primary_sets(study: Study) -> Table:
    """Sets by backbones, under the primary protocols."""
    found = {
        (item.set_name, item.backbone): item.value
        for item in study.set_means
        if item.protocol == study.primary[item.set_name]
    }
    names = [(family, name) for family, sets in study.families.items() for name in sets]
    return Table(
        caption="Each set under its primary protocol, in percent, ± half of the 95 % interval.",
        header=("set", "family", "protocol", *study.backbones),
        words=3,
        rows=[
            (
                name,
                family,
                study.primary[name],
                *(estimate(found.get((name, b), Estimate.of({}))) for b in study.backbones),
            )
            for family, name in names
        ],
    )


def one_set(study: Study, set_name: str) -> Table:
    """Backbones by protocols, with the value of each seed."""
    items = [item for item in study.set_means if item.set_name == set_name]
    metrics = {item.protocol: item.metric for item in items}
    found = {(item.backbone, item.protocol): item.value for item in items}
    none = Estimate.of({})
    rows = [
        (name, *(text for protocol in metrics for text in _mean_and_values(found.get((name, protocol), none))))
        for name in sorted({item.backbone for item in items}, key=backbone_order)
    ]
    trivial = {check.protocol: check.trivial for check in study.checks if check.set_name == set_name}
    last = ("(learns nothing)", *(text for protocol in metrics for text in (number(trivial[protocol]), NOTHING)))
    header = [text for protocol, metric in metrics.items() for text in (f"{protocol}, {metric}", "by seed")]
    caption = f"{set_name}: every protocol, ± half of the 95 % interval; the primary one is {study.primary[set_name]}."
    return Table(caption=caption, header=("backbone", *header), rows=[*rows, last])


def _mean_and_values(found: Estimate) -> tuple[str, str]:
    return estimate(found), values(found) or NOTHING


def curve_values(study: Study, set_name: str, protocol: str) -> Table:
    """The curves of a set as numbers: x by backbones."""
    lines = {
        item.backbone: {x: y for x, y, _ in item.curve}
        for item in study.set_means
        if (item.set_name, item.protocol) == (set_name, protocol) and item.curve
    }
    xs = sorted({x for points in lines.values() for x in points})
    return Table(
        caption=f"{set_name}, {protocol}: mean over seeds at each point of the curves.",
        header=("at", *lines),
        rows=[(f"{x:g}", *(number(points.get(x)) for points in lines.values())) for x in xs],
    )


def checks(study: Study) -> Table:
    """Which sets tell backbones apart."""
    header = "set, protocol, trivial, random, best trained, over random, spread, noise, chance, tells apart"
    return Table(
        caption="Trained is every backbone but random; of them, those that have every seed, if there are two. Spread "
        "is from the worst to the best of them, noise their pooled standard deviation over seeds; chance is the "
        "probability that equal backbones would differ as much.",
        header=header.split(", "),
        words=2,
        rows=[
            (
                item.set_name,
                item.protocol,
                number(item.trivial),
                number(item.random),
                number(item.best),
                number(_over_random(item), signed=True),
                number(item.spread),
                number(item.noise),
                probability(item.chance),
                {None: NOTHING, True: "yes", False: "no"}[tells_apart(item)],
            )
            for item in study.checks
        ],
    )


def tells_apart(item: Check) -> bool | None:
    """Whether the trained backbones differ by more than their noise; None where that is not known."""
    if item.flat is None or item.chance is None:
        return None
    return not item.flat and item.chance < 1 - LEVEL


def _over_random(item: Check) -> float | None:
    return None if item.best is None or item.random is None else item.best - item.random


def missing(study: Study) -> Table:
    """Primary cells that are not there, seeds together."""
    seeds = defaultdict(list)
    for cell in study.missing:
        seeds[cell.set_name, cell.protocol, cell.backbone].append(str(cell.seed))
    return Table(
        caption="Cells that are missing.",
        header=("set", "protocol", "backbone", "seeds"),
        words=4,
        rows=[(*key, ", ".join(found)) for key, found in seeds.items()],
    )


def provenance(records: Sequence[CellRecord]) -> Table:
    """Where the cells come from."""

    def every(name: str) -> str:
        return "; ".join(sorted({getattr(record, name) or "unknown" for record in records}))

    dates = sorted(record.date for record in records)
    return Table(
        caption="Where the cells come from.",
        header=("what", "value"),
        words=2,
        rows=[
            ("suite", every("suite")),
            ("cells", str(len(records))),
            ("seeds", ", ".join(map(str, sorted({record.seed for record in records})))),
            ("commits", every("commit")),
            ("hardware", every("hardware")),
            ("finished", f"{dates[0]} to {dates[-1]}"),
            ("time", duration(sum(record.seconds for record in records))),
        ],
    )


def cost(records: Sequence[CellRecord]) -> Table:
    """Wall-clock time of the cells by role."""
    seconds = defaultdict(list)
    for record in sorted(records, key=lambda record: backbone_order(record.backbone)):
        seconds[role_of(record.backbone)].append(record.seconds)
    rows = [(role, str(len(found)), f"{sum(found):.0f}", duration(sum(found))) for role, found in seconds.items()]
    return Table(
        caption="Wall-clock time of the transfer cells by role; pre-training is not part of it.",
        header=("role", "cells", "seconds", "time"),
        rows=rows,
    )


def files(records: Sequence[CellRecord]) -> Table:
    """The first digits of each backbone's SHA-256."""
    found = {(backbone_order(record.backbone), record.seed, record.weights) for record in records}
    return Table(
        caption="SHA-256 of the backbones' files, first 16 digits; none for random weights.",
        header=("backbone", "seed", "file"),
        words=3,
        rows=[(order[1], str(seed), weights[:16] or "none") for order, seed, weights in sorted(found)],
    )


def repeated_files(records: Sequence[CellRecord]) -> dict[str, list[str]]:
    """Trained backbones of fewer files than seeds, in two groups: ``one`` file for all, and files for ``some``."""
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for record in records:
        found[record.backbone][record.seed] = record.weights
    groups: dict[str, list[str]] = {"one": [], "some": []}
    for name in sorted(found, key=backbone_order):
        files = set(found[name].values())
        if len(files) < len(found[name]) and files != {""}:
            groups["one" if len(files) == 1 else "some"].append(name)
    return groups


def duration(seconds: float) -> str:
    """``2 h 05 min``, ``3 min`` or ``12 s``."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


def all_markdown(study: Study, records: Sequence[CellRecord]) -> str:
    """Every table but those of single sets' protocols and curves."""

    def sections() -> Iterator[tuple[str, Sequence[Table]]]:
        if study.verdicts:
            yield "Verdict", [goals(study)]
        yield "Families", [headline(study)]
        yield "Comparisons", [comparisons(study)]
        yield "Sets", [primary_sets(study)]
        yield "Do the sets tell backbones apart?", [checks(study)]
        if study.missing:
            yield "Missing", [missing(study)]
        yield "Provenance", [provenance(records), cost(records), files(records)]

    text = "\n\n".join("\n\n".join([f"## {title}", *map(markdown, found)]) for title, found in sections())
    return f"{text}\n"
