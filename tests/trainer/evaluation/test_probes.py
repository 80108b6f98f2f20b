"""The linear probe against scikit-learn, k nearest neighbours against plain numpy."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from kpu.errors import MismatchError
from trainer.evaluation import probes
from trainer.evaluation.probes import knn, linear_probe

Split = tuple[Tensor, Tensor]


def make_problem(rows: int, channels: int = 12, classes: int = 4, noise: float = 1.0) -> list[Split]:
    """Train, validation and test rows of overlapping classes, in correlated channels of unlike scale and offset."""
    rng = np.random.default_rng(0)
    means, mixing = rng.normal(size=(classes, channels)), rng.normal(size=(channels, channels))
    parts = []
    for count in (rows, 300, 2000):
        y = rng.integers(0, classes, count)
        x = (means[y] + noise * rng.normal(size=(count, channels))) @ mixing * np.logspace(-2, 2, channels) + 30
        parts.append((torch.from_numpy(x).float(), torch.from_numpy(3 * y - 1)))
    return parts


def peer(train: Split, penalty: float) -> tuple[StandardScaler, LogisticRegression]:
    scaler = StandardScaler().fit(train[0].double().numpy())
    model = LogisticRegression(C=1 / (penalty * len(train[1])), tol=1e-8, max_iter=5000)
    return scaler, model.fit(scaler.transform(train[0].double().numpy()), train[1].numpy())


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_weights_and_predictions_are_scikit_learns(penalty: float) -> None:
    train, _, test = make_problem(500)
    scaler, model = peer(train, penalty)
    space = probes._Space(train[0])
    x = space(train[0])
    codes = torch.unique(train[1], return_inverse=True)[1]
    weights = probes._fit(x, codes, x.new_zeros(4, 13), penalty, space.variance).double()
    coefficients = weights[:, :-1] @ space._axes.T
    np.testing.assert_allclose(coefficients.numpy(), model.coef_, atol=2e-3 * np.abs(model.coef_).max())
    found = linear_probe(*train, *test, *test, penalties=[penalty])
    assert found.penalty == penalty
    assert found.accuracy == pytest.approx(model.score(scaler.transform(test[0].numpy()), test[1].numpy()), abs=2e-3)


def test_penalty_is_chosen_on_validation_rows() -> None:
    """Few rows and much noise: the best penalty is neither the strongest nor the weakest."""
    train, validation, test = make_problem(40, noise=3.0)
    penalties = [1e-3, 1e-1, 1e2]
    scores = []
    for penalty in penalties:
        scaler, model = peer(train, penalty)
        scores.append(model.score(scaler.transform(validation[0].numpy()), validation[1].numpy()))
    assert np.argmax(scores) == 1
    result = linear_probe(*train, *validation, *test, penalties=penalties)
    assert result.penalty == 1e-1
    assert result.accuracy == linear_probe(*train, *train, *test, penalties=[1e-1]).accuracy


def test_the_largest_of_equal_penalties_wins() -> None:
    x = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    y = torch.tensor([0, 1]).repeat(20)
    assert linear_probe(x, y, x, y, x, y, penalties=[1e-3, 1e-1, 1e-2]) == (1.0, 1e-1)


def test_chunks_constant_channels_and_unseen_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation, test = make_problem(200)
    whole = linear_probe(*train, *validation, *test, penalties=[1e-2])
    parts = [(torch.cat([x, torch.full((len(x), 1), 0.1)], dim=1), y) for x, y in (train, validation, test)]
    monkeypatch.setattr(probes, "_CHUNK", 256)
    assert linear_probe(*parts[0], *parts[1], *parts[2], penalties=[1e-2]) == pytest.approx(whole, abs=1e-3)
    strange = (test[0], torch.full_like(test[1], 999))
    assert linear_probe(*train, *validation, *strange, penalties=[1.0]).accuracy == 0


def votes_of(train: Split, test: Split, k: int, temperature: float) -> float:
    """The neighbours of each test row, row by row in float64."""
    x, y = train[0].double().numpy(), train[1].numpy()
    centre = x.mean(0)
    x = x - centre
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    right = 0
    for query, label in zip(test[0].double().numpy() - centre, test[1].numpy(), strict=True):
        cosines = x @ query / np.linalg.norm(query)
        nearest = np.argsort(-cosines)[:k]
        votes = {c: np.exp(cosines[nearest][y[nearest] == c] / temperature).sum() for c in np.unique(y)}
        right += max(votes, key=votes.__getitem__) == label
    return right / len(test[1])


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (20, 10.0), (1000, 0.07)])
def test_knn_is_the_plain_vote(k: int, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with more neighbours asked for than there are, and test rows in many chunks."""
    train, _, test = make_problem(150)
    expected = votes_of(train, test, k, temperature)
    assert knn(*train, *test, k=k, temperature=temperature) == pytest.approx(expected, abs=1e-3)
    monkeypatch.setattr(probes, "_CHUNK", 7 * 150)
    assert knn(*train, *test, k=k, temperature=temperature) == pytest.approx(expected, abs=1e-3)


def test_knn_by_hand() -> None:
    """About the centre (10, 10), one near neighbour outvotes two far ones only where the temperature is low."""
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.2, 1.0], [-1.2, -2.0]]) + 10
    y = torch.tensor([5, 8, 8, 2])
    query, label = torch.tensor([[10.8, 10.6]]), torch.tensor([5])
    assert knn(x, y, query, label, k=3, temperature=0.01) == 1
    assert knn(x, y, query, label, k=3, temperature=10.0) == 0
    assert knn(x, y, query, label, k=3, temperature=1e-6) == 1


def test_refuses_what_does_not_fit() -> None:
    train, validation, test = make_problem(50)
    broken = (test[0].index_fill(0, torch.tensor([3]), torch.nan), test[1])
    with pytest.raises(MismatchError, match=r"test rows.*finite"):
        linear_probe(*train, *validation, *broken)
    with pytest.raises(MismatchError, match=r"train rows.*label"):
        knn(train[0], train[1][:-1], *test)
    with pytest.raises(ValueError, match="penalties"):
        linear_probe(*train, *validation, *test, penalties=[0.0, 1.0])
