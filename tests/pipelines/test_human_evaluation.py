"""Human evaluation: what a study shows, that it is blind, and that no vote is lost or counted twice."""

import asyncio
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from PIL import Image

from cogview.errors import ConfigError, ManifestError
from cogview.evaluation.human_votes import RIGHT, SCALES
from cogview.records.pair import TextImagePair
from pipelines import count_votes, human_evaluation
from pipelines.judging.ballots import CODE_LENGTH, Ballots, Share, load_votes
from pipelines.judging.booth import Booth
from pipelines.judging.entrants import caption_key, read_entrant
from pipelines.judging.study import RECOVERED, Study, prepare, scrambled
from pipelines.runtime.flags import read_order
from pipelines.runtime.jobs import plan_job, run_job
from pipelines.serving.fields import RefusedError
from pipelines.serving.gate import SECURITY, Gate
from tests.pipelines.job_runs import open_run
from tests.pipelines.pair_folders import QuietDisplay, make_pairs, png, write_pair_folder
from tests.pipelines.studies import NUMBER, SHARE, open_ballots, study_config, write_study, write_systems

KEY, TOKEN = "the-key-of-the-results", "a-secret-for-this-test"
SCORES = {"overall": 7, "clarity": 4, "texture": 3, "relevance": 5}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def ballots(study, tmp_path):
    opened = open_ballots(tmp_path, study)
    yield opened
    opened.close()


def judge_all(ballots, name, *, best=None):
    evaluator = ballots.join(name)
    while (ballot := ballots.next_ballot(evaluator)) is not None:
        chosen = ballot.models.index(best) if best in ballot.models else 0
        ballots.vote(evaluator, place=ballot.place, best=chosen, scores=[SCORES] * len(ballot.models), seconds=1)
    return evaluator


def picture_of(study, group, model):
    return Image.open(io.BytesIO(study.picture(group, model)))


# --- the pictures


def test_a_group_has_everyones_picture_of_its_caption(study):
    assert study.models == ("ours", "named", "listed", RECOVERED)
    assert len(study.groups) == NUMBER
    for group in study.groups.values():
        assert set(group.pictures) == set(study.models)
        assert (
            picture_of(study, group, "ours").convert("RGB").getpixel((0, 0))[1] == 100
        )  # of the candidate ranked first
        assert picture_of(study, group, "listed").size == (60, 40)
        assert picture_of(study, group, RECOVERED).size == (32, 32)


def test_no_file_tells_whose_it_is(study):
    for group in study.groups.values():
        for record in group.pictures.values():
            name = Path(record["file"]).name
            assert name in {f"{place}.png" for place in range(4)}
            assert Image.open(study.folder / record["file"]).info == {}


def test_a_planted_group_has_one_whole_picture(study):
    assert len(study.planted) == 3
    for group in study.planted.values():
        assert sum(name == RIGHT for name in group.pictures) == 1
        assert len(group.pictures) == len(study.models)
        (own,) = [other for other in study.groups.values() if other.caption == group.caption]
        assert study.picture(group, RIGHT) == study.picture(own, RECOVERED)


def test_a_scrambled_picture_has_the_same_pixels_elsewhere():
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    mixed = scrambled(picture, rng=random.Random(0))
    assert sorted(np.asarray(mixed).ravel()) == sorted(np.asarray(picture).ravel())
    assert mixed.tobytes() != picture.tobytes()
    assert scrambled(picture.resize((5, 5)), rng=random.Random(0)).size == (64, 64)


def test_captions_meet_in_every_spelling():
    assert caption_key("A large_red circle, on blue!") == caption_key("a Large red  circle on blue")
    assert caption_key("白色背景，一个圆形") == caption_key("白色背景_一个圆形")
    assert caption_key("ＡＢＣ") == "abc"


def test_what_cannot_be_read_is_left_out_with_its_reason(tmp_path):
    systems = write_systems(tmp_path)
    broken = sorted(systems.named.glob("*.png"))[0]
    broken.write_bytes(b"<html>no")
    run = open_run(tmp_path / "study")
    prepare(study_config(systems), run)
    content = json.loads((run.output / "study.json").read_text())
    assert len(content["groups"]) == NUMBER - 1
    (left_out,) = content["left_out"]
    assert left_out["reason"] == "named: image_is_html"
    assert caption_key(left_out["caption"]) == caption_key(broken.stem)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("ours", "ours", "listed")}, "every model needs a name of its own"),
        ({"names": ("ours", RECOVERED, "x")}, "every model needs a name of its own"),
        (
            {"names": ("ours",), "folders": (Path("a"),), "contents": ("a",), "image_tokenizer": None},
            "nothing to compare",
        ),
        ({"names": ("ours, too", "named", "listed")}, "'ours, too' names a metric as well"),
        ({"image_size": 30}, "image_size=30 is no multiple of 8"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, changes, message):
    systems = write_systems(tmp_path, number=2)
    with pytest.raises(ConfigError, match=message):
        prepare(study_config(systems, **changes), open_run(tmp_path / "study"))


def test_folders_without_pictures_or_captions_in_common_are_refused(tmp_path):
    systems = write_systems(tmp_path, number=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no picture"):
        read_entrant("them", tmp_path / "empty")
    with pytest.raises(ConfigError, match="is no folder"):
        read_entrant("them", tmp_path / "nothing")
    (tmp_path / "empty" / "samples.parquet").write_bytes(b"no")
    with pytest.raises(ConfigError, match="not a table of samples"):
        read_entrant("them", tmp_path / "empty")
    (tmp_path / "empty" / "samples.parquet").unlink()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "something_else.png")
    config = study_config(systems, names=("ours", "x"), folders=(systems.ours, tmp_path / "empty"), contents=("a", "b"))
    with pytest.raises(ConfigError, match=r"no caption has a picture of everyone .*x: something else"):
        prepare(config, open_run(tmp_path / "study"))


def test_without_a_known_truth_references_are_asked_for_and_used(tmp_path):
    systems = write_systems(tmp_path, number=3)
    names = {"names": ("named", "listed"), "folders": (systems.named, systems.listed), "contents": ("a", "b")}
    with pytest.raises(ConfigError, match="give --references FOLDER"):
        prepare(study_config(systems, **names), open_run(tmp_path / "without"))
    run = open_run(tmp_path / "with")
    prepare(study_config(systems, **names, references=systems.named, image_size=0), run)
    study = Study.open(run.output)
    assert study.models == ("named", "listed", RECOVERED)
    assert picture_of(study, next(iter(study.groups.values())), RECOVERED).size == (32, 32)


def test_references_may_be_the_tars_of_pairs(tmp_path):
    systems = write_systems(tmp_path, number=3)
    pairs = [
        TextImagePair(
            key=f"00000_{row:05d}",
            captions=("something else", caption),
            image_bytes=png("red" if row else "blue"),
            source="https://example.org/",
            extra={"sha256": "0" * 64, "width": 40, "height": 32},
        )
        for row, caption in enumerate(systems.captions[:2])
    ]
    tars = write_pair_folder(tmp_path / "pairs", [pairs])
    run = open_run(tmp_path / "study")
    prepare(study_config(systems, references=tars), run)
    study = Study.open(run.output)
    assert len(study.groups) == 3  # the third has no pair, but a scene
    other = write_pair_folder(tmp_path / "others", [make_pairs(2)])
    with pytest.raises(ConfigError, match="no pair in 1 tars has a caption"):
        prepare(study_config(systems, references=other), open_run(tmp_path / "none"))


def test_a_picture_that_has_changed_is_not_shown(tmp_path):
    study = write_study(tmp_path)
    group = study.groups["group-00000"]
    path = study.folder / group.pictures["ours"]["file"]
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match="has changed"):
        study.picture(group, "ours")
    path.unlink()
    with pytest.raises(ManifestError, match="missing or cut"):
        Study.open(study.folder)


# --- ballots and votes


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


# --- the server


@asynccontextmanager
async def booth_at(ballots, *, token=""):
    booth = Booth(ballots._study, ballots, gate=Gate(token=token), results_key=KEY)
    runner = web.AppRunner(booth.app(), shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
        yield session
    await runner.cleanup()


def visit(ballots, work, **options):
    async def run():
        async with asyncio.timeout(60), booth_at(ballots, **options) as session:
            await work(session)

    asyncio.run(run())


async def post(session, path, body, **headers):
    async with session.post(path, json=body, headers=headers) as answer:
        return answer.status, await answer.json()


def test_an_evaluator_joins_judges_and_finds_no_name_of_a_model(ballots, study):
    async def work(session):
        status, me = await post(session, "/join", {"name": "Ada"})
        assert (status, me["done"], me["total"]) == (200, 0, 6)
        who = {"name": "Ada", "code": me["code"]}
        for place in range(6):
            async with session.post("/ballot", json=who) as answer:
                text = await answer.text()
            assert not [model for model in (*study.models, RIGHT, "scrambled") if f'"{model}"' in text]
            content = json.loads(text)
            assert (content["place"], content["done"], len(content["pictures"])) == (place, place, 4)
            vote = {**who, "place": place, "best": 1, "scores": [SCORES] * 4, "seconds": 2.5}
            for _ in range(2):
                assert await post(session, "/vote", vote) == (200, {"saved": place})
        status, end = await post(session, "/ballot", who)
        assert "pictures" not in end
        assert (end["done"], end["total"]) == (6, 6)

    visit(ballots, work)
    assert len(ballots.votes()) == 6


def test_many_at_once_each_vote_once(ballots):
    async def evaluator(session, number):
        _, me = await post(session, "/join", {"name": f"evaluator {number}"})
        who = {"name": me["name"], "code": me["code"]}
        for place in range(6):
            vote = {**who, "place": place, "best": number % 4, "scores": [SCORES] * 4, "seconds": 1}
            answers = await asyncio.gather(*(post(session, "/vote", vote) for _ in range(3)))
            assert {status for status, _ in answers} == {200}

    async def work(session):
        await asyncio.gather(*(evaluator(session, number) for number in range(10)))

    visit(ballots, work)
    assert Counter(vote.evaluator for vote in ballots.votes()) == {f"evaluator {number}": 6 for number in range(10)}


def test_bad_votes_get_a_reason_and_change_nothing(ballots):
    good = {"place": 0, "best": 0, "scores": [SCORES] * 4, "seconds": 1}
    bad = {
        "best beyond the last": ({"best": 4}, 422, "best=4: give a whole number from 0 to 3"),
        "no best": ({"best": None}, 422, "best=null"),
        "a score of 11": (
            {"scores": [{**SCORES, "overall": 11}] * 4},
            422,
            "overall=11: give a whole number from 1 to 10",
        ),
        "a score of 0": ({"scores": [{**SCORES, "clarity": 0}] * 4}, 422, "clarity=0"),
        "a score of 4.5": ({"scores": [{**SCORES, "texture": 4.5}] * 4}, 422, "texture=4.5"),
        "a scale that is none": ({"scores": [{**SCORES, "beauty": 1}] * 4}, 422, '"beauty" is no scale'),
        "a missing scale": ({"scores": [{"overall": 1}] * 4}, 422, "clarity=null"),
        "three pictures": ({"scores": [SCORES] * 3}, 422, "one object for each of the 4 pictures"),
        "another place": ({"place": 3}, 409, "not the turn"),
        "no place": ({"place": 6}, 422, "place=6"),
        "a field that is none": ({"model": "ours"}, 422, '"model" is no field'),
        "a wrong code": ({"code": "aaaaaaaa"}, 401, "not the code"),
        "nobody": ({"name": "Eve"}, 401, "nobody of the name Eve"),
        "a number for a name": ({"name": 5}, 422, "name=5: give a text"),
        "endless time": ({"seconds": 1e9}, 422, "seconds=1000000000.0"),
    }

    async def work(session):
        _, me = await post(session, "/join", {"name": "Ada"})
        for name, (changes, status, words) in bad.items():
            found, answer = await post(session, "/vote", {"name": "Ada", "code": me["code"], **good, **changes})
            assert found == status, name
            assert words in answer["error"], name
        async with session.post("/vote", data={"place": 0}) as answer:
            assert answer.status == 415
        async with session.get("/vote") as answer:
            assert answer.status == 405

    visit(ballots, work)
    assert ballots.votes() == []


def test_only_pages_of_this_server_are_answered_and_others_need_the_token(ballots):
    async def work(session):
        who = {"name": "Ada"}
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": f"Bearer {TOKEN}", "Host": "evil.example"}, 421),
            ({"Authorization": f"Bearer {TOKEN}", "Origin": "https://evil.example"}, 403),
            ({"Authorization": f"Bearer {TOKEN}", "Host": "10.0.0.1:80"}, 200),
        ):
            assert (await post(session, "/join", who, **headers))[0] == status
        for path in ("/", "/judge.js", "/judge.css", "/base.css", "/asking.js", "/results", "/results.js"):
            async with session.get(path) as answer:
                assert answer.status == 200
                assert SECURITY.items() <= answer.headers.items()
        async with session.get("/results/data", headers={"Results-Key": KEY}) as answer:
            assert answer.status == 401
        async with session.get("/study.json") as answer:
            assert answer.status in (401, 404)

    visit(ballots, work, token=TOKEN)


def test_the_greeting_says_where_to_go_and_keeps_the_token_to_itself(ballots, study):
    plain = Booth(study, ballots, gate=Gate(), results_key=KEY).greeting("http://127.0.0.1:1")
    assert "Evaluators: http://127.0.0.1:1 " in plain
    assert f"http://127.0.0.1:1/results#key={KEY}" in plain
    guarded = Booth(study, ballots, gate=Gate(token=TOKEN), results_key=KEY).greeting("http://10.0.0.1:1")
    assert "http://10.0.0.1:1/#token=<" in guarded
    assert f"#key={KEY}&token=<" in guarded
    assert TOKEN not in guarded


def test_results_are_for_whoever_has_their_key(ballots, study):
    async def work(session):
        async with session.get("/results/data") as answer:
            assert answer.status == 403
        async with session.get("/results/data", headers={"Results-Key": KEY}) as answer:
            before = await answer.json()
        assert (before["votes"], before["models"]) == (0, {})
        judge_all(ballots, "Ada", best="ours")
        async with session.get("/results/data", headers={"Results-Key": KEY}) as answer:
            content = await answer.json()
        assert content["votes"] == 4
        assert content["models"]["ours"]["best"]["value"] == 1
        assert content["models"][RECOVERED]["overall"]["value"] == SCORES["overall"]
        (report,) = content["evaluators"]
        assert (report["evaluator"], report["repeated_alike"]) == ("Ada", 1)
        assert content["scales"] == SCALES

    visit(ballots, work)


# --- the job


def test_models_are_given_by_name_and_folder(tmp_path):
    systems = write_systems(tmp_path, number=2)
    config = human_evaluation.Config(models=(f"a model={systems.ours}", f"other={systems.named}"), recovered=False)
    found = human_evaluation.study_config(config, root=tmp_path)
    assert (found.names, found.folders) == (("a model", "other"), (systems.ours, systems.named))
    assert found.image_tokenizer is None
    for models, message in (
        (("nothing",), "give NAME=FOLDER"),
        (("=/x",), "give NAME=FOLDER"),
        ((f"a={systems.ours}", f"a={systems.named}"), "a name of its own"),
        ((f"a={tmp_path / 'missing'}",), "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            human_evaluation.study_config(replace(config, models=models), root=tmp_path)


def test_a_study_is_prepared_once_and_its_votes_are_counted_once(tmp_path, run_root, caplog):
    systems = write_systems(tmp_path, number=4)
    order = read_order(["human_evaluation", "smoke", "--root", str(run_root), "--verbose"])
    config = human_evaluation.Config(
        models=(f"ours={systems.ours}", f"named={systems.named}"),
        image_tokenizer=systems.image_tokenizer,
        image_size=32,
        only_prepare=True,
    )
    (line,) = human_evaluation.main(config, order=order, command="")
    folder = Path(line.removeprefix("study: "))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    assert len(before) == 3 * (4 + 4)
    assert human_evaluation.main(config, order=order, command="") == [line]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} == before
    study = Study.open(folder)
    with human_evaluation.open_ballots(config, study) as ballots:
        judge_all(ballots, "Ada", best="ours")
    counted = [
        run_job(count_votes.JOB, count_votes.resolve(count_votes.Config(), root=run_root), root=run_root, display=shown)
        for shown in (QuietDisplay(), QuietDisplay())
    ]
    assert [done.was_done for done in counted] == [False, True]
    assert counted[0].scores["best/ours"] == 1
    assert "MLflow missed" not in caplog.text
    with human_evaluation.open_ballots(config, study) as ballots:
        judge_all(ballots, "Bob", best="named")
    config_now = count_votes.resolve(count_votes.Config(), root=run_root)
    assert plan_job(count_votes.JOB, config_now, root=run_root).output != counted[0].output


def test_what_cannot_be_served_is_refused():
    with pytest.raises(ConfigError, match="--token-file FILE"):
        human_evaluation.Config(host="0.0.0.0")
    with pytest.raises(ConfigError, match="port=70000"):
        human_evaluation.Config(port=70_000)
    with pytest.raises(ConfigError, match="each=-1"):
        human_evaluation.Config(each=-1)


def test_one_server_at_a_time_holds_the_votes(study):
    config = human_evaluation.Config()
    with human_evaluation.open_ballots(config, study) as ballots:
        assert isinstance(ballots, Ballots)
        with (
            pytest.raises(ConfigError, match=f"being written by process {os.getpid()}"),
            human_evaluation.open_ballots(config, study),
        ):
            pass


def test_the_share_of_the_paper_preset_is_within_what_is_prepared():
    paper = human_evaluation.PRESETS["paper"]
    assert paper.num_groups == 2950
    assert paper.planted <= paper.num_planted
    assert SHARE.measured < NUMBER
