"""Load a trained expansion into a larger one, part by part: what the file holds is loaded strictly, the rest is new."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from ..specs import ConfigError
from .load import is_counter

#: What a tensor's name says about its part of the model, and how that part is called in messages.
_PARTS = (
    (re.compile(r"backbone\.branches\.(\w+)\.(stem|res\d)\."), "{1} of branch {0}"),
    (re.compile(r"backbone\.reconciliation\.(\w+)\.layers\.(\w+)\.(\w+)\."), "layer {2} from branch {1} to branch {0}"),
    (re.compile(r"heads\.(\w+)\."), "head {0}"),
)


def part_of(name: str) -> str:
    """The part that a tensor of an expanded model belongs to, in words; parts are loaded whole or not at all."""
    for pattern, words in _PARTS:
        match = pattern.match(name)
        if match:
            return words.format(*match.groups())
    return name


def belongs_to(name: str, *, branches: Iterable[str], heads: Iterable[str]) -> bool:
    """Whether a tensor is one of a branch, of a layer from or to it, or of a head."""
    for owner in branches:
        if re.match(rf"backbone\.(branches\.{owner}\.|reconciliation\.({owner}\.|\w+\.layers\.{owner}\.))", name):
            return True
    return any(name.startswith(f"heads.{head}.") for head in heads)


def unread(state: Mapping[str, Tensor], model: nn.Module, branches: Iterable[str]) -> list[str]:
    """Names of tensors of a file whose part ``model`` has no longer: stages of ``branches`` and their layers."""
    own, branches = {part_of(name) for name in model.state_dict()}, list(branches)
    return [name for name in state if belongs_to(name, branches=branches, heads=()) and part_of(name) not in own]


@dataclass(frozen=True)
class GrowthReport:
    """Parts of the model that came from the file, and those that are new."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        return f"loaded {summary(self.loaded)}; new: {summary(self.new)}"


def summary(parts: Iterable[str]) -> str:
    """Branches and heads by name, stages where only those of a branch, and how many layers join branches."""
    parts = list(parts)
    stages = [tuple(part.split(" of ")) for part in parts if " of branch " in part]
    whole = {branch for stage, branch in stages if stage == "stem"}
    branches = dict.fromkeys(branch if branch in whole else f"{stage} of {branch}" for stage, branch in stages)
    heads = [part for part in parts if part.startswith("head ")]
    layers = sum(part.startswith("layer ") for part in parts)
    found = [*branches, *heads, *([f"{layers} reconciliation layers"] if layers else [])]
    return ", ".join(found) or "nothing"


def load_grown(
    model: nn.Module, state: Mapping[str, Tensor], *, path: str | Path, dropped: Iterable[str] = ()
) -> GrowthReport:
    """Load the parts of an expanded model that both ``model`` and the file have; those that only ``model`` has are new.

    Args:
        state: the file's weights.
        path: the file, for messages.
        dropped: names of tensors of the file that are left out on purpose.

    Raises:
        ConfigError: with every tensor of a common part that only one of them has or that has another shape, and with
            every part that only the file has.
    """
    own = model.state_dict()
    left_out = set(dropped)
    state = {name: value for name, value in state.items() if name not in left_out}
    ours, theirs = ({part_of(name) for name in names} for names in (own, state))
    problems = [f"has {summary(sorted(theirs - ours))}, which the config has not."] if theirs - ours else []
    common = ours & theirs
    for name in own:
        if part_of(name) in common and name not in state and not is_counter(name):
            problems.append(f"lacks {name}.")
    for name, value in state.items():
        if part_of(name) in common and name not in own and is_counter(name):
            continue  # of a norm layer that was not frozen there
        if part_of(name) in common and name not in own:
            problems.append(f"has {name}, which the config's {part_of(name)} has not.")
        elif name in own and own[name].shape != value.shape:
            problems.append(f"has {name} of shape {tuple(value.shape)}, but {tuple(own[name].shape)} is needed.")
    if problems:
        hidden = [f"… and {len(problems) - 10} more."] if len(problems) > 10 else []
        raise ConfigError([*problems[:10], *hidden], what=f"XLEARNER.EXTEND: the file {path}")
    model.load_state_dict(state, strict=False)
    parts = list(dict.fromkeys(map(part_of, own)))
    return GrowthReport(
        loaded=tuple(part for part in parts if part in common), new=tuple(part for part in parts if part not in common)
    )
