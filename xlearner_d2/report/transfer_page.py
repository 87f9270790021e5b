"""The page of a transfer study: verdict first, then what it rests on. One file, no script, nothing from elsewhere."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from xml.etree.ElementTree import Element

from ..results.records import CellRecord
from ..results.study import OVERALL, Estimate, Study, role_of
from . import transfer_tables as tables
from .charts import Line, Row, bars, curves, forest
from .markup import Child, element, page, table
from .transfer_tables import Table
from .wording import estimate, goal_name, number, outcome, plural, sentence


def render(study: Study, records: Sequence[CellRecord]) -> str:
    """The page's HTML."""
    style = Path(__file__).with_name("transfer.css").read_text(encoding="utf-8")
    title = f"Transfer study: {', '.join(sorted({record.suite for record in records}))}"
    sections = (
        _verdict(study, records),
        _families(study),
        _comparisons(study),
        _sets(study),
        _curves(study),
        _instrument(study),
        _provenance(study, records),
    )
    return page(title, style, element("header", element("h1", title)), element("main", sections))


def _html(found: Table, *, subject: str = "") -> Element:
    def cell(row: int, column: int, text: str) -> Child:
        if text == subject and column == 0:
            return element("span", text, class_="subject")
        return element("td", text, class_="best") if (row, column) in found.strong else text

    rows = [[cell(row, column, text) for column, text in enumerate(cells)] for row, cells in enumerate(found.rows)]
    return table(found.caption, found.header, rows, words=found.words)


def _section(title: str, *children: Child) -> Element:
    return element("section", element("h2", title), children)


def _quiet(text: str) -> Element:
    return element("p", text, class_="quiet")


# --- verdict


def _verdict(study: Study, records: Sequence[CellRecord]) -> Element:
    if not study.verdicts:
        return _section("Verdict", element("p", tables.NO_GOALS, class_="lead"), _warnings(study, records))
    reached = sum(item.reached is True for item in study.verdicts)
    unknown = sum(item.reached is None for item in study.verdicts)
    lead = f"{study.subject} reaches {reached} of {plural(len(study.verdicts), 'goal')}"
    lead += f"; {unknown} cannot be judged." if unknown else "."
    items = (
        element(
            "li",
            element("p", goal_name(item)),
            element("p", element("span", f"{outcome(item)}. ", class_="outcome"), sentence(item, study.subject)),
            class_={None: None, True: "reached", False: "missed"}[item.reached],
        )
        for item in study.verdicts
    )
    return _section(
        "Verdict",
        element("p", lead, class_="lead"),
        _warnings(study, records),
        element("ul", items, class_="goals"),
        _quiet(
            "The baseline of a role is its strongest single file in that family, or, where a goal says so, the one "
            f"that is strongest overall; of the files that have all seeds of {study.subject}, both are picked by these "
            "same results. "
            "That favours the baseline, so the differences below are rather too small than too large. "
            "Intervals are Student t over seeds; with few seeds they are wide."
        ),
    )


def _warnings(study: Study, records: Sequence[CellRecord]) -> Iterator[Element]:
    if len(study.seeds) < 2:
        yield element("p", "There is one seed only: nothing here has an interval.", class_="warning")
    repeated = tables.repeated_files(records)
    if names := repeated["one"]:
        text = f"One file for all seeds: {', '.join(names)}. "
        text += "Intervals then tell how much transfer varies, not how much another pre-training would differ."
        yield element("p", text, class_="warning")
    if names := repeated["some"]:
        text = f"One file for some of the seeds, another for others: {', '.join(names)}. "
        text += "If a file was replaced between measurements, measure the other seeds again."
        yield element("p", text, class_="warning")
    if study.missing:
        total = len(study.primary) * len(study.backbones) * len(study.seeds)
        text = f"Preliminary: {len(study.missing)} of {total} cells under the primary protocols are missing. "
        found = element("details", element("summary", "Which"), _html(tables.missing(study)))
        yield element("div", element("p", text), found, class_="warning")


# --- families


def _families(study: Study) -> Element:
    charts = []
    for index, family in enumerate([*study.families, OVERALL]):
        rows = [
            Row(label=item.backbone, value=item.value, strong=item.backbone == study.subject)
            for item in study.family_means
            if item.family == family
        ]
        description = "; ".join(f"{row.label} {estimate(row.value)}" for row in rows)
        title = f"{family.capitalize()}: mean of each backbone in percent, with 95 % intervals"
        drawn = bars(title, description, rows, key=f"bars-{index}")
        charts.append(element("figure", element("h3", _with_sets(study, family)), drawn))
    return _section("Families", _html(tables.headline(study), subject=study.subject), _panels(charts, wide=True))


def _with_sets(study: Study, family: str) -> str:
    if family == OVERALL:
        return "Overall: mean of the families"
    return f"{family.capitalize()}: {plural(len(study.families[family]), 'set')}"


def _panels(charts: Sequence[Element], *, wide: bool = False) -> Element:
    return element("div", charts, class_="panels wide" if wide else "panels")


# --- comparisons


def _comparisons(study: Study) -> Element:
    charts = [_forest(study, role, index) for index, role in enumerate(study.representatives)]
    return _section(
        f"{study.subject} against the others",
        _quiet(
            "Difference in points to the strongest backbone of each role, paired by seed, with 95 % intervals. "
            "Diamonds are families and the overall mean, dots are sets; a green bar is a goal."
        ),
        _panels(charts) if charts else _quiet("There is nothing to compare with."),
        _html(tables.comparisons(study)),
    )


def _forest(study: Study, role: str, index: int) -> Element:
    aims = {
        item.goal.family: item.goal.at_least
        for item in study.verdicts
        if item.goal.role == role and item.goal.measure == "difference" and item.goal.choice == "family"
    }
    found = [item for item in study.comparisons if item.role == role and item.choice == "family"]
    rows = [
        Row(
            label=item.name if item.kind == "set" else item.name.capitalize(),
            value=item.difference,
            strong=item.kind != "set",
            goal=None if item.kind == "set" else aims.get(item.name),
        )
        for item in found
    ]
    description = "; ".join(f"{row.label} {estimate(row.value, signed=True)}" for row in rows)
    drawn = forest(f"{study.subject} minus {role}, in points", description, rows, key=f"forest-{index}")
    return element("figure", element("h3", f"Against {role}"), drawn)


# --- sets


def _sets(study: Study) -> Element:
    details = (
        element(
            "details",
            element("summary", f"{name} ({family})"),
            _html(tables.one_set(study, name), subject=study.subject),
        )
        for family, names in study.families.items()
        for name in names
    )
    return _section("Sets", _heat_map(study), element("h3", "Every protocol of a set"), details)


def _reference(study: Study, family: str) -> str | None:
    """What the colours of the heat map compare with: the strongest single-task backbone, or else random weights."""
    found = study.representatives
    return found.get("single", {}).get(family) or found.get("random", {}).get(family)


def _heat_map(study: Study) -> Element:
    values = {
        (item.set_name, item.backbone): item.value
        for item in study.set_means
        if item.protocol == study.primary[item.set_name]
    }
    means = {key: value.mean for key, value in values.items() if value.mean is not None}
    references = {name: _reference(study, family) for family, names in study.families.items() for name in names}
    none = Estimate.of({})
    differences = {
        (name, backbone): difference
        for name, backbone in means
        if (reference := references[name]) is not None
        and (difference := _paired(values[name, backbone], values.get((name, reference), none))) is not None
    }
    # Random weights, far below the others, would leave these without colour.
    trained = [abs(value) for (_, backbone), value in differences.items() if role_of(backbone) != "random"]
    largest = max(trained or map(abs, differences.values()), default=0.0) or 1.0
    rows: list[list[Child]] = [
        [
            name,
            f"{reference or 'none'} {number(means.get((name, reference or '')))}",
            *(
                _heat(differences.get((name, b)), means.get((name, b)), largest, b == reference)
                for b in study.backbones
            ),
        ]
        for name, reference in references.items()
    ]
    return table(
        "Difference of each backbone to the reference of a set's family in points, under the primary protocols: blue "
        "is above, orange below. The reference is the strongest single-task backbone, or random weights without one; "
        "differences are over the seeds that both have.",
        ["set", "reference", *study.backbones],
        rows,
        words=2,
    )


def _paired(value: Estimate, reference: Estimate) -> float | None:
    """Mean of the differences by seed; None where there is no seed of both."""
    seeds = sorted(value.by_seed.keys() & reference.by_seed.keys())
    return fmean(value.by_seed[seed] - reference.by_seed[seed] for seed in seeds) if seeds else None


def _heat(difference: float | None, mean: float | None, largest: float, is_reference: bool) -> Element:
    if difference is None or is_reference:
        return element("td", number(mean))
    share = f"--heat: {min(1.0, abs(difference) / largest):.2f}"
    return element("td", number(difference, signed=True), class_="above" if difference > 0 else "below", style=share)


# --- the rest


def _curves(study: Study) -> Element | None:
    found: dict[tuple[str, str, str], list[Line]] = {}
    for item in study.set_means:
        if item.curve:
            key = (item.set_name, item.protocol, item.metric)
            line = Line(backbone=item.backbone, points=item.curve, strong=item.backbone == study.subject)
            found.setdefault(key, []).append(line)
    charts = []
    for index, ((name, protocol, metric), lines) in enumerate(found.items()):
        title = f"{name}, {protocol}: {metric} in percent"
        ends = "; ".join(f"{line.backbone} ends at {number(line.points[-1][1])}" for line in lines)
        numbers = _html(tables.curve_values(study, name, protocol))
        drawn = curves(title, ends, lines, key=f"curve-{index}")
        details = element("details", element("summary", "As numbers"), numbers)
        charts.append(element("figure", element("h3", title), drawn, details))
    return _section("Curves", _panels(charts)) if charts else None


def _instrument(study: Study) -> Element:
    known = [item for item in study.checks if tables.tells_apart(item) is not None]
    flat = [f"{item.set_name} ({item.protocol})" for item in known if not tables.tells_apart(item)]
    text = f"{len(known) - len(flat)} of {len(known)} tell the trained backbones apart."
    if flat:
        text += f" On the others no ranking should be read: {', '.join(flat)}."
    if not known:
        text = "This cannot be said with one seed or one trained backbone."
    return _section("Do the sets tell backbones apart?", element("p", text), _html(tables.checks(study)))


def _provenance(study: Study, records: Sequence[CellRecord]) -> Element:
    return _section(
        "Provenance",
        _html(tables.provenance(records)),
        _html(tables.cost(records)),
        element("details", element("summary", "Files of the backbones"), _html(tables.files(records))),
    )
