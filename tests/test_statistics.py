"Intervals that hold the truth as often as they promise, for many songs and few runs."
import numpy as np
import pytest

from deepdemix.foundations import statistics as S

STUDIES = 400


def covered(once, truth):
    "The part of simulated studies whose interval holds the truth."
    return np.mean([low <= truth <= high for low, high in map(once, range(STUDIES))])


@pytest.mark.parametrize("runs", [2, 3, 5])
@pytest.mark.parametrize("average, spread", [pytest.param("median", 0., marks=pytest.mark.slow),
                                             ("median", .3), ("mean", .1)])
def test_paired_intervals_hold_the_truth(runs, spread, average):
    "Between 93 and 97 of 100, and what 400 studies add to that by chance (1.1 %)."
    def once(k):
        rng = np.random.default_rng([k, runs])
        shared = rng.normal(0, 3, (1, 50, 1)) + rng.normal(0, .3, (runs, 1, 1))
        change = (0.4 + rng.normal(0, spread, (runs, 1, 1)) + rng.normal(0, 0.3, (1, 50, 1))
                  + rng.normal(0, 0.3, (runs, 50, 1)))
        found = S.paired(shared, shared + change, average, draws=80, seed=k)
        return found["low"], found["high"]
    assert .92 <= covered(once, .4) <= .98


@pytest.mark.parametrize("runs", [2, 3])
def test_unpaired_runs_hold_the_truth(runs):
    def once(k):
        rng = np.random.default_rng([k, runs])
        songs = rng.normal(0, 3, (1, 50, 1))
        def model(gain):
            return (songs + gain + rng.normal(0, 0.2, (runs, 1, 1)) + rng.normal(0, 0.3, (1, 50, 1))
                    + rng.normal(0, 0.3, (runs, 50, 1)))
        found = S.paired(model(0), model(.4), same_seeds=False, draws=80, seed=k)
        return found["low"], found["high"]
    assert .92 <= covered(once, .4) <= .98


def test_one_run_covers_other_songs():
    def once(k):
        songs = np.random.default_rng(k).gumbel(size=(50, 1)) + np.random.default_rng([k, 1]).normal(
            size=(50, 4)
        )
        return S.overall_interval(songs, draws=200, seed=k)
    many = np.random.default_rng(10 ** 6)
    truth = np.median(many.gumbel(size=10 ** 6) + many.normal(size=10 ** 6))
    assert .91 <= covered(once, truth) <= .98


def test_pairing_sees_what_unpaired_intervals_hide():
    rng = np.random.default_rng(0)
    a = rng.normal(0, 5, (1, 50, 4))
    b = a + .3 + rng.normal(0, .3, a.shape)
    found = S.paired(a, b)
    assert found["low"] > 0 and found["p"] < 1e-3 and found["improved"] > 40
    assert S.overall_interval(b)[0] < S.overall_interval(a)[1]


def test_runs_widen_the_interval():
    songs = np.random.default_rng(0).normal(0, 3, (1, 50, 4))
    a, gain = songs + np.zeros((3, 1, 1)), np.array([-.5, 0, .5])[:, None, None]
    one, all = S.paired(a[:1], a[:1] + .3), S.paired(a, a + .3 + gain)
    assert all["high"] - all["low"] > one["high"] - one["low"] + 2


def test_songs_without_a_score_take_no_part():
    a = np.random.default_rng(0).normal(size=(2, 9, 4))
    b = a + 1.
    a[:, 3], b[0, 4, 2] = np.nan, np.nan
    found = S.paired(a, b)
    assert found["songs"] == 8 and abs(found["difference"] - 1) < 1e-9 and found["high"] - found["low"] < 1e-9


def test_a_single_song_has_no_interval():
    found = S.paired(np.zeros((2, 1, 4)), np.ones((2, 1, 4)))
    assert found["difference"] == 1 and np.isnan([found["low"], found["high"]]).all()
