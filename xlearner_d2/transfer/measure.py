"""A whole transfer study: check everything, measure what is not measured yet."""

import logging
from collections.abc import Sequence
from pathlib import Path

from ..config import load_config
from ..engine.plan_checks import can_be_made
from ..specs import ConfigError
from .backbones import BackboneSpec, check_backbones
from .places import Places
from .protocols import check_heads
from .runner import all_cells, mark_primary, run_cells, unfinished
from .suite import Suite, check_data, parse_suite

logger = logging.getLogger(__name__)


def check_suite(suite_file: str, opts: Sequence[str] = ()) -> Suite:
    """Parse a suite, and check its data and the configs of its heads.

    Raises:
        ConfigError: with all problems of the settings; when there are none, of the data; then, of the heads.
    """
    cfg = load_config(suite_file, opts)
    suite = parse_suite(cfg)
    check_data(suite, check_images=cfg.XLEARNER.CHECK_IMAGES)
    check_heads(suite)
    return suite


def check_folder(folder: Path) -> None:
    """See that a study can be kept there.

    Raises:
        ConfigError: when it cannot.
    """
    if not can_be_made(folder):
        problem = f"--output is {folder}, which is no folder that can be made or written to."
        raise ConfigError([problem], what="The command line")


def measure(
    suite_file: str,
    backbones: Sequence[BackboneSpec],
    seeds: Sequence[int],
    folder: Path,
    *,
    opts: Sequence[str] = (),
    places: Places | None = None,
    dry_run: bool = False,
) -> None:
    """Measure every backbone on every set of a suite, as often as there are seeds.

    Args:
        folder: keeps a record of each cell; one that is there already is not measured again.
        opts: overrides of the suite.
        places: where cells run, one in each at a time; None for a single one.
        dry_run: check, list the cells and stop.

    Raises:
        ConfigError: before anything is measured, with all problems; or after all is, when cells failed.
    """
    if not dry_run:
        check_folder(folder)
    suite = check_suite(suite_file, opts)
    check_backbones(backbones, seeds, suite.cfg)
    cells = all_cells(suite, backbones, seeds)
    left = unfinished(suite, cells, folder)
    logger.info(f"Suite {suite.name}: {len(cells)} cells, of which {len(cells) - len(left)} are finished.")
    if dry_run:
        print("\n".join(f"{'to do' if cell in left else 'done '}  {cell}" for cell in cells))
        return
    mark_primary(suite, folder)
    if left:
        failed = run_cells(left, suite_file=suite_file, opts=opts, folder=folder, places=places or Places(1))
        if failed:
            first = [f"{cell}: {error!r}" for cell, error in list(failed.items())[:3]]
            raise ConfigError(first, what=f"{len(failed)} of {len(left)} cells failed; what failed first")
