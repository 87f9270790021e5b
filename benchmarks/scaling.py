"""How the cost of an expansion step grows with tasks, sources, image size and batch."""

from argparse import Namespace
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from models import make_batch, make_model
from ratios import precision, train
from timing import Run, in_turn

SHARINGS = ("shared", "separate", "detached", "bidirectional")
COLOURS = dict(zip(SHARINGS, ("#0072b2", "#009e73", "#d55e00", "#cc79a7"), strict=True))


def _step(args: Namespace, sharing: str, *, tasks: int = 3, sources: int = 1, size: int = 0, images: int = 0) -> Run:
    """Forward and backward pass of so many classification tasks, each of so many sources."""
    names = [f"XLEARNER.SOURCES.source{n}.TASK" for n in range(tasks * sources)]
    chosen = [item for n, name in enumerate(names) for item in (name, f"task{n % tasks}")]
    options = ("XLEARNER.SHARING", sharing, *chosen, *precision(args))
    model = make_model(("classifier",) * (tasks * sources), *options)
    batch = make_batch(model, count=images or args.images, size=size or args.size)
    return lambda: train(args, model, batch)


def _axes(args: Namespace) -> dict[str, tuple[list[int], Callable[[str, int], Run]]]:
    return {
        "tasks": ([1, 2, 3, 4], lambda sharing, n: _step(args, sharing, tasks=n)),
        "sources of each of two tasks": ([1, 2, 3], lambda sharing, n: _step(args, sharing, tasks=2, sources=n)),
        "image size in pixels": ([64, 128, 192], lambda sharing, n: _step(args, sharing, size=n)),
        "images of each source": ([2, 4, 8, 16], lambda sharing, n: _step(args, sharing, images=n)),
    }


def scaling(args: Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds by axis and sharing; draws them."""
    found: dict[str, dict[str, float]] = {}
    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for panel, (axis, (values, make)) in zip(panels.flat, _axes(args).items(), strict=True):
        medians: dict[str, list[float]] = {sharing: [] for sharing in SHARINGS}
        for value in values:
            times = in_turn({sharing: make(sharing, value) for sharing in SHARINGS}, rounds=max(args.rounds // 3, 3))
            for sharing in SHARINGS:
                medians[sharing].append(float(np.median(times[sharing])))
        for sharing, line in medians.items():
            panel.plot(values, line, marker="o", color=COLOURS[sharing], label=sharing)
            found[f"{sharing}, by {axis}"] = {str(v): round(ms, 1) for v, ms in zip(values, line, strict=True)}
        panel.set(xlabel=axis, xticks=values, ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("ms a step, forward and backward")
    panels[0, 0].legend(frameon=False, title="XLEARNER.SHARING")
    figure.savefig(args.output / "scaling.png", dpi=130)
    plt.close(figure)
    return found
