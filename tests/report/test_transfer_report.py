"""The files of a transfer report: results.json that comes back, Markdown, a page that stands alone; the tool."""

import itertools
import json
import random
import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlearner_d2.report.charts import ticks
from xlearner_d2.report.markup import element, page
from xlearner_d2.report.transfer import choose_primary, read_results, read_studies, write_report
from xlearner_d2.report.transfer_tables import Table, duration, headline, markdown
from xlearner_d2.report.wording import number, outcome, sentence
from xlearner_d2.results.records import CellRecord, cell_file, write_record
from xlearner_d2.results.statistics import analyse
from xlearner_d2.results.study import Estimate, Goal, Verdict
from xlearner_d2.specs import ConfigError

TOOL = Path(__file__).resolve().parents[2] / "tools/report.py"
SETS = {"pets": "classification", "digits": "classification", "cells": "detection", "roads": "segmentation"}
BACKBONES = ("random", "single/icons", "single/scenes", "shared", "separate", "expanded/a", "squeezed", "imagenet")


def make_records(
    backbones: tuple[str, ...] = BACKBONES, sets: dict[str, str] = SETS, num_seeds: int = 2
) -> list[CellRecord]:
    generator = random.Random(0)
    return [
        CellRecord(
            suite="tiny",
            set_name=set_name,
            family=family,
            protocol=protocol,
            metric="top1",
            backbone=backbone,
            seed=seed,
            value=generator.uniform(20, 80),
            trivial=5.0,
            details={"curve": [[10, 20.0], [100, 40.0], [1000, 50.0 + seed]]} if set_name == "pets" else {},
            seconds=40.0,
            weights="" if backbone == "random" else f"{backbone}-{seed}",
            settings="",
            commit="abc123",
            hardware="2 cores",
            date=f"2026-01-0{seed + 1}T00:00:00+00:00",
        )
        for set_name, family in sets.items()
        for protocol in ("probe", *(("knn",) if family == "classification" else ()))
        for backbone in backbones
        for seed in range(num_seeds)
    ]


PRIMARY = {"pets": "probe", "digits": "probe"}


def save(records: list[CellRecord], folder: Path) -> Path:
    for record in records:
        name = {"set_name": record.set_name, "protocol": record.protocol}
        write_record(record, cell_file(folder, **name, backbone=record.backbone, seed=record.seed))
    return folder


@pytest.fixture
def report(tmp_path: Path) -> Callable[..., str]:
    """Write the report of some records; the page's HTML."""

    def write(records: list[CellRecord], **options: Any) -> str:
        write_report(analyse(records, **options), records, tmp_path)
        return (tmp_path / "report.html").read_text(encoding="utf-8")

    return write


class Page(HTMLParser):
    """Reads a page; fails on tags that are not closed in order."""

    VOID = {"meta", "wbr"}

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs))
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self) -> str:
        return "".join(self.text)

    def of(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.tags if name == tag)


class TestPage:
    def test_everything_is_named(self, report: Callable[..., str]) -> None:
        words = Page(report(make_records())).words
        for name in (*SETS, *BACKBONES, *SETS.values(), "probe", "knn", "tiny", "abc123", "2 cores"):
            assert name in words

    def test_it_needs_nothing_but_itself(self, report: Callable[..., str]) -> None:
        html = report(make_records())
        found = Page(html)
        assert not {"script", "link", "img", "iframe", "object", "use", "image"} & {tag for tag, _ in found.tags}
        assert not {"src", "href", "srcset", "xlink:href"} & {name for _, names in found.tags for name in names}
        assert not re.search(r"https?:|//|url\(|@import", html.replace("</", "<"))

    def test_it_is_accessible(self, report: Callable[..., str]) -> None:
        found = Page(report(make_records()))
        ids = [names["id"] for _, names in found.tags if "id" in names]
        assert Counter(ids).most_common(1)[0][1] == 1
        for svg in found.of("svg"):
            assert svg["role"] == "img"
            assert set((svg["aria-labelledby"] or "").split()) <= set(ids)
        assert all(names.get("scope") in ("row", "col") for names in found.of("th"))
        count = Counter(tag for tag, _ in found.tags)
        assert count["table"] == count["caption"] > 5
        assert count["svg"] == count["title"] - 1 == count["desc"] > 5
        assert next(found.of("html"))["lang"] == "en"

    def test_both_themes_and_small_screens(self, report: Callable[..., str]) -> None:
        html = report(make_records())
        assert "prefers-color-scheme: dark" in html
        assert "width=device-width" in html

    @pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&amp;b", '"><b>', "]]>", "Ü/ß"])
    def test_names_are_escaped(self, report: Callable[..., str], name: str) -> None:
        names = {"sets": {**SETS, name: "classification"}, "backbones": (*BACKBONES, name)}
        records = [replace(record, suite=name, hardware=name) for record in make_records(**names)]
        found = Page(report(records))
        assert {tag for tag, _ in found.tags}.isdisjoint({"script", "b"})
        assert found.words.count(name) > 10

    def test_the_verdict_comes_first(self, report: Callable[..., str]) -> None:
        words = Page(report(make_records())).words
        verdict = re.search(r"squeezed reaches (\d) of 10 goals", words)
        assert verdict is not None
        judged = len(re.findall(r"Reached\. ", words)), len(re.findall(r"Missed by [\d.]+\. ", words))
        assert judged == (int(verdict[1]), 10 - int(verdict[1]))
        assert verdict.start() < words.index("Families")
        assert "Preliminary" not in words

    def test_missing_cells_are_said(self, report: Callable[..., str]) -> None:
        records = [r for r in make_records() if (r.set_name, r.backbone) != ("cells", "squeezed")]
        words = Page(report(records)).words
        assert "Preliminary: 2 of 64 cells under the primary protocols are missing" in words
        assert "Not judged" in words
        assert "no complete cells of squeezed and of the role single" in words

    def test_one_file_for_all_seeds_is_said(self, report: Callable[..., str]) -> None:
        assert "One file for all seeds" not in Page(report(make_records())).words
        records = [
            replace(r, weights="abc" if r.backbone in ("squeezed", "shared") else r.weights) for r in make_records()
        ]
        assert "One file for all seeds: shared, squeezed. Intervals then" in Page(report(records)).words

    def test_a_file_for_some_of_the_seeds_is_said(self, report: Callable[..., str]) -> None:
        """As when a file was replaced, and not all seeds measured again."""
        records = [
            replace(r, weights="new" if r.seed == 0 else "old") if r.backbone == "squeezed" else r
            for r in make_records(num_seeds=3)
        ]
        assert "One file for some of the seeds, another for others: squeezed." in Page(report(records)).words

    def test_what_lacks_seeds_is_neither_best_nor_compared_by_other_seeds(self, report: Callable[..., str]) -> None:
        """``shared`` is 1 point above ``single`` in the seed that it has, though far above its mean."""

        def value(record: CellRecord) -> float:
            return 10.0 * record.seed + {"shared": 1.0}.get(record.backbone, 0.0)

        records = [
            replace(r, value=value(r))
            for r in make_records(num_seeds=3)
            if (r.backbone, r.seed) not in (("shared", 0), ("shared", 1))
        ]
        study = analyse(records)
        found = headline(study)
        row = study.backbones.index("shared")
        assert found.rows[row][-1] == "2"
        assert row not in {strong for strong, _ in found.strong}
        assert len(found.strong) > 0
        words = Page(report(records)).words
        heat_map = words[words.index("Difference of each backbone to the reference") : words.index("Every protocol")]
        assert "+1.0" in heat_map
        assert "+11.0" not in heat_map

    def test_one_seed_is_said(self, report: Callable[..., str]) -> None:
        words = Page(report(make_records(num_seeds=1))).words
        assert "one seed only" in words
        assert "one complete seed, so no interval" in words
        assert "±" not in re.sub(r"± half", "", words)

    @pytest.mark.parametrize("backbones", [("squeezed",), ("squeezed", "random"), ("squeezed", "imagenet")])
    def test_backbones_without_roles_have_no_goals(
        self, tmp_path: Path, report: Callable[..., str], backbones: tuple[str, ...]
    ) -> None:
        words = Page(report(make_records(backbones))).words
        assert "There are no goals" in words
        assert "judged" not in words + (tmp_path / "tables.md").read_text()

    def test_curves_only_where_there_are_some(self, report: Callable[..., str]) -> None:
        with_curves = report(make_records(), primary=PRIMARY)
        without = report([replace(record, details={}) for record in make_records()], primary=PRIMARY)
        assert with_curves.count("<polyline") == len(BACKBONES) * 2
        assert "pets, probe: top1 in percent" in Page(with_curves).words
        assert "<polyline" not in without
        assert "Curves" not in Page(without).words

    def test_curves_that_cannot_be_told_apart_are_numbers_alone(self, report: Callable[..., str]) -> None:
        names = tuple(f"other/{number}" for number in range(9))
        html = report(make_records(names), subject="other/0")
        first = html[html.index("curve-0-title") :]
        first = first[: first.index("</svg>")]
        dashes = re.findall(r"<polyline[^>]*>", first)
        assert len(dashes) == len(set(re.findall(r"dasharray=\"([^\"]*)\"", " ".join(dashes)))) + 1
        assert "and 5 more, as numbers" in first

    def test_points_of_a_curve_may_all_be_one(self, report: Callable[..., str]) -> None:
        assert "<polyline" in report([replace(r, details={"curve": [[0, 5.0]]}) for r in make_records()])


class TestMarkup:
    def test_text_and_elements_keep_their_order(self) -> None:
        found = page("t", "", element("p", "a", element("b", "c"), "d", None, ["e", element("i")], "f"))
        assert "<p>a<b>c</b>de<i></i>f</p>" in found

    def test_attributes(self) -> None:
        assert '<p class="x" stroke-width="1.5">' in page("", "", element("p", class_="x", stroke_width=1.5, id=None))

    @settings(max_examples=100, deadline=None)
    @given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e4), st.integers(2, 8))
    def test_ticks(self, low: float, span: float, most: int) -> None:
        found = ticks(low, low + span, most=most)
        assert len(found) <= most
        assert all(low - 1e-6 <= tick <= low + span + 1e-6 for tick in found)
        gaps = [b - a for a, b in itertools.pairwise(found)]
        assert gaps == pytest.approx(gaps[:1] * len(gaps), rel=1e-6)

    def test_ticks_of_a_point(self) -> None:
        assert ticks(3.0, 3.0) == [3.0]

    def test_markdown_of_awkward_names(self) -> None:
        text = markdown(Table(caption="c", header=("a|b", "n"), rows=[("<x>", "1")], strong=frozenset({(0, 1)})))
        assert text.splitlines()[2:] == ["| a\\|b | n |", "|---|---:|", "| &lt;x> | **1** |"]

    @pytest.mark.parametrize(
        ("value", "text"), [(None, "–"), (-0.04, "0.0"), (-1.25, "−1.2"), (3.0, "3.0"), (0.0, "0.0")]
    )
    def test_number(self, value: float | None, text: str) -> None:
        assert number(value) == text

    @pytest.mark.parametrize(
        ("seconds", "text"), [(12, "12 s"), (200, "3 min"), (7500, "2 h 05 min"), (3599, "1 h 00 min")]
    )
    def test_duration(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text


class TestSentence:
    @pytest.mark.parametrize(
        ("measure", "mean", "words"),
        [
            ("difference", 1.5, "squeezed is 1.5 points above shared (95 % interval "),
            ("difference", -1.5, "squeezed is 1.5 points below shared"),
            ("gain", 4.0, "squeezed is 4.0 % better than shared"),
            ("gain", -4.0, "squeezed is 4.0 % worse than shared"),
            ("retention", 97.0, "squeezed keeps 97.0 % of shared"),
        ],
    )
    def test_what_was_found(self, measure: str, mean: float, words: str) -> None:
        goal = Goal(role="shared", family="overall", measure=measure, at_least=1.0)
        found = Estimate.of({0: mean - 0.1, 1: mean + 0.1})
        assert sentence(Verdict(goal=goal, baseline="shared", found=found), "squeezed").startswith(words)

    @pytest.mark.parametrize(
        ("differences", "words"),
        [
            ((4.0, 4.01), "lies wholly at or above the goal and excludes zero."),
            ((1.0, 7.0), "reaches below the goal and includes zero."),
            ((2.0, 2.01), "lies wholly below the goal and excludes zero."),
            ((0.0, 5.0), "reaches above the goal and includes zero."),
        ],
    )
    def test_where_the_interval_lies(self, differences: tuple[float, float], words: str) -> None:
        records = [r for r in make_records(("shared",), {"cells": "detection"}) if r.protocol == "probe"]
        better = [replace(r, backbone="squeezed", value=r.value + differences[r.seed], weights="") for r in records]
        goal = Goal(role="shared", family="detection", measure="difference", at_least=3.0)
        (verdict,) = analyse(records + better, goals=[goal]).verdicts
        assert sentence(verdict, "squeezed").endswith(f"The interval {words}")

    def test_a_narrow_miss_is_no_miss_by_zero(self) -> None:
        verdict = Verdict(goal=Goal(role="a", family="b", measure="gain", at_least=1), reached=False, missed_by=0.012)
        assert outcome(verdict) == "Missed by 0.012"


class TestResults:
    def test_they_come_back(self, tmp_path: Path, report: Callable[..., str]) -> None:
        records = make_records()
        goals = [Goal(role="separate", family="detection", measure="gain", at_least=1.0)]
        report(records, primary=PRIMARY, goals=goals, subject="shared")
        study, found = read_results(tmp_path / "results.json")
        assert study == analyse(records, primary=PRIMARY, goals=goals, subject="shared")
        assert sorted(found, key=repr) == sorted(records, key=repr)

    def test_what_is_no_number_in_details_is_null(self, tmp_path: Path, report: Callable[..., str]) -> None:
        losses = {"losses": [1.0, float("nan")], "last": {"loss": float("inf")}}
        report([replace(record, details=losses) for record in make_records()])
        _, records = read_results(tmp_path / "results.json")
        assert records[0].details == {"losses": [1.0, None], "last": {"loss": None}}

    def test_the_file_says_what_the_study_says(self, tmp_path: Path, report: Callable[..., str]) -> None:
        report(make_records())
        content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        study = analyse(make_records())
        assert content["version"] == 2
        assert content["verdicts"][0]["found"]["mean"] == study.verdicts[0].found.mean
        assert content["verdicts"][0]["found"]["by_seed"].keys() == {"0", "1"}
        assert len(content["cells"]) == len(make_records())

    def test_writing_twice_gives_the_same_and_leaves_nothing_else(
        self, tmp_path: Path, report: Callable[..., str]
    ) -> None:
        report(make_records())
        first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        report(make_records()[::-1])
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
        assert set(first) == {"results.json", "tables.md", "report.html"}

    def test_markdown_tables_are_rectangular(self, tmp_path: Path, report: Callable[..., str]) -> None:
        report([record for record in make_records() if record.backbone != "shared" or record.seed])
        text = (tmp_path / "tables.md").read_text(encoding="utf-8")
        tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
        assert len(tables) == 9
        for table in tables:
            assert len({line.count("|") for line in table.splitlines()}) == 1
        assert all(name in text for name in (*SETS, *BACKBONES))

    @pytest.mark.parametrize(
        "content", ["", "[]", "{}", '{"version": 2}', '{"version": 2, "cells": [{}], "verdicts": []}']
    )
    def test_no_results(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ConfigError, match=r"results\.json is no result of a transfer study"):
            read_results(tmp_path / "results.json")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is no result of a transfer study: FileNotFoundError"):
            read_results(tmp_path / "results.json")

    def test_another_version(self, tmp_path: Path) -> None:
        (tmp_path / "results.json").write_text('{"version": 99}')
        with pytest.raises(ConfigError, match="has version 99, but 2 is expected"):
            read_results(tmp_path / "results.json")


class TestStudies:
    def test_seeds_of_several_folders_are_one_study(self, tmp_path: Path) -> None:
        records = make_records()
        folders = [save([r for r in records if r.seed == seed], tmp_path / str(seed)) for seed in (0, 1)]
        assert analyse(read_studies(folders)) == analyse(records)

    def test_the_same_cell_twice_counts_once(self, tmp_path: Path) -> None:
        records = make_records()
        again = [replace(record, seconds=1.0, date="later", hardware="other", details={}) for record in records]
        found = read_studies([save(records, tmp_path / "a"), save(again, tmp_path / "b")])
        assert sorted(found, key=repr) == sorted(records, key=repr)

    def test_cells_that_disagree(self, tmp_path: Path) -> None:
        first, second, *others = make_records()
        a = save([first, second, *others], tmp_path / "a")
        b = save([replace(first, value=1.5), replace(second, weights="x", settings="y"), *others], tmp_path / "b")
        with pytest.raises(ConfigError) as error:
            read_studies([a, b])
        assert len(error.value.problems) == 2
        assert re.search(
            r"a/cells/pets/probe/random-0\.json and .*b/cells/.*random-0\.json.*and 1\.5", str(error.value)
        )
        assert re.search(r"random-1\.json.*have weights '' and 'x', settings '' and 'y': keep one", str(error.value))

    def test_every_problem_is_listed(self, tmp_path: Path) -> None:
        folder = save(make_records(), tmp_path / "a")
        cell_file(folder, set_name="pets", protocol="probe", backbone="random", seed=0).write_text("{")
        cell_file(folder, set_name="pets", protocol="probe", backbone="random", seed=1).write_text('{"schema": 7}')
        with pytest.raises(ConfigError, match="3 problems") as error:
            read_studies([folder, tmp_path / "nothing"])
        assert re.search(r"random-0\.json is no record", str(error.value))
        assert re.search(r"random-1\.json has schema 7", str(error.value))
        assert "nothing has no cells: files cells/SET/PROTOCOL/BACKBONE-SEED.json are expected" in str(error.value)

    def test_primary_protocols_in_order_of_preference(self) -> None:
        records = make_records()
        assert choose_primary(records, ["knn", "probe"]) == {
            "pets": "knn",
            "digits": "knn",
            "cells": "probe",
            "roads": "probe",
        }
        assert choose_primary(records, ["knn"]) == {"pets": "knn", "digits": "knn"}
        assert choose_primary(records, []) == {}

    def test_unknown_protocol(self) -> None:
        with pytest.raises(ConfigError, match="No set has the protocol boxes; there are knn, probe"):
            choose_primary(make_records(), ["probe", "boxes"])


class TestTool:
    @pytest.fixture
    def tool(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def run(*args: str | Path) -> None:
            monkeypatch.setattr(sys, "argv", ["report.py", *map(str, args)])
            runpy.run_path(str(TOOL), run_name="__main__")

        return run

    def test_report(self, tool: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        records = make_records()
        folders = [save([r for r in records if r.seed == seed], tmp_path / str(seed)) for seed in (0, 1)]
        tool(*folders, "--output", tmp_path / "out", "--subject", "shared", "--primary", "probe")
        assert capsys.readouterr().out == f"{len(records)} cells, 0 missing: {tmp_path / 'out/report.html'}\n"
        assert read_results(tmp_path / "out/results.json")[0] == analyse(records, subject="shared", primary=PRIMARY)

    def test_it_writes_beside_the_cells(self, tool: Callable[..., None], tmp_path: Path) -> None:
        tool(save(make_records(), tmp_path))
        assert (tmp_path / "report.html").is_file()

    @pytest.mark.parametrize(
        ("args", "match"),
        [
            (["nowhere"], "^error: The transfer study has 1 problem:\n  1. nowhere has no cells"),
            (["{folder}", "--subject", "student"], "The subject is 'student'"),
            (["{folder}", "--primary", "boxes"], "No set has the protocol boxes"),
        ],
    )
    def test_errors(self, tool: Callable[..., None], tmp_path: Path, args: list[str], match: str) -> None:
        folder = save(make_records(), tmp_path)
        with pytest.raises(SystemExit, match=match):
            tool(*(arg.format(folder=folder) for arg in args))
        assert not (tmp_path / "report.html").exists()
