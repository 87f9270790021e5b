"""Linear and nearest-neighbour probes: how much a frozen backbone's features tell about unseen classes."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.evaluation.evaluator import inference_context
from detectron2.modeling import Backbone
from detectron2.utils.logger import log_every_n_seconds
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader, Dataset

logger = logging.getLogger(__name__)

#: Features [images, channels] (float32) and labels [images] (int64).
Labelled = tuple[np.ndarray, np.ndarray]

DEFAULT_CS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Outcome of a linear probe; accuracies in percent.

    Attributes:
        accuracy: share of test images classified correctly.
        mean_class_acc: mean over the test classes of that share.
        c: the chosen inverse strength of the L2 regularisation.
        held_out_accuracy: on the part of the training images that chose ``c``; NaN if there was no choice.
        num_train: images the final classifier was fitted to.
        num_test: images it was tested on.
        converged: whether the final fit ended before its limit of iterations.
    """

    accuracy: float
    mean_class_acc: float
    c: float
    held_out_accuracy: float
    num_train: int
    num_test: int
    converged: bool


class _CentreCrops(Dataset):
    """Images as tensors [3, size, size] of 0–255 in ``input_format``, with their labels."""

    def __init__(self, records: Sequence[Mapping[str, Any]], *, image_size: int, input_format: str):
        self._items = [(record["file_name"], int(record["category_id"])) for record in records]
        self._size = image_size
        self._format = input_format

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file_name, label = self._items[index]
        image = utils.read_image(file_name, format=self._format)  # [height, width, 3]
        height, width = image.shape[:2]
        scale = self._size / min(height, width)
        new_height, new_width = (max(self._size, round(side * scale)) for side in (height, width))
        top, left = (new_height - self._size) // 2, (new_width - self._size) // 2
        steps = [
            T.ResizeTransform(height, width, new_height, new_width),
            T.CropTransform(left, top, self._size, self._size),
        ]
        image = T.TransformList(steps).apply_image(image)
        return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), label


def _check_extraction(backbone: Backbone, records: Sequence[Any], feature: str) -> None:
    known = backbone.output_shape()
    if feature not in known:
        raise ValueError(
            f"The backbone has no feature {feature!r}, only {', '.join(known)}; see MODEL.RESNETS.OUT_FEATURES."
        )
    if not records:
        raise ValueError("There are no images to extract features from.")


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    records: Sequence[Mapping[str, Any]],
    *,
    image_size: int,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    input_format: str = "BGR",
    batch_size: int = 64,
    feature: str = "res5",
    autocast_dtype: torch.dtype | None = None,
    channels_last: bool = True,
    num_workers: int = 2,
    progress: bool = False,
) -> Labelled:
    """Global average of one feature map for each image, with the backbone in evaluation mode.

    The shorter edge of an image is resized to ``image_size`` and the centre square is cropped.

    Args:
        backbone: any Detectron2 backbone; the mode it was in is restored, its weights stay as they are.
        records: with ``file_name`` and ``category_id``.
        image_size: edge of the square, in pixels.
        pixel_mean, pixel_std: per channel, in the order of ``input_format``.
        input_format: channel order, such as BGR or RGB.
        batch_size: images per forward pass.
        feature: name of the feature map, as in ``backbone.output_shape()``.
        autocast_dtype: compute in this lower precision, such as ``torch.bfloat16``; None computes as the weights are.
        channels_last: pass images in that memory format.
        num_workers: processes that read images; 0 reads them here.
        progress: log how far it is every 5 seconds.

    Returns:
        features [images, channels] (float32) and labels [images] (int64), in the order of ``records``.

    Raises:
        ValueError: for an unknown feature or no records.
    """
    _check_extraction(backbone, records, feature)
    device = next(backbone.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (pixel_mean, pixel_std))
    images = _CentreCrops(records, image_size=image_size, input_format=input_format)
    loader = DataLoader(images, batch_size=batch_size, num_workers=num_workers, pin_memory=device.type == "cuda")
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    parts, labels = [], []
    with inference_context(backbone):
        for batch, label in loader:
            x = ((batch.to(device).float() - mean) / std).contiguous(memory_format=memory_format)
            with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                maps = backbone(x)[feature]  # [batch, channels, height, width]
            parts.append(maps.float().mean(dim=(2, 3)).cpu())
            labels.append(label)
            if progress:
                done = f"Extracted the features of {sum(map(len, labels))} / {len(images)} images."
                log_every_n_seconds(logging.INFO, done, n=5, name=__name__)
    return torch.cat(parts).numpy(), torch.cat(labels).numpy()


def _hold_out(y: np.ndarray, *, seed: int, share: float = 0.2) -> np.ndarray:
    """Mask [images] of a stratified held-out part: of each class ``share``, but at least one and never the last image.

    Unlike scikit-learn's splitters it also serves classes with very few images.
    """
    generator = np.random.default_rng(seed)
    mask = np.zeros(len(y), dtype=bool)
    for label in np.unique(y):
        members = generator.permutation(np.flatnonzero(y == label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        mask[members[:count]] = True
    return mask


def _fit(x: np.ndarray, y: np.ndarray, *, c: float, max_iter: int) -> Pipeline:
    """Standardise, then multinomial logistic regression with an L2 penalty."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, solver="lbfgs", max_iter=max_iter))
    with warnings.catch_warnings():
        # Reported as ProbeResult.converged instead.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(x, y)


def _choose_c(x: np.ndarray, y: np.ndarray, *, cs: Sequence[float], seed: int, max_iter: int) -> tuple[float, float]:
    """The C with the best held-out accuracy (the smallest among equals), and that accuracy."""
    if len(cs) == 1:
        return cs[0], float("nan")
    mask = _hold_out(y, seed=seed)
    if not mask.any():
        raise ValueError(
            "Every class has a single training image, so C cannot be chosen; give exactly one value in cs."
        )
    scored = [(_fit(x[~mask], y[~mask], c=c, max_iter=max_iter).score(x[mask], y[mask]), -c) for c in cs]
    accuracy, negative = max(scored)
    return -negative, 100 * float(accuracy)


def _check_labelled(train: Labelled, test: Labelled) -> None:
    for name, (x, y) in (("training", train), ("test", test)):
        if x.ndim != 2 or len(x) != len(y) or not len(y):
            raise ValueError(
                f"The {name} features have shape {x.shape} for {len(y)} labels, but [images, channels] is expected."
            )
        if not np.isfinite(x).all():
            raise ValueError(f"The {name} features hold NaN or infinite values; has the backbone's training diverged?")
    if train[0].shape[1] != test[0].shape[1]:
        raise ValueError(f"Training features have {train[0].shape[1]} channels, test features {test[0].shape[1]}.")
    if len(np.unique(train[1])) < 2:
        raise ValueError("The training images show a single class, but a probe needs at least two.")


def linear_probe(
    train: Labelled, test: Labelled, *, seed: int, cs: Sequence[float] = DEFAULT_CS, max_iter: int = 2000
) -> ProbeResult:
    """Fit a linear classifier to frozen features.

    Features are standardised by statistics of the images that are fitted. The regularisation is chosen on a stratified
    fifth of the training images, then the classifier is fitted to all of them; test labels take no part in either.

    Args:
        train, test: features [images, channels] and labels [images].
        seed: of the held-out part, the only random choice.
        cs: candidates for the inverse regularisation strength; a single one is used as it is.
        max_iter: limit of L-BFGS iterations per fit.

    Raises:
        ValueError: for inconsistent shapes, non-finite features, one class only, or no candidate.
    """
    _check_labelled(train, test)
    if not cs or min(cs) <= 0:
        raise ValueError(f"cs is {tuple(cs)}, but at least one positive number is expected.")
    c, held_out_accuracy = _choose_c(*train, cs=cs, seed=seed, max_iter=max_iter)
    model = _fit(*train, c=c, max_iter=max_iter)
    predicted, labels = model.predict(test[0]), test[1]
    recall = recall_score(labels, predicted, labels=np.unique(labels), average="macro", zero_division=0)
    converged = bool((model[-1].n_iter_ < max_iter).all())
    if not converged:
        logger.warning("The linear probe stopped after %d iterations, before it converged.", max_iter)
    return ProbeResult(
        accuracy=100 * float(accuracy_score(labels, predicted)),
        mean_class_acc=100 * float(recall),
        c=c,
        held_out_accuracy=held_out_accuracy,
        num_train=len(train[1]),
        num_test=len(labels),
        converged=converged,
    )


def knn_probe(train: Labelled, test: Labelled, *, k: int = 10) -> float:
    """Accuracy, in percent, of the majority among the ``k`` nearest training images by cosine similarity.

    Raises:
        ValueError: as :func:`linear_probe`.
    """
    _check_labelled(train, test)
    model = KNeighborsClassifier(n_neighbors=min(k, len(train[1])), metric="cosine", algorithm="brute")
    return 100 * float(model.fit(*train).score(*test))


def probe_backbone(
    backbone: Backbone,
    train_name: str,
    test_name: str,
    *,
    seed: int,
    cs: Sequence[float] = DEFAULT_CS,
    **extraction: Any,
) -> ProbeResult:
    """Linear probe of a loaded backbone on two registered classification data sets with one label space.

    Args:
        backbone: with its weights loaded, on the device to compute on.
        train_name, test_name: registered data sets of ``category_id`` records.
        seed, cs: see :func:`linear_probe`.
        extraction: keyword arguments of :func:`extract_features`, of which ``image_size``, ``pixel_mean`` and
            ``pixel_std`` must be given.
    """
    train, test = (
        extract_features(backbone, DatasetCatalog.get(name), **extraction) for name in (train_name, test_name)
    )
    return linear_probe(train, test, seed=seed, cs=cs)
