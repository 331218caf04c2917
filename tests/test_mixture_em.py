"""The loop of EM: iterations that are begun before it is known whether they are wanted."""

import pytest
import torch

from gmkernels import GaussianMixture
from gmkernels.mixture import _em
from mixture_data import quiet, rows, same_fit

X = rows(200)


@pytest.fixture
def begun(monkeypatch):
    """How many E-steps are begun; rows in memory keep so many iterations ahead as begun.ahead says."""

    class Begun:
        count = ahead = 0

    def statistics(self, *args, before=_em.Memory.statistics):
        Begun.count += 1
        return before(self, *args)

    def init(self, *args, before=_em.Memory.__init__):
        before(self, *args)
        self.ahead = Begun.ahead

    monkeypatch.setattr(_em.Memory, "statistics", statistics)
    monkeypatch.setattr(_em.Memory, "__init__", init)
    return Begun


@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("options", [{}, {"tol": 0.0, "max_iter": 5}, {"max_iter": 1}, {"n_init": 2}], ids=str)
def test_the_same_fit_when_iterations_are_begun_ahead(options, ahead, begun):
    def fit():
        begun.count = 0
        with quiet():
            return GaussianMixture(2, random_state=0, **options).fit(X)

    want, alone = fit(), begun.count
    begun.ahead = ahead
    got = fit()
    same_fit(got, want)
    assert got.lower_bounds_ == want.lower_bounds_ and got.converged_ == want.converged_
    tries, most = options.get("n_init", 1), options.get("max_iter", 100)
    assert alone <= begun.count <= alone + ahead * tries
    assert begun.count == alone + ahead * tries if want.converged_ else alone == begun.count == most


def test_a_callback_stops_at_its_own_iteration(begun):
    begun.ahead = 2
    with quiet():
        m = GaussianMixture(2, random_state=0, tol=0.0).fit(X, callback=lambda progress: progress.n_iter == 3)
    assert m.n_iter_ == 3 and len(m.lower_bounds_) == 3


def test_a_failure_is_told_when_its_iteration_is_read(begun):
    begun.ahead = 1
    with pytest.raises(ValueError, match="likelihood is not finite"):
        GaussianMixture(2, init_params="random_from_data", random_state=0, reg_covar=0.0).fit(X * 1e200)


def test_numbers_are_read_once_they_are_there():
    assert _em._reader(torch.tensor([1.5, 0.0]).double())() == [1.5, 0.0]
