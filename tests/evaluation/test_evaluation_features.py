"""FID, Inception Score, precision and recall, against scipy and cases worked by hand; their networks."""

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import linalg, spatial, special, stats

from dnd_hf.evaluation.features import (
    GaussianStatistics,
    InceptionFeatures,
    KnownStatistics,
    ModelFeatures,
    frechet_distance,
    inception_score,
    precision_recall,
)


def statistics_of(features: np.ndarray, batch_size: int = 7) -> GaussianStatistics:
    statistics = GaussianStatistics()
    for start in range(0, len(features), batch_size):
        statistics.update(torch.from_numpy(features[start : start + batch_size]))
    return statistics


def scipy_distance(a: np.ndarray, b: np.ndarray) -> float:
    first, second = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(first @ second).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)


@pytest.mark.parametrize("dim", [2, 5, 12])
def test_frechet_distance_is_that_of_scipys_matrix_root(dim):
    rng = np.random.default_rng(dim)
    a = rng.normal(size=(40, dim)) @ rng.normal(size=(dim, dim)) + 3
    b = rng.normal(size=(50, dim)) @ rng.normal(size=(dim, dim))
    assert frechet_distance(statistics_of(a), statistics_of(b)) == pytest.approx(scipy_distance(a, b), rel=1e-8)


def test_frechet_distance_of_known_gaussians():
    # (3 - 0)^2 + (2 - 1)^2 for normal(3, sd 2) and normal(0, sd 1), and as much in a second, independent dimension
    a = KnownStatistics(torch.full((2,), 3.0).double(), 4 * torch.eye(2).double())
    b = KnownStatistics(torch.zeros(2).double(), torch.eye(2).double())
    assert frechet_distance(a, b) == pytest.approx(2 * 10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_of_singular_covariances_is_finite_and_symmetric():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 12)), rng.normal(size=(6, 12)) + 1  # fewer images than dimensions
    forth, back = (frechet_distance(statistics_of(x), statistics_of(y)) for x, y in ((a, b), (b, a)))
    assert forth == pytest.approx(back, rel=1e-6) and forth > 0
    assert frechet_distance(statistics_of(a), statistics_of(a)) == pytest.approx(0, abs=1e-6)


def test_statistics_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        frechet_distance(statistics_of(np.zeros((4, 3))), statistics_of(np.zeros((4, 2))))
    with pytest.raises(ValueError, match="at least two images"):
        frechet_distance(statistics_of(np.zeros((1, 3))), statistics_of(np.zeros((4, 3))))


def test_inception_score_is_the_number_of_classes_that_are_sure_and_one_without_any():
    sure = 100 * torch.eye(5).repeat(4, 1)
    assert inception_score(sure, splits=4) == pytest.approx((5, 0), abs=1e-6)
    assert inception_score(torch.zeros(20, 5), splits=2) == pytest.approx((1, 0), abs=1e-9)
    halves = torch.cat([sure[:10], torch.zeros(10, 5)])  # parts of score 5 and 1
    assert inception_score(halves, splits=2) == pytest.approx((3, 2), abs=1e-6)


def test_inception_score_is_that_of_scipys_relative_entropies():
    logits = np.random.default_rng(0).normal(0, 3, (31, 6))
    scores = []
    for part in np.array_split(special.softmax(logits, axis=1), 3):
        scores.append(np.exp(np.mean([stats.entropy(row, part.mean(0)) for row in part])))
    assert inception_score(torch.from_numpy(logits), 3) == pytest.approx((np.mean(scores), np.std(scores)))
    with pytest.raises(ValueError, match="as many images, got 9"):
        inception_score(torch.zeros(9, 2))


def test_precision_and_recall_of_points_on_a_line():
    # Radii with one neighbour: 1, 1, 2 of the real ones and 1, 1, 7 of the generated ones.
    real, generated = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[4.5], [5.5], [12.5]])
    # 4.5 alone is within 2 of 3; of the real ones none is within 1 of 4.5 or 5.5, or within 7 of 12.5.
    assert precision_recall(real, generated, neighbours=1) == pytest.approx((1 / 3, 0))
    assert precision_recall(generated, real, neighbours=1) == pytest.approx((0, 1 / 3))
    assert precision_recall(real, real, neighbours=1) == (1, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_precision_and_recall_are_those_of_scipys_trees(seed):
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(1100, 4)), rng.normal(0.7, 1.2, (300, 4))

    def share(points, others):
        radii = spatial.cKDTree(others).query(others, k=4)[0][:, 3]
        return (spatial.distance.cdist(points, others) <= radii).any(1).mean()

    found = precision_recall(torch.from_numpy(real), torch.from_numpy(generated))
    assert found == pytest.approx((share(generated, real), share(real, generated)))
    assert min(found) > 0.2 and max(found) < 0.99


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 images, got 10 real and 3"):
        precision_recall(torch.zeros(10, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("kind", ["pooled", "last hidden states"])
def test_features_of_a_model_of_transformers_are_those_of_the_model(tmp_path, kind):
    from PIL import Image
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor, ViTMAEConfig, ViTMAEModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    if kind == "pooled":
        model = Dinov2Model(Dinov2Config(**sizes, image_size=8, patch_size=4))
    else:
        model = ViTMAEModel(ViTMAEConfig(**sizes, image_size=8, patch_size=4, mask_ratio=0.0))
    model.eval().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    images = torch.randint(256, (3, 3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features, logits = ModelFeatures(str(tmp_path))(images)
    assert features.shape == (3, 8) and logits is None
    processor = ViTImageProcessor.from_pretrained(tmp_path)
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        output = model(processor(images, return_tensors="pt").pixel_values)
    expected = output.pooler_output if kind == "pooled" else output.last_hidden_state.mean(1)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_a_feature_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match="no image model that transformers can load"):
        ModelFeatures(str(tmp_path))


def test_inception_is_that_of_torch_fidelity_with_the_weights_asked_for(monkeypatch):
    asked = {}

    class Network(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path):
            super().__init__()
            asked.update(features=features_list, weights=feature_extractor_weights_path)

        def forward(self, images):
            return images[:, 0, 0, :2].float(), images[:, 1, 0, :1].float()

    package = ModuleType("torch_fidelity")
    package.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    images = torch.arange(24, dtype=torch.uint8).view(1, 3, 2, 4)
    features, logits = InceptionFeatures("file.pth")(images)
    assert asked == {"features": ["2048", "logits_unbiased"], "weights": "file.pth"}
    assert features.tolist() == [[0, 1]] and logits.tolist() == [[8]]


def test_without_torch_fidelity_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ImportError, match=r"\.\[fid\].*`feature_model`"):
        InceptionFeatures()
