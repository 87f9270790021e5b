"""What is done with a backbone on a downstream set, and what comes out."""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler, build_optimizer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage
from torch import nn

from ..data.loader import reading_processes
from ..data.mappers import SourceMapper, build_mapper
from ..data.sources import SourceData, source_data
from ..data.subset import random_share
from ..engine.trainer import StepSeed, build_step_trainer
from ..evaluation.build import build_evaluator, check_evaluation
from ..evaluation.probe import Labelled, extract_features, knn_probe, linear_probe
from ..evaluation.trivial import trivial_metrics
from ..modeling.heads import find_resnet, head_config
from ..modeling.small_maps import multiply_small_maps
from ..modeling.xlearner import cpu_autocast_dtype, keep_convolutions_in
from ..specs import ConfigError, SourceSpec, nearest
from .backbones import BackboneSpec, load_backbone
from .memo import MemoisedBackbone
from .reading import Mapped, evaluation_batches, training_batches
from .suite import ProtocolSpec, SetSpec, Suite

logger = logging.getLogger(__name__)


def run_protocol(
    suite: Suite, spec: SetSpec, protocol: ProtocolSpec, backbone: BackboneSpec, *, seed: int, cache: Path
) -> tuple[float, dict[str, Any]]:
    """Measure one backbone on one set.

    Args:
        cache: folder for features of frozen backbones, which several protocols and seeds share.

    Returns:
        the metric, in percent, and other figures.
    """
    if protocol.kind == "fine_tune":
        return fine_tune(suite, spec, protocol, backbone, seed=seed)
    train, test = _features(suite, spec, protocol, backbone, seed=seed, cache=cache)
    rows = random_share(len(train[1]), protocol.train_share, seed=seed)
    train = (train[0][rows], train[1][rows])
    value, details = _probe(protocol, train, test, images_per_class=protocol.images_per_class, seed=seed)
    curve = [[n, _probe(protocol, train, test, images_per_class=n, seed=seed)[0]] for n in protocol.curve]
    return value, {**details, "curve": curve} if curve else details


def _probe(
    protocol: ProtocolSpec, train: Labelled, test: Labelled, *, images_per_class: int, seed: int
) -> tuple[float, dict[str, Any]]:
    """The metric and other figures of a probe with so many training images of each class; 0 takes all."""
    train = _draw_per_class(train, images_per_class, seed=seed)
    if protocol.kind == "knn":
        return knn_probe(train, test, k=protocol.k), {"num_train": len(train[1])}
    result = asdict(linear_probe(train, test, seed=seed))
    return result["mean_class_acc" if protocol.metric == "mean_class_acc" else "accuracy"], result


def trivial_value(spec: SetSpec, protocol: ProtocolSpec) -> float | None:
    """The metric of a predictor that learns nothing from images; None where none is known, as for sem_seg/mACC."""
    found = trivial_metrics(spec.test, train_names=spec.train)
    if protocol.kind == "fine_tune":
        return found.get(protocol.metric, 0.0 if spec.family == "detection" else None)
    if protocol.metric == "mean_class_acc":
        return 100.0 / len({record["category_id"] for record in DatasetCatalog.get(spec.test)})
    return found["classification/top1"]


def _features(
    suite: Suite, spec: SetSpec, protocol: ProtocolSpec, backbone: BackboneSpec, *, seed: int, cache: Path
) -> tuple[Labelled, Labelled]:
    """Pooled features of the training and test images, computed once per backbone, set and image size."""
    if cache.is_file():
        with np.load(cache) as stored:
            return (stored["train_x"], stored["train_y"]), (stored["test_x"], stored["test_y"])
    cfg = suite.cfg
    network = load_backbone(backbone, cfg, seed=seed).eval()
    network.to(memory_format=torch.channels_last)
    keep_convolutions_in(network, cpu_autocast_dtype(cfg))
    train, test = (
        extract_features(
            network,
            records,
            image_size=protocol.image_size,
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            input_format=cfg.INPUT.FORMAT,
            feature=protocol.feature,
            autocast_dtype=cpu_autocast_dtype(cfg),
            num_workers=reading_processes(cfg.DATALOADER.NUM_WORKERS),
        )
        for records in (_records(spec.train), _records((spec.test,)))
    )
    cache.parent.mkdir(parents=True, exist_ok=True)
    part = cache.with_name(f".{cache.stem}.{os.getpid()}.part.npz")  # another process may want the same features
    np.savez(part, train_x=train[0], train_y=train[1], test_x=test[0], test_y=test[1])
    part.replace(cache)
    return train, test


def _records(names: Sequence[str]) -> list[dict[str, Any]]:
    return [record for name in names for record in DatasetCatalog.get(name)]


def _draw_per_class(data: Labelled, count: int, *, seed: int) -> Labelled:
    """``count`` images of each class, or all where there are fewer; 0 takes all."""
    if not count:
        return data
    generator = np.random.default_rng(seed)
    x, y = data
    chosen = [generator.permutation(np.flatnonzero(y == label))[:count] for label in np.unique(y)]
    rows = np.sort(np.concatenate(chosen))
    return x[rows], y[rows]


def fine_tune_config(suite: Suite, spec: SetSpec, protocol: ProtocolSpec) -> CfgNode:
    """The Detectron2 config that a cell trains: an ordinary one, which a user can also run by hand."""
    where = f"TRANSFER.SETS.{spec.name} with TRANSFER.PROTOCOLS.{protocol.name}"
    cfg = head_config(_as_source(spec, protocol), suite.cfg, where=where)
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = protocol.ims_per_batch
    # Detectron2's trainers have no lower precision on a CPU.
    cfg.SOLVER.AMP.ENABLED = suite.cfg.SOLVER.AMP.ENABLED and suite.cfg.MODEL.DEVICE.startswith("cuda")
    cfg.freeze()
    return cfg


def check_heads(suite: Suite) -> None:
    """See that the config of every cell that trains can be read and fits the data of its set, in training and in test.

    Raises:
        ConfigError: with all problems.
    """
    problems = []
    for spec in suite.sets.values():
        for protocol in (suite.protocols[name] for name in spec.protocols):
            if protocol.kind == "fine_tune":
                try:
                    cfg = fine_tune_config(suite, spec, protocol)
                    check_evaluation(spec.test, cfg)
                    _data(_as_source(spec, protocol), cfg)
                    problems += _check_sampler(protocol, cfg)
                except ConfigError as error:
                    problems += error.problems
                except ValueError as error:
                    problems.append(f"TRANSFER.SETS.{spec.name}.TEST: {error}")
    if problems:
        raise ConfigError(problems, what="The suite")


def _check_sampler(protocol: ProtocolSpec, cfg: CfgNode) -> list[str]:
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    if sampler == "TrainingSampler":
        return []
    where = f"TRANSFER.PROTOCOLS.{protocol.name}.CONFIG"
    cure = "set it to TrainingSampler in OPTS"
    return [f"{where}: DATALOADER.SAMPLER_TRAIN is {sampler!r}, but a cell draws all images equally often: {cure}."]


def _as_source(spec: SetSpec, protocol: ProtocolSpec) -> SourceSpec:
    return SourceSpec(
        name=spec.name,
        task=spec.family,
        config=protocol.config,
        train=spec.train,
        test=(spec.test,),
        ims_per_batch=protocol.ims_per_batch,
        opts=protocol.opts,
    )


def _data(source: SourceSpec, cfg: CfgNode) -> SourceData:
    """What a set's head learns from and is tested on, as in a run with it as a source."""
    try:
        return source_data(source, cfg, {name: DatasetCatalog.get(name) for name in source.data_sets}, seed=0)
    except ConfigError as error:
        raise ConfigError([text.replace("XLEARNER.SOURCES", "TRANSFER.SETS") for text in error.problems]) from error


class _Autocast(nn.Module):
    """A model that runs in lower precision on CPUs that have it; on GPUs the trainer sees to that."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        super().__init__()
        self.model = model
        self.dtype = dtype
        multiply_small_maps(model)

    def forward(self, inputs: Any) -> Any:
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            return self.model(inputs)


def _install(
    model: nn.Module, backbone: BackboneSpec, suite: Suite, source: SourceSpec, cfg: CfgNode, *, seed: int
) -> None:
    """Put the backbone where the model has its ResNet, frozen as the config says."""
    parent, attribute, resnet = find_resnet(model, source)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    network = load_backbone(backbone, suite.cfg, seed=seed, resnet=resnet)
    if network is not resnet:
        network.freeze(freeze_at)
    if freeze_at == 5:
        network.to(memory_format=torch.channels_last).eval()
        keep_convolutions_in(network, cpu_autocast_dtype(suite.cfg))
        if is_deterministic(cfg):  # else the very same pixels hardly return, and to look for them costs time
            network = MemoisedBackbone(network)
    setattr(parent, attribute, network)


class _LossCurve(HookBase):
    """Keeps the total loss of every ``period``-th step."""

    def __init__(self, period: int):
        self.period = period
        self.values: list[float] = []

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            self.values.append(round(get_event_storage().latest()["total_loss"][0], 4))


def fine_tune(
    suite: Suite, spec: SetSpec, protocol: ProtocolSpec, backbone: BackboneSpec, *, seed: int
) -> tuple[float, dict[str, Any]]:
    """Train the protocol's model on the set, and evaluate it with Detectron2's evaluator; see :func:`run_protocol`."""
    source = _as_source(spec, protocol)
    cfg = fine_tune_config(suite, spec, protocol)
    seed_all_rng(seed)
    model = build_model(cfg)
    _install(model, backbone, suite, source, cfg, seed=seed)
    wrapped = _Autocast(model, cpu_autocast_dtype(suite.cfg))
    train, test = read_mapped(suite, spec, protocol)
    chosen = random_share(len(train), protocol.train_share, seed=seed)
    loading = {"batch_size": protocol.ims_per_batch, "num_workers": suite.cfg.DATALOADER.NUM_WORKERS}
    batches = training_batches(train, chosen, seed=seed, **loading)
    curve = _train(wrapped, cfg, suite.cfg, batches, seed=seed)
    evaluator = build_evaluator(spec.test, output_dir=None, head=cfg)
    result: Mapping[str, Mapping[str, float]] = inference_on_dataset(
        wrapped, evaluation_batches(test, **loading), evaluator
    )
    figures = {f"{name}/{key}": float(value) for name, of in result.items() for key, value in of.items()}
    if protocol.metric not in figures:
        known = nearest(protocol.metric, figures)
        raise ConfigError([f"TRANSFER.PROTOCOLS.{protocol.name}.METRIC is {protocol.metric!r}.{known}"])
    if not math.isfinite(figures[protocol.metric]):
        got = f"TRANSFER.PROTOCOLS.{protocol.name}.METRIC is {protocol.metric!r}"
        raise ConfigError([f"{got}, which is not defined on {spec.test!r}: nothing in it is counted by it."])
    details = {name: value for name, value in figures.items() if "-" not in name}  # not of every class
    return figures[protocol.metric], {"num_train": len(chosen), "losses": curve, **details}


def _train(model: nn.Module, cfg: CfgNode, suite_cfg: CfgNode, batches: Iterable[Any], *, seed: int) -> list[float]:
    """Train as the cell's config says; return ten values of the loss, or fewer."""
    optimizer = build_optimizer(cfg, model)
    trainer = build_step_trainer(suite_cfg, model, batches, optimizer)
    curve = _LossCurve(math.ceil(cfg.SOLVER.MAX_ITER / 10))
    scheduler = hooks.LRScheduler(optimizer, build_lr_scheduler(cfg, optimizer))
    trainer.register_hooks([StepSeed(seed), scheduler, curve])
    trainer.train(0, cfg.SOLVER.MAX_ITER)
    return curve.values


def is_deterministic(cfg: CfgNode) -> bool:
    """Whether a config's training images have no augmentation, so that each may be read once and kept."""
    if cfg.MODEL.META_ARCHITECTURE == "ImageClassifier" or cfg.INPUT.MAPPER:  # which does what it likes
        return False
    options = cfg.INPUT
    changes = options.RANDOM_FLIP != "none" or len(options.MIN_SIZE_TRAIN) > 1 or options.CROP.ENABLED
    return not (changes or options.COLOR_JITTER)


_mapped: dict[str, tuple[Mapped, Mapped]] = {}


def read_mapped(suite: Suite, spec: SetSpec, protocol: ProtocolSpec) -> tuple[Mapped, Mapped]:
    """Training and test data of a set, as a cell wants them; those of the latest are kept for the next backbone."""
    key = suite.settings(spec, protocol)
    if key not in _mapped:
        cfg = fine_tune_config(suite, spec, protocol)
        _mapped.clear()
        data = _data(_as_source(spec, protocol), cfg)
        train, test = (SourceMapper(spec.name, build_mapper(cfg, is_train=train)) for train in (True, False))
        _mapped[key] = (
            Mapped(data.train, train, fixed=is_deterministic(cfg)),
            Mapped(data.test[spec.test], test, fixed=True),
        )
    return _mapped[key]
