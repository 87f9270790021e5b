"""The laws of normalising features, against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from xlearner_d2.modeling.normalisers import L2Normaliser, PHIStandardiser, Standardiser


def correlated(channels: int, *, seed: int = 0) -> Tensor:
    """Features (6, C, 7, 5) of channels that have different means, variances and correlations."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=generator) * torch.logspace(-1, 1, channels)
    found = torch.einsum("nchw,cd->ndhw", torch.randn(6, channels, 7, 5, generator=generator), mix)
    return found + 3 * torch.randn(channels, 1, 1, generator=generator)


def points(features: Tensor) -> np.ndarray:
    return features.movedim(1, -1).flatten(0, -2).double().numpy()


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.1, 5)), min_size=1, max_size=100), st.integers(0, 99))
def test_statistics_are_those_of_all_data_seen(batches: list[tuple[float, float]], seed: int) -> None:
    generator = np.random.default_rng(seed)
    data = [generator.normal(mean, deviation, (2, 3, 4, 4)).astype("float32") for mean, deviation in batches]
    normaliser = Standardiser(3)
    for features in data:
        normaliser.update(torch.from_numpy(features))
    everything = np.stack(data).astype("float64")
    np.testing.assert_allclose(normaliser.mean, everything.mean((0, 1, 3, 4)), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(normaliser.var, everything.var((0, 1, 3, 4)), rtol=1e-3, atol=1e-3)


def test_statistics_forget_exponentially_after_the_first_batches() -> None:
    data = np.random.default_rng(0).normal(size=(30, 2, 3, 4, 4)) * np.linspace(1, 3, 30)[:, None, None, None, None]
    normaliser = Standardiser(3, min_momentum=0.1)
    for features in data:
        normaliser.update(torch.from_numpy(features).float())
    weights = np.array([0.1 * 0.9**20] * 10 + [0.1 * 0.9 ** (29 - i) for i in range(10, 30)])[:, None]
    assert weights.sum() == pytest.approx(1)
    mean = (weights * data.mean((1, 3, 4))).sum(0)
    var = (weights * (data**2).mean((1, 3, 4))).sum(0) - mean**2
    np.testing.assert_allclose(normaliser.mean, mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(normaliser.var, var, rtol=1e-4)


def test_standardised_features_have_no_mean_and_unit_variance() -> None:
    normaliser, features = Standardiser(8), correlated(8)
    normaliser.update(features)
    found = points(normaliser(features))
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(found.var(0), 1, rtol=1e-3)


def test_constant_channel_stays_finite() -> None:
    normaliser = Standardiser(2)
    for _ in range(3):
        normaliser.update(torch.full((1, 2, 2, 2), 4.0))
    assert not normaliser(torch.full((1, 2, 2, 2), 4.0)).any()


def test_equal_workers_find_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of channels whose mean is large beside their deviation, where the difference of squares would be noise."""
    features = 40 + 1e-3 * torch.randn(2, 256, 4, 4, generator=torch.Generator().manual_seed(0))
    alone, together = Standardiser(256), Standardiser(256)
    alone.update(features)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value.mul_(2))
    together.update(features)
    assert (together.var >= 0).all()
    torch.testing.assert_close(together.var, alone.var, rtol=1e-5, atol=0)
    torch.testing.assert_close(together.mean, alone.mean)


def test_phi_s_gives_all_channels_one_variance() -> None:
    normaliser, features = PHIStandardiser(8), correlated(8)
    for _ in range(40):
        normaliser.update(features)
    covariance = np.cov(points(normaliser(features)), rowvar=False, bias=True)
    np.testing.assert_allclose(np.diag(covariance), 1, rtol=1e-3)
    np.testing.assert_allclose(points(normaliser(features)).mean(0), 0, atol=1e-4)


def test_phi_s_is_a_rotation_up_to_one_scale() -> None:
    normaliser, features = PHIStandardiser(8), correlated(8)
    normaliser.update(features)
    gram = normaliser.rotation.double() @ normaliser.rotation.double().T
    scale = 1 / np.cov(points(features), rowvar=False, bias=True).diagonal().mean()
    torch.testing.assert_close(gram, scale * torch.eye(8).double(), rtol=1e-3, atol=1e-3 * scale)


def test_phi_s_settles() -> None:
    normaliser = PHIStandardiser(4, last_update=4)
    for seed in range(4):
        normaliser.update(correlated(4, seed=seed))
    settled = {name: value.clone() for name, value in normaliser.state_dict().items()}
    normaliser.update(correlated(4, seed=9))
    torch.testing.assert_close(normaliser.state_dict(), settled, rtol=0, atol=0)


def test_phi_s_in_half_precision() -> None:
    """A sum over so many positions is beyond the largest number of float16."""
    features = 2 * torch.randn(8, 16, 50, 50, generator=torch.Generator().manual_seed(0))
    wanted, found = PHIStandardiser(16), PHIStandardiser(16)
    wanted.update(features)
    with torch.autocast("cpu", torch.float16):
        found.update(features)
    assert found.rotation.isfinite().all()
    torch.testing.assert_close(found.cov, wanted.cov, rtol=1e-5, atol=1e-5)


def test_phi_s_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of 2"):
        PHIStandardiser(6)


def test_l2_norm_is_the_root_of_the_channels() -> None:
    norms = L2Normaliser()(correlated(9)).norm(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 3.0))
