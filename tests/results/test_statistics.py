"""Laws of the statistics, and scipy's tests as independent oracles."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from xlearner_d2.report.transfer import write_report
from xlearner_d2.report.transfer_tables import tells_apart
from xlearner_d2.results.records import CellRecord
from xlearner_d2.results.statistics import analyse
from xlearner_d2.results.study import Comparison, Estimate, Goal, Study
from xlearner_d2.specs import ConfigError

FAMILIES = {"pets": "classification", "digits": "classification", "cells": "detection", "roads": "segmentation"}
BACKBONES = ("random", "single/icons", "single/scenes", "shared", "separate", "expanded/a", "expanded/b", "squeezed")
LAW = settings(max_examples=25, deadline=None)
Change = Callable[[CellRecord], float]


def cell(set_name: str, backbone: str, seed: int, value: float, **other: Any) -> CellRecord:
    """A record of the protocol probe, with everything that does not matter filled in."""
    given = {
        "suite": "tiny",
        "family": FAMILIES.get(set_name, "classification"),
        "protocol": "probe",
        "metric": "top1",
        "trivial": 1.0,
        "details": {},
        "seconds": 2.0,
        "weights": "" if backbone == "random" else f"{backbone}-{seed}",
        "settings": "",
        "commit": "abc",
        "hardware": "cpu",
        "date": "2026-01-01T00:00:00+00:00",
    }
    return CellRecord(**{**given, **other}, set_name=set_name, backbone=backbone, seed=seed, value=value)


def full_study(seed: int, num_seeds: int = 3, backbones: tuple[str, ...] = BACKBONES) -> list[CellRecord]:
    """Every cell, with values between 20 and 80 that have nothing to do with one another."""
    generator = random.Random(seed)
    return [
        cell(set_name, backbone, number, generator.uniform(20, 80))
        for set_name in FAMILIES
        for backbone in backbones
        for number in range(num_seeds)
    ]


def changed(records: list[CellRecord], change: Change) -> list[CellRecord]:
    return [replace(record, value=change(record)) for record in records]


def values(records: list[CellRecord], set_name: str, backbone: str) -> list[float]:
    return [record.value for record in records if (record.set_name, record.backbone) == (set_name, backbone)]


def compared(study: Study, role: str, name: str, choice: str = "family") -> Comparison:
    wanted = (role, name, choice)
    return next(item for item in study.comparisons if (item.role, item.name, item.choice) == wanted)


def by_scope(study: Study, measure: str) -> dict[tuple[str, str, str], Estimate]:
    return {(item.role, item.name, item.choice): getattr(item, measure) for item in study.comparisons}


def same(
    one: Mapping[Any, Estimate], other: Mapping[Any, Estimate], change: Callable[[float], float] = lambda x: x
) -> bool:
    """Whether all values of ``one``, changed, are those of ``other``."""
    assert one.keys() == other.keys()
    return all(
        {seed: change(value) for seed, value in one[key].by_seed.items()}
        == pytest.approx(dict(other[key].by_seed), abs=1e-9)
        for key in one
    )


studies = st.builds(full_study, st.integers(0, 10_000), st.integers(1, 5))
several_seeds = st.builds(full_study, st.integers(0, 10_000), st.integers(2, 5))


class TestOracles:
    @LAW
    @given(st.lists(st.floats(-100, 100), min_size=2, max_size=8))
    def test_interval(self, numbers: list[float]) -> None:
        found = Estimate.of(dict(enumerate(numbers)))
        assume(max(numbers) - min(numbers) > 1e-6)
        expected = stats.ttest_1samp(numbers, 0).confidence_interval(0.95)
        assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-6)
        assert (found.mean, found.std) == pytest.approx((np.mean(numbers), np.std(numbers, ddof=1)), abs=1e-9)

    @LAW
    @given(several_seeds)
    def test_difference_on_a_set(self, records: list[CellRecord]) -> None:
        found = compared(analyse(records), "shared", "pets").difference
        expected = stats.ttest_rel(values(records, "pets", "squeezed"), values(records, "pets", "shared"))
        interval = expected.confidence_interval(0.95)
        assert found.interval == pytest.approx((interval.low, interval.high))

    @LAW
    @given(several_seeds)
    def test_differences_over_sets(self, records: list[CellRecord]) -> None:
        study = analyse(records)
        mean = {
            name: {
                family: np.mean([values(records, item, name) for item in FAMILIES if FAMILIES[item] == family], axis=0)
                for family in set(FAMILIES.values())
            }
            for name in ("squeezed", "separate")
        }
        for name in mean:
            mean[name]["overall"] = np.mean(list(mean[name].values()), axis=0)
        for family in mean["squeezed"]:
            interval = stats.ttest_rel(mean["squeezed"][family], mean["separate"][family]).confidence_interval(0.95)
            found = compared(study, "separate", family).difference
            assert found.interval == pytest.approx((interval.low, interval.high))

    @LAW
    @given(several_seeds)
    def test_gain_and_retention(self, records: list[CellRecord]) -> None:
        found = compared(analyse(records), "shared", "classification")
        mine, other = (
            np.array([values(records, item, name) for item in ("pets", "digits")]) for name in ("squeezed", "shared")
        )
        assert found.gain.mean == pytest.approx(np.mean(100 * (mine / other - 1)))
        assert found.retention.mean == pytest.approx(np.mean(100 * mine.mean(axis=0) / other.mean(axis=0)))

    @LAW
    @given(several_seeds)
    def test_checks(self, records: list[CellRecord]) -> None:
        found = next(item for item in analyse(records).checks if item.set_name == "roads")
        trained = [values(records, "roads", name) for name in BACKBONES if name != "random"]
        means = [np.mean(item) for item in trained]
        assert found.spread == pytest.approx(max(means) - min(means))
        assert found.noise == pytest.approx(np.sqrt(np.mean([np.var(item, ddof=1) for item in trained])))
        assert found.flat == (found.spread < found.noise)
        assert found.chance == pytest.approx(stats.f_oneway(*trained).pvalue)
        assert found.best == pytest.approx(max(means))
        assert found.random == pytest.approx(np.mean(values(records, "roads", "random")))

    def test_noise_with_unequal_numbers_of_seeds(self) -> None:
        numbers = {"shared": [1.0, 3.0, 8.0], "separate": [2.0, 3.0], "squeezed": [5.0]}
        records = [cell("pets", name, seed, x) for name, found in numbers.items() for seed, x in enumerate(found)]
        (check,) = analyse(records).checks
        assert check.chance == pytest.approx(stats.f_oneway(*numbers.values()).pvalue)


class TestLaws:
    @LAW
    @given(studies, st.randoms())
    def test_the_order_of_records_does_not_matter(self, records: list[CellRecord], shuffler: random.Random) -> None:
        shuffled = records.copy()
        shuffler.shuffle(shuffled)
        assert analyse(shuffled) == analyse(records)

    @LAW
    @given(studies, st.floats(-10, 10))
    def test_a_shift_of_the_subject_shifts_differences(self, records: list[CellRecord], shift: float) -> None:
        moved = changed(records, lambda r: r.value + shift * (r.backbone == "squeezed"))
        one, other = analyse(records), analyse(moved)
        assert same(by_scope(one, "difference"), by_scope(other, "difference"), lambda x: x + shift)
        assert one.representatives == other.representatives

    @LAW
    @given(studies)
    def test_what_a_seed_does_to_all_backbones_cancels(self, records: list[CellRecord]) -> None:
        moved = changed(records, lambda r: r.value + 3.7 * r.seed)
        assert same(by_scope(analyse(records), "difference"), by_scope(analyse(moved), "difference"))

    @LAW
    @given(studies, st.floats(0.1, 1.2))
    def test_a_scale_leaves_gain_and_retention(self, records: list[CellRecord], scale: float) -> None:
        one, other = analyse(records), analyse(changed(records, lambda r: r.value * scale))
        assert same(by_scope(one, "gain"), by_scope(other, "gain"))
        assert same(by_scope(one, "retention"), by_scope(other, "retention"))
        assert same(by_scope(one, "difference"), by_scope(other, "difference"), lambda x: x * scale)

    @LAW
    @given(studies)
    def test_swapping_subject_and_baseline_changes_the_sign(self, records: list[CellRecord]) -> None:
        one, other = analyse(records, subject="squeezed"), analyse(records, subject="shared")
        for name in ("pets", "classification", "overall"):
            mean = compared(other, "squeezed", name).difference.mean
            assert compared(one, "shared", name).difference.mean == pytest.approx(-mean)

    @LAW
    @given(studies)
    def test_the_representative_is_the_hardest_baseline(self, records: list[CellRecord]) -> None:
        study = analyse(records)
        for variant in ("single/icons", "single/scenes"):
            alone = analyse([r for r in records if r.role != "single" or r.backbone == variant])
            for family in ("classification", "detection", "segmentation", "overall"):
                hardest = compared(study, "single", family).difference.mean
                assert hardest <= compared(alone, "single", family).difference.mean + 1e-9

    @LAW
    @given(studies)
    def test_a_weaker_variant_changes_no_comparison(self, records: list[CellRecord]) -> None:
        weak = [replace(r, backbone="single/weak", value=1.0, weights="w") for r in records if r.backbone == "shared"]
        assert analyse(records + weak).comparisons == analyse(records).comparisons

    @LAW
    @given(studies)
    def test_a_copy_of_the_subject_is_no_different(self, records: list[CellRecord]) -> None:
        copy = [replace(r, backbone="shared", weights="") for r in records if r.backbone == "squeezed"]
        study = analyse([*(r for r in records if r.backbone != "shared"), *copy])
        found = compared(study, "shared", "overall")
        assert set(found.difference.by_seed.values()) == {0.0}
        assert set(found.gain.by_seed.values()) == {0.0}
        assert list(found.retention.by_seed.values()) == pytest.approx([100.0] * len(study.seeds))

    @LAW
    @given(studies)
    def test_names_do_not_matter_beyond_the_role(self, records: list[CellRecord]) -> None:
        named = [replace(r, backbone=r.backbone.replace("single/icons", "single/zz")) for r in records]
        one, other = by_scope(analyse(records), "difference"), by_scope(analyse(named), "difference")
        assert same(one, other)


class TestRepresentatives:
    def test_each_family_and_overall_have_their_own(self) -> None:
        best = {("single/icons", "pets"), ("single/icons", "digits"), ("single/scenes", "cells")}
        high = {("single/icons", "roads"): 41.0, ("single/scenes", "roads"): 40.0}
        study = analyse(
            changed(
                full_study(0), lambda r: high.get((r.backbone, r.set_name), 50.0 + ((r.backbone, r.set_name) in best))
            )
        )
        assert study.representatives["single"] == {
            "classification": "single/icons",
            "detection": "single/scenes",
            "segmentation": "single/icons",
            "overall": "single/icons",
        }
        assert compared(study, "single", "cells").baseline == "single/scenes"

    def test_it_is_chosen_over_the_seeds_that_all_variants_have(self) -> None:
        numbers = {
            "single/a": {0: 50.0, 1: 50.0},
            "single/b": {0: 40.0, 1: 40.0, 2: 99.0},
            "squeezed": {0: 1.0, 1: 1.0},
        }
        records = [cell("pets", name, seed, x) for name, found in numbers.items() for seed, x in found.items()]
        assert analyse(records).representatives["single"]["classification"] == "single/a"

    def test_one_that_lacks_a_seed_of_the_subject_does_not_choose_the_seeds(self) -> None:
        """With seed 0 alone, a would be chosen."""
        numbers = {
            "single/a": {0: 60.0, 1: 40.0},
            "single/b": {0: 55.0, 1: 55.0},
            "single/c": {0: 10.0},
            "squeezed": {0: 50.0, 1: 50.0},
        }
        records = [cell("pets", name, seed, x) for name, found in numbers.items() for seed, x in found.items()]
        study = analyse(records)
        assert study.representatives["single"] == {"classification": "single/b", "overall": "single/b"}
        assert compared(study, "single", "overall").difference.mean == -5.0

    def test_the_subject_is_not_its_own_baseline(self) -> None:
        study = analyse(full_study(0), subject="single/icons")
        assert set(study.representatives["single"].values()) == {"single/scenes"}
        assert "shared" in study.representatives

    def test_other_roles_are_compared_and_random_comes_last(self) -> None:
        study = analyse(full_study(0, backbones=(*BACKBONES, "imagenet")))
        assert list(study.representatives) == ["single", "shared", "separate", "expanded", "imagenet", "random"]
        assert study.backbones[-2:] == ("squeezed", "imagenet")


class TestOneForAll:
    """The specialist of a family, and the one file of a role that is best for all families."""

    def records(self) -> list[CellRecord]:
        """Backbone a is best on pets, b on roads and in the mean of both families."""
        values = {"single/a": (60.0, 20.0), "single/b": (50.0, 40.0), "squeezed": (58.0, 45.0)}
        return [
            cell(name, backbone, seed, value + seed)
            for backbone, found in values.items()
            for name, value in zip(("pets", "roads"), found, strict=True)
            for seed in (0, 1)
        ]

    def test_each_is_compared_with(self) -> None:
        study = analyse(self.records())
        found = compared(study, "single", "classification"), compared(study, "single", "classification", "overall")
        assert [(item.baseline, item.difference.mean) for item in found] == [("single/a", -2.0), ("single/b", 8.0)]

    def test_a_goal_says_which(self) -> None:
        goals = [
            Goal(role="single", family="classification", measure="difference", at_least=3.0, choice=choice)
            for choice in ("family", "overall")
        ]
        assert [item.reached for item in analyse(self.records(), goals=goals).verdicts] == [False, True]

    def test_sets_and_the_mean_of_all_have_one_baseline(self) -> None:
        study = analyse(self.records())
        assert {item.kind for item in study.comparisons if item.choice == "overall"} == {"family"}


class TestMissing:
    def test_an_incomplete_seed_is_not_paired(self) -> None:
        records = [r for r in full_study(0) if (r.set_name, r.backbone, r.seed) != ("pets", "shared", 1)]
        study = analyse(records)
        (missing,) = study.missing
        assert (missing.set_name, missing.protocol, missing.backbone, missing.seed) == ("pets", "probe", "shared", 1)
        seeds = {name: list(compared(study, "shared", name).difference.by_seed) for name in ("pets", "digits")}
        assert seeds == {"pets": [0, 2], "digits": [0, 1, 2]}
        assert list(compared(study, "shared", "classification").difference.by_seed) == [0, 2]
        assert list(compared(study, "shared", "overall").difference.by_seed) == [0, 2]
        assert list(compared(study, "shared", "detection").difference.by_seed) == [0, 1, 2]

    def test_a_role_without_a_set_has_no_baseline_in_that_family(self) -> None:
        study = analyse([r for r in full_study(0) if (r.set_name, r.role) != ("pets", "single")])
        assert set(study.representatives["single"]) == {"detection", "segmentation"}
        goals = [item for item in study.verdicts if (item.goal.role, item.goal.choice) == ("single", "family")]
        verdicts = {item.goal.family: item for item in goals}
        assert verdicts["classification"].reached is None
        assert verdicts["detection"].reached is not None
        assert len(study.missing) == 6

    def test_a_variant_without_a_set_leaves_the_others(self) -> None:
        study = analyse([r for r in full_study(0) if (r.set_name, r.backbone) != ("pets", "single/icons")])
        assert study.representatives["single"]["classification"] == "single/scenes"

    def test_variants_without_a_common_seed(self, tmp_path: Path) -> None:
        """As while another seed of one of them runs; the one with most seeds stands for the role."""
        records = [cell(name, "squeezed", seed, 50.0) for name in ("pets", "roads") for seed in (0, 1, 2)]
        records += [cell(name, "single/a", seed, 40.0) for name in ("pets", "roads") for seed in (0, 1)]
        records += [cell("pets", "single/b", 2, 45.0)]
        study = analyse(records)
        assert study.representatives["single"]["classification"] == "single/a"
        write_report(study, records, tmp_path)

    def test_goals_wait_for_cells_of_roles_that_are_there(self) -> None:
        records = [
            cell(name, backbone, 0, 50.0) for name in ("pets", "digits") for backbone in ("squeezed", "single/a")
        ]
        records = [record for record in records if (record.set_name, record.backbone) != ("digits", "single/a")]
        assert analyse(records).verdicts
        assert {item.reached for item in analyse(records).verdicts} == {None}

    def test_no_single_role(self) -> None:
        study = analyse([r for r in full_study(0) if r.role != "single"])
        assert "single" not in study.representatives
        judged = {(item.goal.role, item.reached is not None) for item in study.verdicts}
        assert judged == {("single", False), ("shared", True), ("expanded", True)}

    def test_the_subject_alone(self) -> None:
        study = analyse(full_study(0, backbones=("squeezed",)))
        assert study.comparisons == study.verdicts == ()
        assert all(item.random is None and item.spread is None and item.flat is None for item in study.checks)

    def test_one_seed_has_no_interval(self) -> None:
        study = analyse(full_study(0, num_seeds=1))
        found = compared(study, "single", "detection").difference
        assert (found.n, found.std, found.half_width, found.interval) == (1, None, None, None)
        assert found.mean is not None
        assert all(item.certain is None and item.excludes_zero is None for item in study.verdicts)
        assert all(item.noise is None and item.flat is None and item.chance is None for item in study.checks)

    def test_nothing_has_no_mean(self) -> None:
        assert Estimate.of({}) == Estimate(by_seed={})

    def test_a_baseline_of_zero_has_no_gain(self) -> None:
        study = analyse(
            changed(full_study(0), lambda r: 0.0 if (r.set_name, r.role) == ("cells", "random") else r.value)
        )
        found = compared(study, "random", "detection")
        assert (found.difference.n, found.gain.n, found.retention.n) == (3, 0, 0)
        overall = compared(study, "random", "overall")
        assert (overall.gain.n, overall.retention.n) == (0, 3)


class TestPrimary:
    def protocols(self) -> list[CellRecord]:
        knn = [replace(r, protocol="knn", value=r.value - 9) for r in full_study(0) if r.set_name == "pets"]
        return [*full_study(0), *knn]

    def test_most_cells_decide(self) -> None:
        records = self.protocols()
        assert analyse(records[:-1]).primary["pets"] == "probe"
        assert analyse(records[1:]).primary["pets"] == "knn"

    def test_the_first_of_equals(self) -> None:
        assert analyse(self.protocols()).primary == {
            "pets": "knn",
            "digits": "probe",
            "cells": "probe",
            "roads": "probe",
        }

    def test_it_can_be_given(self) -> None:
        study = analyse(self.protocols(), primary={"pets": "probe"})
        assert study.comparisons == analyse(full_study(0)).comparisons
        assert {item.protocol for item in study.set_means if item.set_name == "pets"} == {"knn", "probe"}


class TestVerdict:
    GOAL = Goal(role="shared", family="classification", measure="difference", at_least=3.0)

    def judge(self, differences: list[float], goal: Goal = GOAL) -> Any:
        records = [cell("pets", "shared", seed, 50.0) for seed in range(len(differences))]
        records += [cell("pets", "squeezed", seed, 50.0 + x) for seed, x in enumerate(differences)]
        (verdict,) = analyse(records, goals=[goal]).verdicts
        return verdict

    def test_reached_for_certain(self) -> None:
        found = self.judge([4.0, 4.1, 4.2])
        assert (found.reached, found.missed_by, found.certain, found.excludes_zero) == (True, 0.0, True, True)

    def test_reached_on_average(self) -> None:
        found = self.judge([1.0, 4.0, 7.0])
        assert (found.reached, found.missed_by, found.certain, found.excludes_zero) == (True, 0.0, False, False)

    def test_missed(self) -> None:
        found = self.judge([2.0, 2.1, 2.2])
        assert (found.reached, found.certain, found.excludes_zero) == (False, False, True)
        assert found.missed_by == pytest.approx(0.9)

    def test_met_exactly_despite_rounding(self) -> None:
        assert self.judge([2.9, 3.1, 3.0]).reached

    def test_retention_has_no_zero(self) -> None:
        found = self.judge([-1.0, -1.1], Goal(role="shared", family="overall", measure="retention", at_least=98))
        assert found.excludes_zero is None
        assert found.missed_by == pytest.approx(98 - 97.9)

    @LAW
    @given(st.lists(st.floats(-5, 5), min_size=2, max_size=4), st.floats(-5, 5))
    def test_certain_is_more_than_reached(self, differences: list[float], at_least: float) -> None:
        found = self.judge(differences, replace(self.GOAL, at_least=at_least))
        assert found.reached or not found.certain
        assert found.reached == (found.missed_by == 0)


def test_curves_are_averaged_where_seeds_meet() -> None:
    curves = {0: [[10, 1.0], [20, 3.0]], 1: [[10, 2.0], [40, 5.0]]}
    records = [cell("pets", "squeezed", seed, 5.0, details={"curve": curve}) for seed, curve in curves.items()]
    (found,) = analyse(records).set_means
    assert found.curve == ((10, 1.5, 2), (20, 3.0, 1), (40, 5.0, 1))


def test_a_flat_set_is_found() -> None:
    records = [cell("pets", name, seed, 50.0 + 2 * seed) for name in BACKBONES for seed in range(3)]
    (check,) = analyse(records).checks
    assert check.flat
    assert check.chance == pytest.approx(1.0)


@pytest.mark.parametrize("best", [50.0, 60.0])
def test_without_noise_any_difference_counts(best: float) -> None:
    """As of files that all seeds share, under a protocol without chance."""
    records = [cell("pets", name, seed, 50.0) for name in ("single/a", "single/b") for seed in range(3)]
    records += [cell("pets", "squeezed", seed, best) for seed in range(3)]
    (check,) = analyse(records).checks
    assert tells_apart(check) == (best > 50.0)


def test_a_backbone_that_lacks_seeds_tells_nothing_of_a_set() -> None:
    records = [cell("pets", name, seed, 20.0 * seed) for name in ("single/a", "squeezed") for seed in (0, 1)]
    (alone,) = analyse(records).checks
    (check,) = analyse([*records, cell("pets", "single/b", 1, 20.0)]).checks
    assert (check.spread, check.noise, check.best) == (alone.spread, alone.noise, alone.best)


class TestErrors:
    def fails(self, match: str, records: list[CellRecord], **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            analyse(records, **options)

    def test_no_record(self) -> None:
        self.fails("The transfer study has 1 problem:\n.*has no cell", [])

    @pytest.mark.parametrize("name", ["value", "trivial", "seconds"])
    @pytest.mark.parametrize("number", [float("nan"), float("inf"), "high"])
    def test_no_number(self, name: str, number: Any) -> None:
        first, *others = full_study(0)
        self.fails(rf"pets/probe/random/0: its {name} is .*finite number", [replace(first, **{name: number}), *others])

    def test_only_the_trivial_value_may_be_none(self) -> None:
        study = analyse([replace(record, trivial=None) for record in full_study(0)])
        assert {check.trivial for check in study.checks} == {None}
        first, *others = full_study(0)
        self.fails("its value is None", [replace(first, value=None), *others])

    def test_two_records_of_a_cell(self) -> None:
        records = full_study(0)
        self.fails("pets/probe/random/0 has 2 records", [*records, records[0]])

    @pytest.mark.parametrize(
        ("what", "where"),
        [("family", "pets"), ("metric", "pets/probe"), ("settings", "pets/probe"), ("weights", "random, seed 0,")],
    )
    def test_cells_that_cannot_be_compared(self, what: str, where: str) -> None:
        first, *others = full_study(0)
        self.fails(f"{where} has cells of different {what}.*other", [replace(first, **{what: "other"}), *others])

    def test_the_name_of_the_mean_over_families(self) -> None:
        records = [replace(r, family="overall") for r in full_study(0) if r.set_name == "pets"]
        self.fails("pets has the family 'overall'", records)

    def test_seed_that_is_no_integer(self) -> None:
        first, *others = full_study(0)
        self.fails("pets/probe/random/zero: its seed is 'zero'", [replace(first, seed="zero"), *others])

    @pytest.mark.parametrize("curve", [[[1]], [[1, "high"]], [1, 2], 7, [[1, float("nan")]]])
    def test_curve(self, curve: Any) -> None:
        first, *others = full_study(0)
        self.fails("pets/probe/random/0: its curve", [replace(first, details={"curve": curve}), *others])

    def test_unknown_subject(self) -> None:
        self.fails(
            "The subject is 'student', but the backbones are random, single/icons", full_study(0), subject="student"
        )

    def test_a_subject_of_several_backbones(self) -> None:
        self.fails("of which there are 2: choose one of expanded/a, expanded/b", full_study(0), subject="expanded")

    def test_several_primary_protocols(self) -> None:
        records = [cell("pets", "squeezed", 0, 1.0, protocol=name, primary=True) for name in ("probe", "knn")]
        with pytest.raises(ConfigError, match=r"pets has several primary protocols, knn, probe: choose one"):
            analyse(records)
        assert analyse(records, primary={"pets": "knn"}).primary == {"pets": "knn"}

    def test_primary_protocol_of_an_unknown_set(self) -> None:
        self.fails(
            "primary protocol for birds, but the sets are cells, digits", full_study(0), primary={"birds": "probe"}
        )

    def test_unknown_primary_protocol(self) -> None:
        self.fails("primary protocol of pets is 'knn', but it has probe", full_study(0), primary={"pets": "knn"})

    def test_unknown_measure(self) -> None:
        goal = Goal(role="single", family="overall", measure="ratio", at_least=1)
        self.fails("measure is 'ratio', but one of difference, gain, retention", full_study(0), goals=[goal])

    def test_all_problems_at_once(self) -> None:
        first, *others = full_study(0)
        self.fails("2 problems", [replace(first, value=float("nan")), *others], subject="student")
