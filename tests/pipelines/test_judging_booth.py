"""The server of the booth: what evaluators are told, what is refused, and who may see results."""

import asyncio
import json
from collections import Counter
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from cogview.evaluation.human_votes import RIGHT, SCALES
from pipelines.judging.booth import Booth
from pipelines.judging.study import RECOVERED
from pipelines.serving.gate import SECURITY, Gate
from tests.pipelines.studies import (
    SCORES,
    judge_all,
    open_ballots,
    write_study,
)

KEY, TOKEN = "the-key-of-the-results", "a-secret-for-this-test"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture
def ballots(study, tmp_path):
    opened = open_ballots(tmp_path, study)
    yield opened
    opened.close()


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
