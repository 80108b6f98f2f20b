"""Fidelity against cases worked by hand."""

import math

import numpy as np

from kpu.format.commits import Fidelity
from kpu.format.fidelity import RowFidelity, measure, summarise
from kpu.format.statistics import Statistics


def make_statistics(centre: list[float], std: list[float]) -> Statistics:
    variance = np.square(std)
    return Statistics(10, np.array(centre), np.array(centre), variance, np.diag(variance))


def test_errors_are_in_channel_standard_deviations() -> None:
    features = np.array([[10.0, 1.0], [30.0, 3.0]], np.float32)
    decoded = np.array([[12.0, 1.0], [30.0, 3.5]], np.float32)
    rows = measure(features, decoded, np.zeros((2, 2), bool), make_statistics([0, 0], [10, 0.5]))
    np.testing.assert_allclose(rows.squared_error, [0.2**2 / 2, 1**2 / 2], rtol=1e-6)


def test_cosine_is_of_standardised_vectors_and_averaged_over_tokens() -> None:
    # One row, two tokens; standardised: (1, 0) against (1, 1), and (0, 2) against (0, 1).
    features = np.array([[[15.0, 1.0], [5.0, 5.0]]], np.float32)
    decoded = np.array([[[15.0, 3.0], [5.0, 3.0]]], np.float32)
    rows = measure(features, decoded, np.zeros((1, 2, 2), bool), make_statistics([5, 1], [10, 2]))
    np.testing.assert_allclose(rows.cosine, [(math.sqrt(0.5) + 1) / 2], rtol=1e-12)


def test_cosine_of_zero_vectors() -> None:
    features = np.array([[1.0, 1.0], [1.0, 1.0], [2.0, 1.0]], np.float32)
    decoded = np.array([[1.0, 1.0], [2.0, 1.0], [1.0, 1.0]], np.float32)
    rows = measure(features, decoded, np.zeros((3, 2), bool), make_statistics([1, 1], [1, 1]))
    assert rows.cosine.tolist() == [1.0, 0.0, 0.0]


def test_saturated_values_are_counted_per_row() -> None:
    mask = np.zeros((3, 4, 2), bool)
    mask[0, 0, 0] = mask[2, 1, 1] = mask[2, 3, 0] = True
    zeros = np.zeros((3, 4, 2), np.float32)
    assert measure(zeros, zeros, mask, make_statistics([0, 0], [1, 1])).saturated.tolist() == [1, 0, 2]


def test_rows_with_nan_do_not_disturb_others() -> None:
    features = np.array([[np.nan, 1.0], [np.inf, 1.0], [2.0, 1.0]], np.float32)
    rows = measure(features, features, np.zeros((3, 2), bool), make_statistics([0, 0], [1, 1]))
    assert rows.squared_error[2] == 0
    assert np.isnan(rows.squared_error[:2]).all()
    summary = summarise(rows, np.array([False, False, True]), 0)
    assert summary == Fidelity(rmse=0, cosine=1, worst_row=2, worst_rmse=0, saturated=0)


def test_a_unit_is_summed_up_over_its_valid_rows() -> None:
    rows = RowFidelity(np.array([0.01, 0.09, 4.0, 0.04]), np.array([1.0, 0.9, -1.0, 0.8]), np.array([1, 2, 100, 0]))
    valid = np.array([True, True, False, True])
    assert summarise(rows, valid, first_row=640) == Fidelity(
        rmse=0.216025, cosine=0.9, worst_row=641, worst_rmse=0.3, saturated=3
    )
    assert summarise(rows, np.zeros(4, bool), 0) is None
