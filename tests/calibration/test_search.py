"""The search improves on its start, repeats itself, and goes on where it was interrupted."""

import json
import sys

import pytest

from tokenprune.calibration.search import Trial, best_of, check_installed, search
from tokenprune.calibration.space import SearchSpace
from tokenprune.errors import ConfigurationError, InstallationError

SPACE = SearchSpace(
    "uniform",
    0.25,
    (3, 5),
    {"alpha": (-1.0, 1.0)},
    lambda shares: {"keep_ratios": list(shares)},
    ((0.3, 0.2), {"alpha": -0.8}),
)


def hill(point):
    """A smooth objective with its top of 1 at stage_1 = 0.7, alpha = 0.4."""
    return 1 - (point["stage_1"] - 0.7) ** 2 - (point["alpha"] - 0.4) ** 2


class Interrupted(Exception):
    pass


@pytest.fixture
def run(tmp_path):
    def run(evaluate=hill, *, num_trials=13, seed=0, storage="trials.log", identity=None):
        seen = []
        found = search(
            SPACE,
            evaluate,
            storage=tmp_path / storage,
            identity=identity or {"model": "m"},
            num_trials=num_trials,
            seed=seed,
            on_trial=seen.append,
        )
        assert seen == found
        return found

    return run


def test_it_finds_the_top_of_a_hill_and_begins_at_the_start(run):
    trials = run(num_trials=20)
    assert trials[0] == Trial(0, SPACE.start_point, hill(SPACE.start_point))
    assert [trial.number for trial in trials] == list(range(20))
    best = best_of(trials)
    assert best.score > 0.995 > trials[0].score
    # ten uniform points alone do not get there
    assert best.number >= 10


def test_the_same_seed_gives_the_same_trials_and_another_seed_others(run):
    once = run(storage="a")
    assert run(storage="b") == once
    other = run(storage="c", seed=1)
    assert other[0] == once[0]
    assert all(a.point != b.point for a, b in zip(once[1:], other[1:], strict=True))


def test_trials_differ_from_each_other(run):
    trials = run()
    assert len({tuple(trial.point.values()) for trial in trials}) == len(trials)


@pytest.mark.parametrize("after", [3, 12])
def test_an_interrupted_search_ends_as_if_it_had_not_been(run, after):
    whole = run(storage="whole")
    calls = []

    def fails(point):
        calls.append(point)
        if len(calls) > after:
            raise Interrupted
        return hill(point)

    with pytest.raises(Interrupted):
        run(fails)
    again = []

    def counts(point):
        again.append(point)
        return hill(point)

    assert run(counts) == whole
    # the start is checked, and nothing else is repeated
    assert len(again) == 1 + len(whole) - after


def test_a_killed_search_goes_on_too(run, tmp_path):
    whole = run(storage="whole")
    run(num_trials=12)
    # as a process leaves the file that is killed within a trial
    path = tmp_path / "trials.log"
    lines = (tmp_path / "whole").read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert json.loads(lines[-1])["op_code"] == 6, "the last line must say that a trial ended"
    assert run() == whole


def test_a_finished_search_is_read(run):
    whole = run()
    calls = []

    def counts(point):
        calls.append(point)
        return hill(point)

    assert run(counts) == whole
    assert calls == [SPACE.start_point]
    # fewer trials are the first of them
    assert run(num_trials=5) == whole[:5]


def test_searches_of_another_identity_share_the_file_and_nothing_else(run):
    once = run()
    assert run(lambda point: -hill(point), identity={"model": "other"})[0].score == -once[0].score
    assert run() == once


def test_a_model_that_answers_differently_is_noticed(run):
    run()
    with pytest.raises(ConfigurationError, match=r"trials\.log must hold trials of this model"):
        run(lambda point: hill(point) - 0.01)


@pytest.mark.parametrize("text", ["method: uniform\n", "[1]\n{}\n", '{"op_code": 0}\n{}\n'])
def test_a_file_of_another_kind_is_refused(run, tmp_path, text):
    (tmp_path / "trials.log").write_text(text)
    with pytest.raises(ConfigurationError, match=r"trials\.log must be a file of trials"):
        run()
    assert (tmp_path / "trials.log").read_text() == text


def test_of_equal_scores_the_first_is_best():
    trials = [Trial(i, {}, score) for i, score in enumerate([0.5, 0.7, 0.7])]
    assert best_of(trials).number == 1


@pytest.mark.parametrize("library", ["optuna", "matplotlib", "scipy"])
def test_a_missing_library_names_the_extra(monkeypatch, library):
    check_installed()
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InstallationError, match=r"pip install \"\.\[calibrate\]\""):
        check_installed()
