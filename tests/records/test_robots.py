import pytest

from cogview.records.robots import parse_reservations, parse_robots, product_token, tag_forbids_training


@pytest.mark.parametrize(
    ("values", "forbidden"),
    [
        ([], False),
        (["all"], False),
        (["nofollow, nosnippet"], False),
        (["noai"], True),
        (["nofollow", "NoImageAI"], True),
        (["noindex"], True),
        (["none"], True),
        (["TestBot: noindex"], True),
        (["otherbot: noindex"], False),
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], True),
        (["unavailable_after: Fri, 25 Jun 2100 15:00:00 GMT"], False),
        (["unavailable_after: some day"], False),
        (["noai, max-image-preview:large"], True),
        (["max-image-preview: none"], False),
        (["otherbot: noindex, noai, testbot: nofollow"], False),
        (["otherbot: nofollow, testbot: nofollow, noai"], True),
        (["noai, otherbot: nofollow"], True),
    ],
)
def test_robots_tags(values: list[str], forbidden: bool) -> None:
    assert tag_forbids_training(values, product="TestBot") == forbidden


def test_rules_know_their_delay_and_product() -> None:
    assert product_token("TestBot/1.0 (+https://example.org)") == "TestBot"
    rules = parse_robots(b"User-agent: testbot\nCrawl-delay: 3\nDisallow: /x\n", product="TestBot")
    assert rules.crawl_delay == 3.0
    assert not rules.allows("http://a.test/x/y")
    assert rules.allows("http://a.test/y")
    assert parse_robots(b"", product="TestBot").crawl_delay == 0.0


def test_the_first_reservation_that_matches_decides() -> None:
    rules = parse_reservations(
        b'[{"location": "/free/*.png$", "tdm-reservation": 0}, {"location": "/free", "tdm-reservation": 1},'
        b' {"location": "photos/", "tdm-reservation": 1}, 7, {"location": 3},'
        b' {"location": "/q?x=*", "tdm-reservation": "1"}]'
    )
    reserved = ["/free/a.jpg", "/free/a.png?x", "/photos/", "/photos/x/y.jpg", "/q?x=1"]
    allowed = ["/free/a.png", "/free/b/a.png", "/", "/photo", "/q?y=1"]
    assert [path for path in reserved + allowed if rules.reserves(f"http://a.test{path}")] == reserved


@pytest.mark.parametrize("body", [b"", b"<html>", b"[" * 100_000, b'{"a": 1}', b"null", b"[[1]]", b"\xff\xfe"])
def test_a_file_that_is_no_tdmrep_reserves_nothing(body: bytes) -> None:
    assert not parse_reservations(body).reserves("http://a.test/")


def test_one_rule_may_stand_for_the_site() -> None:
    assert parse_reservations(b'{"location": "/", "tdm-reservation": 1}').reserves("http://a.test/x.jpg")
    pattern = b'[{"location": "http://a.test/x/", "tdm-reservation": 1}]'
    assert parse_reservations(pattern).reserves("http://a.test/x/y")
