"""The synthetic tasks and the metrics, against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from sa_hf import SparseAttentionError
from sa_hf.tasks.metrics import accuracy, perplexity, quantile_loss
from sa_hf.tasks.synthetic import CorridorTask, MaskedSummationTask, SeriesTask


def test_corridor_asks_for_the_first_token_at_the_end() -> None:
    rows = CorridorTask(length=9, colours=3).rows(60)
    for row in rows:
        ids = row["input_ids"]
        assert ids[0] in (3, 4, 5)
        assert ids[1:7] == [1] * 6
        assert ids[7:] == [2, ids[0]]
        assert row["labels"] == [-100] * 8 + [ids[0]]
    assert {r["input_ids"][0] for r in rows} == {3, 4, 5}


def test_summation_is_the_sum_of_the_marked_digits() -> None:
    task = MaskedSummationTask(length=7, marked=3, base=4)
    totals = set()
    for row in task.rows(300):
        ids = row["input_ids"]
        assert ids[0] == 1
        marked = [i - 6 for i in ids[1:] if i >= 6]
        assert len(marked) == 3
        assert row["labels"] == sum(marked)
        assert max(ids) < task.vocab_size
        totals.add(row["labels"])
    assert totals <= set(range(task.num_labels))
    assert len(totals) > 5


def test_series_repeat_weekly_where_there_is_no_noise() -> None:
    task = SeriesTask(context=200, horizon=20, period=8, noise=0.0)
    values, covariates = task.series(3, seed=1)
    assert values.shape == (3, 220)
    assert covariates.shape == (3, 220, 4)
    torch.testing.assert_close(values[:, 56:], values[:, :-56], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(values[:, 8:], values[:, :-8], atol=0.05)
    torch.testing.assert_close(covariates[..., 0] ** 2 + covariates[..., 1] ** 2, torch.ones(3, 220))
    assert torch.equal(values, task.series(3, seed=1)[0])


@pytest.mark.parametrize(
    "make", [lambda: CorridorTask(length=3), lambda: MaskedSummationTask(marked=0), lambda: SeriesTask(horizon=0)]
)
def test_impossible_sizes_name_the_nearest(make) -> None:
    with pytest.raises(SparseAttentionError, match="nearest"):
        make()


def test_quantile_loss_by_hand() -> None:
    target, predicted = torch.tensor([2.0, -4.0, 1.0]), torch.tensor([1.0, -3.0, 1.0])
    # under by 1, over by 1, exact; sum of |y| is 7
    assert quantile_loss(predicted, target, 0.9) == pytest.approx(2 * (0.9 * 1 + 0.1 * 1) / 7)
    assert quantile_loss(predicted + 2, target, 0.9) == pytest.approx(2 * (0.1 * 1 + 0.1 * 3 + 0.1 * 2) / 7)
    # the median's loss is the absolute error
    assert quantile_loss(predicted, target, 0.5) == pytest.approx(2 / 7)


def test_the_true_quantile_has_the_least_loss() -> None:
    target = torch.linspace(0, 1, 1001)
    losses = {q: quantile_loss(torch.full_like(target, q), target, 0.9) for q in (0.5, 0.8, 0.9, 1.0)}
    assert min(losses, key=losses.__getitem__) == 0.9


def test_quantile_loss_refuses_what_it_cannot_say() -> None:
    with pytest.raises(SparseAttentionError, match="shape"):
        quantile_loss(torch.zeros(2), torch.ones(3), 0.5)
    with pytest.raises(SparseAttentionError, match="quantile=1"):
        quantile_loss(torch.ones(2), torch.ones(2), 1)
    with pytest.raises(SparseAttentionError, match="all 0"):
        quantile_loss(torch.ones(2), torch.zeros(2), 0.5)


def test_accuracy_skips_what_is_not_asked() -> None:
    assert accuracy(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, -100], [0, 4]])) == pytest.approx(2 / 3)
    assert math.isnan(accuracy(torch.tensor([1]), torch.tensor([-100])))


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf
