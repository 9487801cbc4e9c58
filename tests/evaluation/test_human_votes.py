"""Votes to figures: means and shares are those of the votes, intervals are those of evaluators and groups."""

import numpy as np
import pytest

from cogview.evaluation.human_votes import (
    FIGURES,
    RIGHT,
    SCALES,
    Vote,
    attentive,
    report_evaluators,
    summarise,
)

MODELS = ("ours", "theirs")


def vote(evaluator="ada", group="g0", best="ours", *, kind="measured", ours=8, theirs=4, seconds=10.0):
    scores = {
        "ours": {name: min(ours, highest) for name, highest in SCALES.items()},
        "theirs": {name: min(theirs, highest) for name, highest in SCALES.items()},
    }
    return Vote(evaluator=evaluator, group=group, kind=kind, best=best, scores=scores, seconds=seconds)


def test_shares_and_means_are_those_of_the_measured_votes():
    votes = [
        vote(group="g0", best="ours", ours=9),
        vote(group="g1", best="theirs", ours=6, theirs=5),
        vote("bob", group="g0", best="ours", ours=3, theirs=1),
        vote("bob", group="g1", best="ours", kind="repeated", ours=1, theirs=1),
        vote("bob", group="p0", best=RIGHT, kind="planted"),
    ]
    summary = summarise(votes, models=MODELS)
    assert list(summary) == list(MODELS)
    assert list(summary["ours"]) == list(FIGURES)
    assert (summary["ours"]["best"].value, summary["theirs"]["best"].value) == pytest.approx((2 / 3, 1 / 3))
    assert summary["ours"]["overall"].value == pytest.approx(6)
    assert summary["theirs"]["clarity"].value == pytest.approx((4 + 5 + 1) / 3)
    assert {found.n for figures in summary.values() for found in figures.values()} == {3}


def test_shares_of_all_models_add_up_and_lie_in_their_intervals():
    rng = np.random.default_rng(3)
    votes = [
        vote(f"e{e}", f"g{g}", best=MODELS[int(rng.random() < 0.3)], ours=int(rng.integers(1, 11)))
        for e in range(5)
        for g in range(40)
    ]
    summary = summarise(votes, models=MODELS)
    assert sum(summary[model]["best"].value for model in MODELS) == pytest.approx(1)
    for figures in summary.values():
        for found in figures.values():
            assert found.low <= found.value <= found.high
    assert summary["ours"]["best"].low > 0.5
    assert summarise(votes, models=MODELS) == summary
    assert summarise(votes, models=MODELS, seed=1) != summary


def test_who_was_never_chosen_may_be_chosen_yet():
    never = summarise([vote(group=f"g{g}") for g in range(48)], models=MODELS)["theirs"]["best"]
    assert (never.value, never.low) == (0, 0)
    assert 0.05 < never.high < 0.1


def test_evaluators_who_differ_widen_the_interval_more_than_groups_alone_would():
    strict = [vote("strict", f"g{g}", ours=2) for g in range(50)]
    mild = [vote("mild", f"g{g}", ours=9) for g in range(50)]
    apart = summarise([*strict, *mild], models=MODELS)["ours"]["overall"]
    alike = summarise(
        [vote(name, f"g{g}", ours=(2, 9)[(g + n) % 2]) for n, name in enumerate("ab") for g in range(50)], models=MODELS
    )["ours"]["overall"]
    assert apart.value == alike.value == pytest.approx(5.5)
    assert (apart.low, apart.high) == (2, 9)
    assert alike.high - alike.low < 2


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for study in range(100):
        mild_E, hard_G = rng.normal(0, 0.5, 12), rng.normal(0, 0.5, 30)
        votes = [
            vote(f"e{e}", f"g{g}", ours=int(np.clip(round(6 + mild_E[e] + hard_G[g] + rng.normal(0, 1)), 1, 10)))
            for e in range(12)
            for g in range(30)
        ]
        found = summarise(votes, models=("ours",), seed=study, resamples=300)["ours"]["overall"]
        covered += found.low <= 6 <= found.high
    assert covered >= 90


def test_without_a_measured_vote_there_are_no_figures():
    assert summarise([], models=MODELS) == {}
    assert summarise([vote(kind="planted", best=RIGHT)], models=MODELS) == {}


def test_attention_is_reported_for_each_evaluator():
    votes = [
        vote(group="g0", seconds=4),
        vote(group="g1", best="ours", ours=8, theirs=4, seconds=6),
        vote(group="g1", best="theirs", kind="repeated", ours=5, theirs=5, seconds=8),
        vote(group="p0", best=RIGHT, kind="planted", seconds=1),
        vote("bob", "g0"),
        vote("bob", "p0", best="scrambled 1", kind="planted"),
        vote("bob", "p1", best=RIGHT, kind="planted"),
        vote("cy", "g0"),
    ]
    ada, bob, cy = report_evaluators(votes)
    assert (ada.evaluator, ada.votes, ada.seconds) == ("ada", 4, 5)
    assert (ada.planted, ada.planted_right, ada.repeated, ada.repeated_alike) == (1, 1, 1, 0)
    assert ada.repeated_difference == pytest.approx((3 + 1) / 2)
    assert (bob.planted, bob.planted_right, bob.attention, bob.repeated_difference) == (2, 1, 0.5, None)
    assert cy.attention == 1
    assert {found.evaluator for found in attentive(votes, least=0.6)} == {"ada", "cy"}
    assert attentive(votes, least=0) == votes
