"""Numbers of a study in words, alike in pages and tables."""

from ..results.study import OVERALL, Estimate, Verdict

NOTHING = "–"


def number(value: float | None, *, signed: bool = False) -> str:
    """One decimal, with a true minus sign; a dash for None."""
    if value is None:
        return NOTHING
    text = f"{value:+.1f}" if signed else f"{value:.1f}"
    return ("0.0" if float(text) == 0 else text).replace("-", "−")


def estimate(found: Estimate, *, signed: bool = False) -> str:
    """``71.2 ± 1.1``; without the interval where there is none."""
    mean = number(found.mean, signed=signed)
    return mean if found.half_width is None else f"{mean} ± {found.half_width:.1f}"


def values(found: Estimate) -> str:
    """``0: 71.2, 1: 70.9``, by seed."""
    return ", ".join(f"{seed}: {number(value)}" for seed, value in found.by_seed.items())


def probability(value: float | None) -> str:
    """Three decimals; ``<0.001`` for less."""
    return NOTHING if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def outcome(verdict: Verdict) -> str:
    """``Reached``, ``Missed by 0.4`` or ``Not judged``."""
    if verdict.reached is None:
        return "Not judged"
    # Of a miss that rounds to nothing, more digits.
    missed_by = verdict.missed_by or 0.0
    return (
        "Reached"
        if verdict.reached
        else f"Missed by {missed_by:.1f}"
        if missed_by >= 0.05
        else f"Missed by {missed_by:.2g}"
    )


def _goal(verdict: Verdict) -> str:
    goal = verdict.goal
    who = f"the {goal.role} that is best overall" if goal.choice == OVERALL else goal.role
    if goal.measure == "retention":
        return f"at least {goal.at_least:g} % of {who}"
    unit = "points" if goal.measure == "difference" else "%"
    return f"at least {goal.at_least:+g} {unit} against {who}" if goal.at_least else f"no worse than {who}"


def goal_name(verdict: Verdict) -> str:
    """``Classification: at least +3 points against single``."""
    return f"{verdict.goal.family.capitalize()}: {_goal(verdict)}"


def sentence(verdict: Verdict, subject: str) -> str:
    """What was found for a goal."""
    found, goal, baseline = verdict.found, verdict.goal, verdict.baseline
    if found is None or found.mean is None:
        text = f"There are no complete cells of {subject} and of the role {goal.role} to compare"
        return f"{text}." if goal.measure == "difference" else f"{text}, or these are not above 0."
    size = number(abs(found.mean))
    if goal.measure == "difference":
        what = f"is {size} points {'below' if found.mean < 0 else 'above'} {baseline}"
    elif goal.measure == "gain":
        what = f"is {size} % {'worse' if found.mean < 0 else 'better'} than {baseline}, relatively"
    else:
        what = f"keeps {size} % of {baseline}"
    interval = _interval(found, signed=goal.measure != "retention")
    return f"{subject} {what} ({interval}).{_certainty(verdict)}"


def _interval(found: Estimate, *, signed: bool) -> str:
    if found.interval is None:
        return "one complete seed, so no interval"
    low, high = (number(end, signed=signed) for end in found.interval)
    return f"95 % interval {low} to {high}, {plural(found.n, 'seed')}"


def _certainty(verdict: Verdict) -> str:
    """Where the interval lies."""
    if verdict.found is None or verdict.found.interval is None:
        return ""
    holds_goal = not verdict.certain and verdict.found.interval[1] >= verdict.goal.at_least
    place = "reaches below the goal" if verdict.reached else "reaches above the goal"
    if not holds_goal:
        place = "lies wholly at or above the goal" if verdict.reached else "lies wholly below the goal"
    zero = {None: "", True: " and excludes zero", False: " and includes zero"}[verdict.excludes_zero]
    return f" The interval {place}{zero}."
