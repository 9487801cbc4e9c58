import pytest

from cogview.records.robots import parse_robots, product_token, tag_forbids_training


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
        (["unavailable_after: 25 Jun 2010 15:00:00 PST"], False),
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
