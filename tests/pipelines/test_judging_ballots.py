"""Ballots and votes: everybody gets their share in an order of their own, and no vote is lost or counted twice."""

import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from cogview.errors import ManifestError
from pipelines.judging.ballots import CODE_LENGTH, Share, load_votes
from pipelines.serving.fields import RefusedError
from tests.pipelines.studies import (
    NUMBER,
    SCORES,
    judge_all,
    open_ballots,
    write_study,
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def ballots(study, tmp_path):
    opened = open_ballots(tmp_path, study)
    yield opened
    opened.close()


def test_every_evaluator_gets_their_share_with_checks_among_it(ballots):
    for name in ("Ada", "Bob", "Cy", "Di"):
        evaluator = ballots.join(name)
        assert (evaluator.done, evaluator.total) == (0, 6)
        assert len(evaluator.code) == CODE_LENGTH
        judge_all(ballots, f"{name} again")
    votes = [vote for vote in ballots.votes() if vote.evaluator == "Ada again"]
    assert Counter(vote.kind for vote in votes) == {"measured": 4, "repeated": 1, "planted": 1}
    measured = [vote.group for vote in votes if vote.kind == "measured"]
    assert len(set(measured)) == 4
    places = {vote.kind: place for place, vote in enumerate(votes)}
    again = next(vote.group for vote in votes if vote.kind == "repeated")
    assert next(place for place, vote in enumerate(votes) if vote.group == again) < places["repeated"]


def test_groups_are_judged_as_often_as_each_other(ballots):
    for number in range(8):
        judge_all(ballots, f"evaluator {number}")
    counts = Counter(vote.group for vote in ballots.votes() if vote.kind == "measured")
    assert set(counts.values()) == {4}  # 8 evaluators x 4 groups over 8 groups


def test_the_order_of_pictures_and_groups_is_each_evaluators_own_and_stays(ballots, study, tmp_path):
    orders, sequences = set(), set()
    for number in range(12):
        evaluator = ballots.join(f"evaluator {number}")
        first = ballots.next_ballot(evaluator)
        assert ballots.next_ballot(evaluator) == first
        orders.add(first.models)
        sequences.add(first.group.id)
    assert len(orders) > 4
    assert len(sequences) > 2
    opened_again = open_ballots(tmp_path, study)
    assert opened_again.next_ballot(evaluator) == first
    opened_again.close()


def test_a_vote_that_is_sent_again_counts_once(ballots):
    evaluator = ballots.join("Ada")
    first = ballots.next_ballot(evaluator)
    sent = {"place": 0, "best": 2, "scores": [SCORES] * 4, "seconds": 3.5}
    ballots.vote(evaluator, **sent)
    ballots.vote(evaluator, **{**sent, "seconds": 9.0})
    (vote,) = ballots.votes()
    assert (vote.best, vote.seconds, vote.scores) == (first.models[2], 3.5, dict.fromkeys(first.models, SCORES))
    with pytest.raises(RefusedError, match="has its vote, which stays"):
        ballots.vote(evaluator, **{**sent, "best": 1})
    other = [*[SCORES] * 3, {**SCORES, "overall": 1}]
    with pytest.raises(RefusedError, match="has its vote, which stays"):
        ballots.vote(evaluator, **{**sent, "scores": other})
    assert ballots.votes() == [vote]
    assert ballots.next_ballot(evaluator).place == 1


def test_nobody_votes_out_of_turn_or_twice_in_the_file(ballots):
    evaluator = ballots.join("Ada")
    with pytest.raises(RefusedError, match="not the turn of group 4"):
        ballots.vote(evaluator, place=3, best=0, scores=[SCORES] * 4, seconds=1)
    with pytest.raises(RefusedError, match="there is no group 100"):
        ballots.vote(evaluator, place=99, best=0, scores=[SCORES] * 4, seconds=1)
    with pytest.raises(RefusedError, match="has 4 pictures"):
        ballots.vote(evaluator, place=0, best=0, scores=[SCORES] * 3, seconds=1)
    assert ballots.votes() == []
    ballots.vote(evaluator, place=0, best=0, scores=[SCORES] * 4, seconds=1)
    with pytest.raises(sqlite3.IntegrityError), ballots._transaction() as connection:
        connection.execute("INSERT INTO votes (evaluator, place, best, seconds) VALUES (1, 0, 'ours', 1)")
    assert len(ballots.votes()) == 1


def test_votes_are_synced_and_a_full_disk_is_said_and_costs_none(ballots):
    evaluator = ballots.join("Ada")
    connection = ballots._connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: every commit waits for the disk
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count={pages}")
    names = iter(f"evaluator {number}" for number in range(1000))
    with pytest.raises(RefusedError, match=r"cannot be written now .*full") as refused:
        any(judge_all(ballots, name) is None for name in names)
    assert (refused.value.status, refused.value.retry_after > 0) == (503, True)
    answered = 6 * (int(next(names).split()[1]) - 1)
    assert answered - 6 <= len(ballots.votes()) <= answered
    connection.execute(f"PRAGMA max_page_count={pages + 1000}")
    ballots.vote(evaluator, place=0, best=0, scores=[SCORES] * 4, seconds=1)
    assert ballots.votes()[-1].evaluator == "Ada"


def test_a_name_needs_its_code(ballots):
    ada = ballots.join(" Ada\u00a0 Lovelace ")
    assert ada.name == "Ada Lovelace"
    assert ballots.join("Ada Lovelace", code=ada.code.upper()) == ada
    for code, status in (("", 409), ("wrong", 401), ("é", 401)):
        with pytest.raises(RefusedError) as refused:
            ballots.join("Ada Lovelace", code=code)
        assert refused.value.status == status
    with pytest.raises(RefusedError, match="nobody of the name Bob has begun"):
        ballots.join("Bob", code=ada.code)
    for name in ("", "  ", "x" * 61, "a\x1b[31m", "\u202eada"):
        with pytest.raises(RefusedError, match="give a name"):
            ballots.join(name)


def test_votes_on_another_study_are_not_mixed(ballots, study, tmp_path):
    with pytest.raises(ManifestError, match="votes on another study"):
        open_ballots(tmp_path, replace(study, digest="other"))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "votes.db").write_bytes(b"not a database, but long enough to look like one" * 100)
    with pytest.raises(ManifestError, match="cannot be read as votes"):
        open_ballots(tmp_path / "x", study)
    with pytest.raises(ManifestError, match="nobody has judged yet"):
        load_votes(tmp_path / "nothing.db")


def test_all_groups_are_given_where_a_share_says_nothing(study, tmp_path):
    ballots = open_ballots(tmp_path, study, Share(measured=0, repeated=0, planted=0))
    assert ballots.join("Ada").total == NUMBER
    ballots.close()
    many = open_ballots(tmp_path, study, Share(measured=1, repeated=5, planted=50))
    assert many.join("Bob").total == 1 + 0 + 3  # no more than there are
    many.close()


VOTER = """
import sys
from pathlib import Path
from pipelines.judging.ballots import Ballots, Share
from pipelines.judging.study import Study
study = Study.open(Path(sys.argv[1]))
ballots = Ballots(Path(sys.argv[2]), study=study, share=Share(measured=0, repeated=2, planted=3))
for number in range(1000):
    evaluator = ballots.join(f"{sys.argv[3]} {number}")
    while (ballot := ballots.next_ballot(evaluator)) is not None:
        scores = [{"overall": 1 + number % 10, "clarity": 1, "texture": 1, "relevance": 1}] * len(ballot.models)
        ballots.vote(evaluator, place=ballot.place, best=0, scores=scores, seconds=1)
        print(evaluator.name, ballot.place, flush=True)
"""


def test_a_killed_process_loses_no_vote_that_it_has_acknowledged(study, tmp_path):
    acknowledged = []
    for attempt in range(2):
        words = [sys.executable, "-c", VOTER, str(study.folder), str(tmp_path / "votes.db"), f"attempt {attempt}"]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as voter:
            acknowledged += [next(voter.stdout) for _ in range(20 + 7 * attempt)]
            voter.send_signal(signal.SIGKILL)
            acknowledged += voter.stdout.readlines()
        votes = load_votes(tmp_path / "votes.db")
        assert 0 <= len(votes) - len(acknowledged) <= attempt + 1  # each time one may be on the disk, but unanswered
        by_evaluator = Counter(vote.evaluator for vote in votes)
        heard = Counter(line.rsplit(" ", 1)[0] for line in acknowledged)
        assert all(by_evaluator[name] >= count for name, count in heard.items())
        assert all(len(vote.scores) == 4 for vote in votes)
