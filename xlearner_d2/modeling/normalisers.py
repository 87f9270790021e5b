"""How features of a teacher are normalised before a student is compared with them."""

from collections.abc import Callable

import torch
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn import functional as F


class Standardiser(nn.Module):
    """Per-channel standardisation by running mean and variance of the teacher's features.

    The statistics are the plain average over the first ``1 / min_momentum`` batches and an exponential one after
    that, so they settle for a frozen teacher and follow one that is still trained. Ranks are averaged.

    Args:
        channels: of the features.
        min_momentum: weight of a new batch in the long run.
        eps: added to the variance.
    """

    mean: Tensor
    var: Tensor
    num_batches: Tensor

    def __init__(self, channels: int, *, min_momentum: float = 0.01, eps: float = 1e-5):
        super().__init__()
        self.min_momentum = min_momentum
        self.eps = eps
        self._batches_seen: int | None = None
        self.register_load_state_dict_post_hook(Standardiser._forget_batches_seen)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.long))

    @property
    def batches_seen(self) -> int:
        """``num_batches``, without waiting for a GPU each time."""
        if self._batches_seen is None:
            self._batches_seen = int(self.num_batches)
        return self._batches_seen

    def _forget_batches_seen(self, _keys: object) -> None:
        self._batches_seen = None

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Take features (N, C, H, W) float32 into account."""
        var, mean = torch.var_mean(features.to(self.mean.dtype), dim=(0, 2, 3), correction=0)
        if comm.get_world_size() > 1:
            own = mean.clone()
            torch.distributed.all_reduce(mean)
            mean /= comm.get_world_size()
            # Of positive numbers alone: a difference of large ones can fall below zero.
            var += (own - mean) ** 2
            torch.distributed.all_reduce(var)
            var /= comm.get_world_size()
        self._batches_seen = self.batches_seen + 1
        self.num_batches += 1
        momentum = max(1.0 / self._batches_seen, self.min_momentum)
        delta = mean - self.mean
        self.mean.add_(delta, alpha=momentum)
        # The variance of a mixture: what the batches have within them, and what their means have between them.
        self.var.lerp_(var, momentum).addcmul_(delta, delta, value=momentum * (1 - momentum))

    def forward(self, features: Tensor) -> Tensor:
        """Standardised features, same shape."""
        return F.batch_norm(features.to(self.mean.dtype), self.mean, self.var, eps=self.eps)


class PHIStandardiser(Standardiser):
    """PHI-S: rotate so that all channels have equal variance, then scale all by one number.

    Source: Ranzinger et al., "PHI-S: Distribution Balancing for Label-Free Multi-Teacher Distillation" (2024). The
    rotation is computed after 1, 2, 4, … batches up to ``last_update``, and stays from then on, as the projector has
    to learn it. The number of channels must be a power of two, as Hadamard matrices of Sylvester's kind have.
    """

    cov: Tensor
    rotation: Tensor
    hadamard: Tensor

    def __init__(self, channels: int, *, last_update: int = 32):
        from scipy.linalg import hadamard

        super().__init__(channels)
        self.last_update = last_update
        self.register_buffer("cov", torch.eye(channels))
        self.register_buffer("rotation", torch.eye(channels))
        basis = torch.from_numpy(hadamard(channels)).float() / channels**0.5
        self.register_buffer("hadamard", basis, persistent=False)

    @torch.no_grad()
    def update(self, features: Tensor) -> None:
        """Take features (N, C, H, W) float32 into account, until the rotation is settled."""
        if self.batches_seen >= self.last_update:
            return
        super().update(features)
        points = features.movedim(1, -1).flatten(0, -2) - self.mean  # (N*H*W, C)
        with torch.autocast(points.device.type, enabled=False):  # float16 has no room for the sum
            cov = points.T @ points / len(points)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(cov)
            cov /= comm.get_world_size()
        self.cov += (cov - self.cov) / self.num_batches
        if self.batches_seen.bit_count() == 1:
            values, vectors = torch.linalg.eigh(self.cov)
            scale = values.clamp(min=0).mean().clamp(min=self.eps).rsqrt()
            self.rotation.copy_(scale * self.hadamard @ vectors.T)

    def forward(self, features: Tensor) -> Tensor:
        """Rotated and scaled features, same shape."""
        return F.conv2d(features - self.mean.view(-1, 1, 1), self.rotation[:, :, None, None])


class L2Normaliser(nn.Module):
    """Features of each position divided by their L2 norm, times the root of the number of channels."""

    def update(self, features: Tensor) -> None:
        """Nothing to learn."""

    def forward(self, features: Tensor) -> Tensor:
        """Normalised features, same shape (N, C, H, W)."""
        return F.normalize(features, dim=1) * features.shape[1] ** 0.5


class NoNormaliser(nn.Module):
    """Features as they are."""

    def update(self, features: Tensor) -> None:
        """Nothing to learn."""

    def forward(self, features: Tensor) -> Tensor:
        """The same tensor."""
        return features


Normaliser = Standardiser | L2Normaliser | NoNormaliser
NORMALISERS: dict[str, Callable[[int], Normaliser]] = {
    "standardise": Standardiser,
    "phi_s": PHIStandardiser,
    "l2": lambda channels: L2Normaliser(),
    "none": lambda channels: NoNormaliser(),
}
