"""The web side of `human_evaluation`: joining, ballots, votes, and the results for whoever has their key.

In: HTTP through the gate of `pipelines.serving.gate`. Out: pages and JSON. An evaluator is a name and a code; both
travel in the body of each request, so another site's page cannot send them along unseen. Pictures travel inside the
ballot, without names or addresses by which their makers could be told apart. Results name the models, so they are for
the organiser alone: they need the key that is shown where the server was started.
"""

import asyncio
import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from cogview.evaluation.human_votes import SCALES, report_evaluators, summarise
from pipelines.judging.ballots import Ballot, Ballots, Evaluator
from pipelines.judging.study import Study
from pipelines.serving.fields import RefusedError, read_fields, real_number, shown, whole_number
from pipelines.serving.gate import SHARED_FILES, Gate, guarded_app, is_same_secret, json_body

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": PAGE / "judge.html",
    "/judge.css": PAGE / "judge.css",
    "/judge.js": PAGE / "judge.js",
    "/results": PAGE / "results.html",
    "/results.js": PAGE / "results.js",
    **SHARED_FILES,
}
WHO = ("name", "code")
EXAMPLE = '{"name": "Ada", "code": "abcd2345"}'
WRONG_CODE_SECONDS = 0.5  # that an answer to a wrong code or key takes
MAX_SECONDS = 86_400.0
LIVE_RESAMPLES = 500  # of the intervals on the live page; `count_votes` draws more


class Booth:
    """The handlers of all addresses. results_key: for those who may see whose pictures are whose."""

    def __init__(self, study: Study, ballots: Ballots, *, gate: Gate, results_key: str) -> None:
        self.study, self.ballots, self.gate = study, ballots, gate
        self._results_key = results_key
        self._counted: tuple[int, dict[str, Any]] | None = None

    def app(self) -> web.Application:
        """The application, with every address that it has."""
        app = guarded_app(self.gate, pages=FILES)
        app.router.add_get("/about", self._about)
        app.router.add_post("/join", self._join)
        app.router.add_post("/ballot", self._ballot)
        app.router.add_post("/vote", self._vote)
        app.router.add_get("/results/data", self._results)
        return app

    def greeting(self, url: str) -> str:
        """What is said when the server listens at `url`. The token is not written where others may read it."""
        secret = "token=<what the token file holds>" if self.gate.token else ""
        return (
            f"Evaluators: {url}{f'/#{secret}' if secret else ''}  (Ctrl-C ends it; votes stay, and everybody goes on)\n"
            f"Results, for you alone: {url}/results#key={self._results_key}{f'&{secret}' if secret else ''}"
        )

    async def _about(self, request: web.Request) -> web.Response:
        """What the page needs before anybody has joined."""
        return web.json_response({"scales": SCALES, "pictures": len(self.study.models)})

    async def _join(self, request: web.Request) -> web.Response:
        fields = read_fields(await json_body(request), known=WHO, example=EXAMPLE)
        evaluator = await self._slowed(
            partial(self.ballots.join, _text(fields, "name"), code=_text(fields, "code", ""))
        )
        return web.json_response(_plain(evaluator))

    async def _ballot(self, request: web.Request) -> web.Response:
        """The next group to judge, with its pictures; only the counts when all are done."""
        fields = read_fields(await json_body(request), known=WHO, example=EXAMPLE)
        evaluator = await self._evaluator(fields)
        ballot = await asyncio.to_thread(self.ballots.next_ballot, evaluator)
        content = _plain(evaluator)
        if ballot is not None:
            pictures = await asyncio.to_thread(self._pictures, ballot)
            content |= {"place": ballot.place, "caption": ballot.group.caption, "pictures": pictures}
        return web.json_response(content)

    async def _vote(self, request: web.Request) -> web.Response:
        """A vote. The answer comes after the vote is on the disk."""
        known = (*WHO, "place", "best", "scores", "seconds")
        fields = read_fields(await json_body(request), known=known, example=EXAMPLE)
        evaluator = await self._evaluator(fields)
        place = whole_number(fields, "place", lowest=0, highest=max(0, evaluator.total - 1))
        number = len(self.study.models)
        vote = partial(
            self.ballots.vote,
            evaluator,
            place=place,
            best=whole_number(fields, "best", lowest=0, highest=number - 1),
            scores=_scores(fields, number=number),
            seconds=real_number(fields, "seconds", default=0.0, highest=MAX_SECONDS),
        )
        # A client that hangs up does not take back what it has sent: the vote is written to its end.
        await asyncio.shield(asyncio.to_thread(vote))
        return web.json_response({"saved": place})

    async def _results(self, request: web.Request) -> web.Response:
        if not is_same_secret(request.headers.get("Results-Key", ""), self._results_key):
            await asyncio.sleep(WRONG_CODE_SECONDS)
            raise RefusedError(403, "results need their key; open the address that was shown when the server started")
        return web.json_response(await asyncio.to_thread(self._count))

    def _count(self) -> dict[str, Any]:
        """The figures of all votes, counted again only when there are more."""
        votes = self.ballots.votes()
        if self._counted is None or self._counted[0] != len(votes):
            summary = summarise(votes, models=self.study.models, resamples=LIVE_RESAMPLES)
            content = {
                "groups": len(self.study.groups),
                "votes": sum(vote.kind == "measured" for vote in votes),
                "scales": SCALES,
                "models": {
                    model: {name: asdict(value) for name, value in own.items()} for model, own in summary.items()
                },
                "evaluators": [asdict(report) for report in report_evaluators(votes)],
            }
            self._counted = (len(votes), content)
        return self._counted[1]

    async def _evaluator(self, fields: Mapping[str, Any]) -> Evaluator:
        return await self._slowed(partial(self.ballots.evaluator, _text(fields, "name"), code=_text(fields, "code")))

    async def _slowed(self, who: "partial[Evaluator]") -> Evaluator:
        """Who asks; a wrong code takes a while, so that nobody tries many."""
        try:
            return await asyncio.to_thread(who)
        except RefusedError as error:
            if error.status == 401:
                await asyncio.sleep(WRONG_CODE_SECONDS)
            raise

    def _pictures(self, ballot: Ballot) -> list[str]:
        """PNGs in base64, in the order of the ballot."""
        return [base64.b64encode(self.study.picture(ballot.group, model)).decode() for model in ballot.models]


def _plain(evaluator: Evaluator) -> dict[str, Any]:
    return {"name": evaluator.name, "code": evaluator.code, "done": evaluator.done, "total": evaluator.total}


def _text(fields: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise RefusedError(422, f"{name}={shown(value)}: give a text")
    return value


def _scores(fields: Mapping[str, Any], *, number: int) -> Sequence[Mapping[str, int]]:
    """`[{"overall": 7, "clarity": 4, "texture": 3, "relevance": 5}, ...]`, one for each picture in its order."""
    scores = fields.get("scores")
    if not isinstance(scores, list) or len(scores) != number or not all(isinstance(own, dict) for own in scores):
        raise RefusedError(422, f"scores={shown(scores)}: give one object for each of the {number} pictures")
    for own in scores:
        unknown = next((name for name in own if name not in SCALES), None)
        if unknown is not None:
            raise RefusedError(422, f"{shown(unknown)} is no scale; there are {', '.join(SCALES)}")
    return [
        {name: whole_number(own, name, lowest=1, highest=highest) for name, highest in SCALES.items()} for own in scores
    ]
