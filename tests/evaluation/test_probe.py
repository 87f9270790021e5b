"""Probes on separable and on meaningless features, and the extraction of features on generated images."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.data import detection_utils as utils
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_resnet_backbone
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from xlearner_d2.evaluation import probe

MEAN, STD = (103.0, 116.0, 123.0), (57.0, 57.0, 57.0)


def _blobs(num_images, num_classes=3, spread=0.3, seed=0):
    generator = np.random.default_rng(seed)
    y = np.arange(num_images) % num_classes
    x = 5.0 * np.eye(num_classes, 8)[y] + spread * generator.normal(size=(num_images, 8))
    return x.astype(np.float32), y


@pytest.fixture(scope="module")
def backbone():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4", "res5"]
    torch.manual_seed(0)
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


@pytest.fixture
def records(tmp_path):
    """Pictures of a red or a blue disc's surroundings in several sizes, one of them grey and one with a palette."""
    generator = np.random.default_rng(0)
    records = []
    for number, (width, height) in enumerate([(40, 32), (32, 32), (20, 50), (70, 35), (33, 47), (64, 64)]):
        image = generator.integers(0, 80, (height, width, 3)).astype(np.uint8)
        image[..., 2 * (number % 2)] += 150
        picture = Image.fromarray(image)
        if number >= 4:
            picture = picture.convert("L" if number == 4 else "P")
        picture.save(tmp_path / f"{number}.png")
        records.append({"file_name": str(tmp_path / f"{number}.png"), "image_id": number, "category_id": number % 2})
    return records


def _extract(backbone, records, **kwargs):
    kwargs = {"image_size": 32, "pixel_mean": MEAN, "pixel_std": STD, "num_workers": 0, **kwargs}
    return probe.extract_features(backbone, records, **kwargs)


def test_features_equal_a_direct_forward_pass(backbone, records):
    x, y = _extract(backbone, records, batch_size=4)
    assert x.shape == (6, 512)
    assert x.dtype == np.float32
    assert y.tolist() == [0, 1, 0, 1, 0, 1]
    assert y.dtype == np.int64
    # The second picture needs neither resizing nor cropping.
    image = torch.as_tensor(
        utils.read_image(records[1]["file_name"], format="BGR").astype("float32").transpose(2, 0, 1)
    )
    backbone.eval()
    with torch.no_grad():
        expected = backbone(((image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None])
    np.testing.assert_allclose(x[1], expected["res5"].mean(dim=(2, 3))[0].numpy(), rtol=1e-4, atol=1e-5)


def test_crop_is_the_centre(tmp_path):
    image = np.zeros((16, 48, 3), dtype=np.uint8)
    image[:, 16:32] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    crops = probe._CentreCrops(
        [{"file_name": str(tmp_path / "a.png"), "category_id": 0}], image_size=16, input_format="RGB"
    )
    assert (crops[0][0] == 255).all()


def test_options_do_not_change_features(backbone, records):
    expected, _ = _extract(backbone, records)
    for options in ({"batch_size": 1}, {"channels_last": False}, {"num_workers": 2, "progress": True}):
        np.testing.assert_allclose(_extract(backbone, records, **options)[0], expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(_extract(backbone, records, autocast_dtype=torch.bfloat16)[0], expected, atol=0.05)
    reversed_order = {"input_format": "RGB", "pixel_mean": MEAN[::-1], "pixel_std": STD[::-1]}
    assert not np.allclose(_extract(backbone, records, **reversed_order)[0], expected, atol=1e-3)


def test_another_feature(backbone, records):
    assert _extract(backbone, records, feature="res4")[0].shape == (6, 256)


def test_backbone_is_left_as_it_was(backbone, records):
    backbone.train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    _extract(backbone, records)
    assert backbone.training
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_unknown_feature(backbone, records):
    with pytest.raises(ValueError, match="no feature 'p5', only res4, res5"):
        _extract(backbone, records, feature="p5")


def test_no_records(backbone):
    with pytest.raises(ValueError, match="no images"):
        _extract(backbone, [])


def test_separable_features_are_perfect():
    result = probe.linear_probe(_blobs(60), _blobs(30, seed=1), seed=0)
    assert result.accuracy == result.mean_class_acc == result.held_out_accuracy == 100
    assert (result.num_train, result.num_test, result.converged) == (60, 30, True)
    assert probe.knn_probe(_blobs(60), _blobs(30, seed=1)) == 100


def test_agrees_with_plain_sklearn():
    train, test = _blobs(90, spread=4.0), _blobs(61, spread=4.0, seed=1)
    result = probe.linear_probe(train, test, seed=0, cs=[0.1])
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    model = LogisticRegression(C=0.1, max_iter=1000).fit((train[0] - mean) / std, train[1])
    predicted = model.predict((test[0] - mean) / std)
    assert result.accuracy == pytest.approx(100 * np.mean(predicted == test[1]))
    assert result.mean_class_acc == pytest.approx(100 * balanced_accuracy_score(test[1], predicted))
    assert result.c == 0.1
    assert np.isnan(result.held_out_accuracy)
    assert 0 < result.accuracy < 100


def test_test_labels_do_not_choose():
    train, (x, y) = _blobs(90, spread=4.0), _blobs(60, spread=4.0, seed=1)
    shuffled = np.random.default_rng(0).permutation(y)
    first, second = (probe.linear_probe(train, (x, labels), seed=3) for labels in (y, shuffled))
    assert (first.c, first.held_out_accuracy) == (second.c, second.held_out_accuracy)
    assert first == probe.linear_probe(train, (x, y), seed=3)


def test_hold_out_is_stratified():
    y = np.repeat([0, 1, 2, 3], [50, 10, 2, 1])
    mask = probe._hold_out(y, seed=0)
    assert np.bincount(y[mask], minlength=4).tolist() == [10, 2, 1, 0]


@pytest.mark.filterwarnings("error")
def test_unseen_class_is_wrong_and_limit_is_reported(caplog):
    (x, y), test = _blobs(60, num_classes=3), _blobs(30, num_classes=3, seed=1)
    result = probe.linear_probe((x[y < 2], y[y < 2]), test, seed=0, max_iter=1)
    assert result.accuracy == pytest.approx(result.mean_class_acc)
    assert result.accuracy <= 100 * 2 / 3 + 1e-6
    assert not result.converged
    assert "before it converged" in caplog.text


def test_probe_of_registered_data(backbone, records):
    DatasetCatalog.register("test_probe", lambda: records)
    try:
        result = probe.probe_backbone(
            backbone, "test_probe", "test_probe", seed=0, image_size=32, pixel_mean=MEAN, pixel_std=STD, num_workers=0
        )
    finally:
        DatasetCatalog.remove("test_probe")
    assert result.num_train == result.num_test == 6


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        (_blobs(9), (np.zeros((3, 5)), np.arange(3)), {}, "8 channels, test features 5"),
        (_blobs(9), (np.zeros((3, 8)), np.arange(2)), {}, r"test features have shape \(3, 8\) for 2 labels"),
        ((np.full((4, 8), np.nan), np.arange(4)), _blobs(9), {}, "training features hold NaN"),
        ((np.zeros((4, 8)), np.zeros(4, dtype=int)), _blobs(9), {}, "show a single class"),
        (_blobs(3), _blobs(9), {}, "single training image, so C cannot be chosen"),
        (_blobs(9), _blobs(9), {"cs": []}, "at least one positive number"),
        (_blobs(9), _blobs(9), {"cs": [0.0]}, "at least one positive number"),
    ],
)
def test_unusable_features(train, test, options, message):
    with pytest.raises(ValueError, match=message):
        probe.linear_probe(train, test, seed=0, **options)
