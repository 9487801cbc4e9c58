"""Scores of sets of pictures: closed forms, other people's formulas, streams, and what is refused."""

import numpy as np
import pytest
import scipy.linalg
import torch

from cogview.errors import ConfigError, SchemaError
from cogview.evaluation.feature_rows import FeatureRows
from cogview.evaluation.frechet import Moments, frechet_distance, frechet_estimate, moments_of
from cogview.evaluation.inception_score import inception_score
from cogview.evaluation.intervals import mean_estimate, resample_counts, spread_estimate
from cogview.evaluation.kernel_distance import kernel_distance, squared_discrepancy
from cogview.evaluation.precision_recall import precision_and_recall


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sets():
    """Two sets of correlated features, of different sizes, means and scales."""
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(24, 24))
    first = (generator.normal(size=(300, 24)) @ mixing).astype(np.float32)
    second = ((generator.normal(size=(260, 24)) + 0.2) @ mixing * 1.1).astype(np.float32)
    return first, second


def rows(features):
    return FeatureRows([features])


def textbook_distance(first, second):
    """The formula as it stands in the literature, with scipy's root of the product."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = scipy.linalg.sqrtm(one @ other).real
    means = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return means + np.trace(one) + np.trace(other) - 2 * np.trace(root)


def test_the_distance_is_that_of_the_textbook(sets):
    distance = frechet_distance(*(moments_of(rows(features)) for features in sets))
    assert distance == pytest.approx(textbook_distance(*sets), rel=1e-9)


def test_the_distance_is_that_of_torchmetrics(sets):
    fid = pytest.importorskip("torchmetrics.image.fid", reason="torchmetrics is not installed")
    first, second = (moments_of(rows(features)) for features in sets)
    theirs = fid._compute_fid(first.mean_D, first.covariance_DD, second.mean_D, second.covariance_DD)
    assert frechet_distance(first, second) == pytest.approx(float(theirs), rel=1e-3)


def test_the_distance_of_gaussians_with_one_axis_has_a_closed_form():
    first = Moments(count=10, mean_D=torch.tensor([1.0]).double(), scatter_DD=torch.tensor([[9 * 4.0]]).double())
    second = Moments(count=10, mean_D=torch.tensor([3.0]).double(), scatter_DD=torch.tensor([[9 * 25.0]]).double())
    assert frechet_distance(first, second) == pytest.approx((1 - 3) ** 2 + (2 - 5) ** 2)


@pytest.mark.parametrize("number", [300, 20])
def test_equal_sets_are_at_distance_zero_also_without_full_rank(sets, number):
    moments = moments_of(rows(sets[0][:number]))
    assert frechet_distance(moments, moments) <= 1e-9


def test_streamed_moments_are_those_of_one_pass(sets, tmp_path):
    features = sets[0] + 1000  # far from 0, where naive sums lose digits
    paths = []
    for number, part in enumerate(np.array_split(features, 7)):
        paths.append(tmp_path / f"{number}.npy")
        np.save(paths[-1], part)
    streamed = moments_of(FeatureRows(paths))
    assert streamed.count == len(features)
    assert np.allclose(streamed.mean_D, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    assert np.allclose(streamed.covariance_DD, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-9)


def test_weights_count_rows_as_often_as_they_say(sets):
    counts = resample_counts(len(sets[0]), resamples=1, seed=3)[0]
    weighted = moments_of(rows(sets[0]), weights_N=counts)
    repeated = moments_of(rows(np.repeat(sets[0], counts, axis=0)))
    assert torch.allclose(weighted.covariance_DD, repeated.covariance_DD)
    assert torch.allclose(weighted.mean_D, repeated.mean_D)


def test_the_interval_of_a_distance_covers_that_of_the_sources():
    """Two Gaussians of four axes, each shifted by 1: their distance is 4."""
    generator = np.random.default_rng(1)
    estimates = []
    for seed in range(15):
        first, second = (generator.normal(mean, 1, size=(200, 4)).astype("f4") for mean in (0, 1))
        estimates.append(frechet_estimate(rows(first), rows(second), seed=seed, resamples=20))
    assert sum(estimate.low <= 4 <= estimate.high for estimate in estimates) >= 11
    assert all(0 < estimate.high - estimate.low < 4 for estimate in estimates)
    assert {estimate.n for estimate in estimates} == {200}


def test_a_distance_of_one_picture_is_refused():
    with pytest.raises(ValueError, match="no covariance"):
        frechet_distance(moments_of(rows(np.ones((1, 3), "f4"))), moments_of(rows(np.ones((4, 3), "f4"))))


def test_the_inception_score_is_that_of_its_formula():
    logits = np.random.default_rng(0).normal(size=(120, 9)).astype(np.float32) * 2
    probabilities = torch.from_numpy(logits).double().softmax(dim=1).numpy()
    divergence = (probabilities * np.log(probabilities / probabilities.mean(axis=0))).sum(axis=1).mean()
    estimate = inception_score(rows(logits), seed=0, splits=1)
    assert estimate.value == pytest.approx(np.exp(divergence), rel=1e-12)
    assert estimate.low < estimate.value < estimate.high


def test_the_inception_score_is_that_of_torchmetrics():
    inception = pytest.importorskip("torchmetrics.image.inception", reason="torchmetrics is not installed")
    logits = np.random.default_rng(0).normal(size=(120, 9)).astype(np.float32) * 2
    metric = inception.InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.features.append(torch.from_numpy(logits))
    assert inception_score(rows(logits), seed=0, splits=1).value == pytest.approx(float(metric.compute()[0]), rel=1e-3)


def test_certain_and_even_classes_score_their_number_and_equal_ones_score_one():
    certain = (np.eye(5, dtype=np.float32) * 100)[np.arange(100) % 5]
    assert inception_score(rows(certain), seed=0, splits=1).value == pytest.approx(5)
    assert inception_score(rows(np.tile(certain[:1], (50, 1))), seed=0).value == pytest.approx(1)


def test_an_inception_score_of_fewer_pictures_than_parts_is_refused():
    with pytest.raises(ConfigError, match="10 or more"):
        inception_score(rows(np.ones((9, 3), "f4")), seed=0)


def test_the_discrepancy_is_the_mean_over_different_pairs():
    generator = np.random.default_rng(2)
    first, second = generator.normal(size=(2, 12, 5)).astype(np.float32)

    def kernel(one, other):
        return (float(one.astype(float) @ other.astype(float)) / 5 + 1) ** 3

    def within(side):
        return np.mean([kernel(side[i], side[j]) for i in range(12) for j in range(12) if i != j])

    across = np.mean([kernel(one, other) for one in first for other in second])
    assert squared_discrepancy(first, second) == pytest.approx(within(first) + within(second) - 2 * across)


def test_the_kernel_distance_of_one_source_is_about_zero_and_grows_with_a_shift():
    generator = np.random.default_rng(3)
    some, others = generator.normal(size=(2, 400, 6)).astype(np.float32)
    near = kernel_distance(rows(some), rows(others), seed=0, subsets=20, subset_size=100)
    far = kernel_distance(rows(some + 0.5), rows(others), seed=0, subsets=20, subset_size=100)
    assert near.low <= 0 <= near.high
    assert far.low > near.high
    assert (near.n, far.n) == (400, 400)
    with pytest.raises(ConfigError, match="20 or more"):
        kernel_distance(rows(some[:19]), rows(others), seed=0)


def test_precision_and_recall_tell_a_part_from_the_whole():
    generator = np.random.default_rng(4)
    whole = generator.uniform(size=(400, 2)).astype(np.float32)
    part = whole[whole[:, 0] < 0.5] + np.float32(1e-4)
    precision, recall = precision_and_recall(rows(part), rows(whole), seed=0)
    assert precision.value > 0.98
    assert 0.4 < recall.value < 0.62
    assert recall.low < recall.value < recall.high
    elsewhere, _ = precision_and_recall(rows(whole + 5), rows(whole), seed=0)
    assert elsewhere.value == 0


def test_precision_and_recall_are_those_of_all_distances_at_once(sets):
    first, second = (torch.from_numpy(features).double() for features in sets)

    def inside(points, manifold):
        radii = torch.cdist(manifold, manifold).kthvalue(4).values
        return float((torch.cdist(points, manifold) <= radii).any(dim=1).double().mean())

    found = precision_and_recall(FeatureRows(np.array_split(sets[0], 3)), rows(sets[1]), seed=0)
    assert [estimate.value for estimate in found] == [inside(first, second), inside(second, first)]
    with pytest.raises(ConfigError, match="give more pictures"):
        precision_and_recall(rows(sets[0][:3]), rows(sets[1]), seed=0)


def test_the_interval_of_a_mean_covers_the_mean_that_it_was_drawn_from():
    generator = np.random.default_rng(5)
    estimates = [mean_estimate(generator.normal(2, 1, size=80), seed=0, resamples=300) for _ in range(40)]
    assert sum(estimate.low <= 2 <= estimate.high for estimate in estimates) >= 34
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([], seed=0)


def test_the_spread_of_resamples_lies_around_the_score_however_they_are_shifted():
    estimate = spread_estimate(1.0, [4.0, 5.0, 6.0], n=7, least=0.0)
    assert (estimate.low, estimate.value, estimate.n) == (0.0, 1.0, 7)
    assert estimate.high == pytest.approx(1 + 1.959964)


def test_rows_are_taken_by_number_over_files(tmp_path):
    features = np.arange(40, dtype=np.float32).reshape(20, 2)
    np.save(tmp_path / "first.npy", features[:12])
    table = FeatureRows([tmp_path / "first.npy", features[12:]])
    numbers = np.array([19, 0, 12, 11, 0])
    assert np.array_equal(table.take(numbers), features[numbers])
    assert [len(batch) for batch in table.batches(size=5)] == [5, 5, 5, 5]
    assert np.array_equal(np.concatenate(list(table.batches(size=7))), features)


def test_features_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(SchemaError, match="2 and 3 numbers"):
        FeatureRows([np.ones((2, 2), "f4"), np.ones((2, 3), "f4")])
    with pytest.raises(SchemaError, match="no features"):
        FeatureRows([np.ones((0, 2), "f4")])
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(SchemaError, match="delete it"):
        FeatureRows([tmp_path / "cut.npy"])
    with pytest.raises(SchemaError, match="float64"):
        FeatureRows([np.ones((2, 2))])
