"""The benchmark of killed servers: what it would notice."""

import json

from benchmarks.human_evaluation import Page, compare, said

SCORES = {"overall": 9, "clarity": 5, "texture": 4, "relevance": 5}
OTHER = {**SCORES, "overall": 2}


def vote(place=0, best=0, scores=(SCORES, OTHER)):
    return {"name": "Ada", "code": "x", "place": place, "best": best, "scores": list(scores), "seconds": 1}


def page(*bodies, sent=None):
    words = [json.dumps(body) for body in bodies]
    return Page(acknowledged=words, sent=[json.dumps(body) for body in sent or bodies])


STORED = {("Ada", 0): [said(vote(0))], ("Ada", 1): [said(vote(1))]}
FAULTS = ("votes/lost", "votes/doubled", "votes/different", "votes/beyond those sent")


def faults(pages, stored):
    figures = compare(pages, stored)
    return tuple(figures[name] for name in FAULTS)


def test_what_was_acknowledged_and_is_there_once_is_right():
    assert faults([page(vote(0), vote(1))], STORED) == (0, 0, 0, 0)
    assert compare([page(vote(0), vote(1), sent=[vote(0), vote(0), vote(1)])], STORED)["votes/sent more than once"] == 1


def test_the_order_in_which_pictures_were_shown_does_not_matter():
    assert said(vote(scores=(OTHER, SCORES), best=1)) == said(vote(scores=(SCORES, OTHER), best=0))


def test_every_fault_is_counted():
    assert faults([page(vote(0), vote(1), vote(2))], STORED) == (1, 0, 0, 0)
    assert faults([page(vote(0), vote(1))], {**STORED, ("Ada", 0): [said(vote(0))] * 2}) == (0, 1, 0, 0)
    assert faults([page(vote(0), vote(1, best=1))], STORED) == (0, 0, 1, 0)
    assert faults([page(vote(0))], STORED) == (0, 0, 0, 1)
