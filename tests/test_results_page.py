"""The tables of whole studies are typed by hand; they hold what the project's statistics make of the records kept."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from xlearner_d2.report.transfer import read_studies
from xlearner_d2.report.wording import estimate, number
from xlearner_d2.results.statistics import analyse
from xlearner_d2.results.study import FAMILIES, OVERALL, Estimate, Study

ROOT = Path(__file__).parents[1]
COLUMNS = (*FAMILIES, OVERALL)
#: Fewer seeds have an interval that is too wide to be of use.
SEEDS_OF_AN_INTERVAL = 3

FEW = {
    "random weights": "random",
    "icons alone": "single/icons",
    "scenes alone": "single/scenes",
    "areas alone": "single/areas",
    "hard sharing": "shared",
    "squeezed": "squeezed",
}
#: Page and heading -> folder of records, its subject, and how the label of a row begins -> its backbone. One that ends
#: with a slash stands for three files, each in its own family. A new row of a table needs a line here.
TABLES: dict[tuple[str, str], tuple[str, str, Mapping[str, str]]] = {
    ("README.md", "What it is worth so far"): ("openmoji12_few", "squeezed", FEW),
    ("docs/RESULTS.md", "The study of few labels: three seeds"): (
        "openmoji12_few",
        "squeezed",
        {
            **FEW,
            "… each stage from the same stage": "squeezed/same_stages",
            "… so, hints by ½ cosine": "squeezed/cosine",
            "… labels alone": "squeezed/labels_alone",
            "three files: expanded branches": "expanded/",
            "three files: separate branches": "separate/",
        },
    ),
    ("docs/RESULTS.md", "Many labels, seen briefly: three seeds"): (
        "openmoji12",
        "squeezed",
        {
            **FEW,
            "… from branches that pass nothing on": "squeezed/separate",
            "three files: expanded branches": "expanded/",
            "three files: separate branches": "separate/",
        },
    ),
    ("docs/RESULTS.md", "What each choice contributes: one seed"): (
        "openmoji12_ablation",
        "default",
        {
            "default": "default",
            "separate branches": "separate_teacher",
            "features of the same stage alone": "same_scale_teacher",
            "features received at res4 alone": "only_res4_teacher",
            "features passed on with their gradient": "bidirectional_teacher",
            "labels alone": "labels_alone",
            "hints compared by ½ cosine": "distance_cosine_smooth_l1",
            "hints of features as they are": "normaliser_none",
            "hints of features standardised by PHI-S": "normaliser_phi_s",
            "hints of features of length 1": "normaliser_l2",
            "projectors of two layers": "projector_2_layers",
            "hints three times": "hints_times_3",
            "hints for each stage from the same stage": "same_stages",
            "hints at res5 alone": "hints_res5",
            "hints at res2 to res5": "hints_all_stages",
            "average of the student's weights": "average_of_weights",
            "online": "online",
            "hints alone": "hints_alone",
            "hints for a task's own images alone": "own_images",
            "started from random weights": "random_start",
            "icons at 128 pixels": "mixed_resolutions",
            "BN with its running averages": "no_recalibration",
        },
    ),
    ("docs/RESULTS.md", "Few photographs: three seeds, the main baselines"): (
        "real12_few",
        "squeezed",
        {
            "random weights": "random",
            "Caltech alone": "single/caltech",
            "aquarium alone": "single/aquarium",
            "hard sharing": "shared",
            "squeezed": "squeezed",
            "expanded branch of classes": "expanded/classification",
            "… of boxes": "expanded/detection",
            "… of areas": "expanded/segmentation",
        },
    ),
    ("docs/RESULTS.md", "The study on photographs: five seeds"): (
        "real12",
        "squeezed",
        {
            "random weights": "random",
            "Caltech alone": "single/caltech",
            "aquarium alone": "single/aquarium",
            "COCO's boxes alone": "single/coco_boxes",
            "COCO's masks alone": "single/coco",
            "CamVid alone": "single/camvid",
            "hard sharing": "shared",
            "separate branches: classification": "separate/classification",
            "expanded branches after 1,000 steps: classification": "expanded/classification",
            "… detection": "expanded/detection",
            "… segmentation": "expanded/segmentation",
            "squeezed": "squeezed",
            "… a shared trunk first": "squeezed/trunk_first",
        },
    ),
}


#: How the label of a row of differences begins -> role, family and choice of what stands there.
ON_ICONS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "classification, against the single file": [("single", "classification", "family")],
    "detection, against icons": [("single", "detection", OVERALL)],
    "detection, against the specialist": [("single", "detection", "family")],
    "segmentation, against icons": [("single", "segmentation", OVERALL)],
    "segmentation, against the specialist": [("single", "segmentation", "family")],
    "against hard sharing": [("shared", family, "family") for family in FAMILIES],
}
#: By heading.
DIFFERENCES: dict[str, Mapping[str, Sequence[tuple[str, str, str]]]] = {
    "The study of few labels: three seeds": ON_ICONS,
    "Many labels, seen briefly: three seeds": {
        **ON_ICONS,
        "over all, against icons": [("single", OVERALL, "family")],
        "over all, against hard sharing": [("shared", OVERALL, "family")],
    },
    "Few photographs: three seeds, the main baselines": {
        "classification, against Caltech": [("single", "classification", "family")],
        "detection, against Caltech": [("single", "detection", OVERALL)],
        "detection, against the aquarium": [("single/aquarium", "detection", "family")],
        "segmentation, against Caltech": [("single", "segmentation", "family")],
        "over all, against Caltech": [("single", OVERALL, "family")],
        "no loss to hard sharing in classification": [("shared", "classification", "family")],
        "… in detection": [("shared", "detection", "family")],
        "… in segmentation": [("shared", "segmentation", "family")],
        "over all, against hard sharing": [("shared", OVERALL, "family")],
    },
    "The study on photographs: five seeds": {
        "classification, against Caltech": [("single", "classification", "family")],
        "detection, against the aquarium": [("single", "detection", "family")],
        "segmentation, against Caltech": [("single", "segmentation", "family")],
        "no loss to hard sharing in classification": [("shared", "classification", "family")],
        "… in detection": [("shared", "detection", "family")],
        "… in segmentation": [("shared", "segmentation", "family")],
    },
}


def cells_of(page: str, heading: str) -> list[list[str]]:
    """The cells of all tables below a heading, row by row, without bold type."""
    _, _, section = (ROOT / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip().replace("**", "") for cell in line.strip("|").split("|")] for line in lines]


def rows_of(page: str, heading: str) -> list[dict[str, str]]:
    """The first table with a column for each family below a heading, by column; "" is the first column."""
    cells = cells_of(page, heading)
    start = next(number for number, row in enumerate(cells) if set(COLUMNS) <= set(row))
    names = ["", *cells[start][1:]]
    found = [dict(zip(names, row, strict=True)) for row in cells[start + 2 :] if len(row) == len(names)]
    return [row for row in found if any(row[name] for name in COLUMNS)]  # others are titles within the table


def expected_row(backbone: str, means: Mapping[tuple[str, str], Estimate]) -> dict[str, Estimate]:
    """By column; of three files, overall is the mean of each in its own family, by seed."""
    if not backbone.endswith("/"):
        return {name: means[backbone, name] for name in COLUMNS}
    found = {name: means[f"{backbone}{name}", name] for name in FAMILIES}
    seeds = set.intersection(*(set(value.by_seed) for value in found.values()))
    overall = {seed: sum(value.by_seed[seed] for value in found.values()) / len(found) for seed in seeds}
    return {**found, OVERALL: Estimate.of(overall)}


def text(value: Estimate) -> str:
    """As the report writes it."""
    return estimate(value if value.n >= SEEDS_OF_AN_INTERVAL else Estimate(by_seed=value.by_seed, mean=value.mean))


def difference_text(value: Estimate) -> str:
    """``+7.4 (+2.9 to +11.9)``; of one seed the mean alone."""
    mean = number(value.mean, signed=True)
    if value.interval is None:
        return mean
    low, high = (number(end, signed=True) for end in value.interval)
    return f"{mean} ({low} to {high})"


def study_of(name: str, subject: str, *, only: Sequence[str] = ()) -> Study:
    records = read_studies([ROOT / "docs/results" / name])
    return analyse([record for record in records if not only or record.backbone in only], subject=subject)


@pytest.mark.parametrize("place", TABLES, ids=lambda place: f"{place[0]}: {place[1]}")
def test_tables_of_studies_hold_what_the_records_say(place: tuple[str, str]) -> None:
    study, subject, backbones = TABLES[place]
    means = {(item.backbone, item.family): item.value for item in study_of(study, subject).family_means}
    seen = []
    for row in rows_of(*place):
        names = [name for name in backbones if row[""].startswith(name)]
        assert names, f"{row['']!r} in the table below {place[1]!r} of {place[0]} stands for no backbone of TABLES."
        backbone = backbones[max(names, key=len)]
        seen.append(backbone)
        expected = expected_row(backbone, means)
        wanted = {name: text(value) for name, value in expected.items()}
        if backbone.endswith("/") and not row[OVERALL]:  # the mean of three files is that of no file
            del wanted[OVERALL]
        assert {name: row[name] for name in wanted} == wanted, row[""]
        if "seeds" in row:
            assert re.findall(r"\d+", row["seeds"]) == [str(seed) for seed in expected[OVERALL].by_seed]
    assert sorted(seen) == sorted(backbones.values())


@pytest.mark.parametrize("heading", DIFFERENCES)
def test_tables_of_differences_hold_what_the_records_say(heading: str) -> None:
    place = "docs/RESULTS.md", heading
    study, subject, _ = TABLES[place]
    found = {(item.role, item.name, item.choice): item.difference for item in study_of(study, subject).comparisons}
    for role, *_ in (key for keys in DIFFERENCES[heading].values() for key in keys if "/" in key[0]):
        pair = study_of(study, subject, only=(role, subject)).comparisons  # it lacks seeds, so it represents no role
        found |= {(role, item.name, item.choice): item.difference for item in pair}
    for label, keys in DIFFERENCES[heading].items():
        ((_, *cells),) = (row for row in cells_of(*place) if row[0].startswith(label))
        assert ", ".join(difference_text(found[key]) for key in keys) in cells, label
        if seeds := next((name for row in cells_of(*place) for name in row if name.startswith("seeds ")), ""):
            by_seed = found[keys[0]].by_seed
            numbers = [number(by_seed.get(int(seed)), signed=True) for seed in re.findall(r"\d+", seeds)]
            assert cells[0] == ", ".join(numbers), label
