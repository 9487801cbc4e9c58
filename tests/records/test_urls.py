import pytest

from benchmarks.hostile.web import INSIDE, INSIDE_REASONS
from cogview.errors import ConfigError
from cogview.records.pair import Unusable
from cogview.records.urls import AddressPolicy, is_public_address, normalise_url, refuse_url

PRIVATE_URLS = [url for url in INSIDE if ".lies.test" not in url]  # those need a name server that lies


@pytest.mark.parametrize("url", PRIVATE_URLS)
def test_no_spelling_of_an_inside_address_is_let_through(url: str) -> None:
    normalised = normalise_url(url)
    if isinstance(normalised, Unusable):
        assert normalised.reason in INSIDE_REASONS
        return
    refused = refuse_url(normalised, AddressPolicy(ports=(80, 443, 8265)))
    assert refused is not None
    assert refused.reason == "address_refused"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "url_empty"),
        ("   ", "url_empty"),
        ("file:///etc/passwd", "scheme_refused"),
        ("ftp://example.org/", "scheme_refused"),
        ("gopher://example.org/", "scheme_refused"),
        ("data:image/png;base64,AAAA", "scheme_refused"),
        ("javascript:alert(1)", "scheme_refused"),
        ("s3://bucket/key", "scheme_refused"),
        ("no scheme at all", "scheme_refused"),
        ("http://good.com@127.0.0.1/", "userinfo_refused"),
        ("http://user:pass@example.org/", "userinfo_refused"),
        ("http://good.com\\@127.0.0.1/", "url_invalid"),
        ("http://exa\tmple.org/", "url_invalid"),
        ("http://example.org/\r\nHost: evil", "url_invalid"),
        ("http://example.org/\x00", "url_invalid"),
        ("http://example.org:99999/", "url_invalid"),
        ("http://example.org:0/", "url_invalid"),
        ("http://[fe80::1%25eth0]/", "url_invalid"),
        ("http://[::1/", "url_invalid"),
        ("http:///path", "url_invalid"),
        ("http://ex ample.org/", "url_invalid"),
        ("http://" + "a" * 70_000, "url_too_long"),
    ],
)
def test_a_bad_url_is_a_reason(url: str, reason: str) -> None:
    answer = normalise_url(url)
    assert isinstance(answer, Unusable)
    assert answer.reason == reason


@pytest.mark.parametrize(
    ("url", "normalised"),
    [
        ("HTTP://Example.ORG", "http://example.org/"),
        ("http://example.org:80/a#part", "http://example.org/a"),
        ("https://example.org:443/?q=a b", "https://example.org/?q=a%20b"),
        ("http://example.org:8080/", "http://example.org:8080/"),
        ("http://bücher.example/ä", "http://xn--bcher-kva.example/%C3%A4"),
        ("http://example.org./x", "http://example.org/x"),
        ("http://example.org/%20?i10c\\x3d", "http://example.org/%20?i10c%5Cx3d"),
        ("http://127.0.0.1#@good.com", "http://127.0.0.1/"),
    ],
)
def test_a_url_has_one_spelling(url: str, normalised: str) -> None:
    assert normalise_url(url) == normalised
    assert normalise_url(normalised) == normalised


def test_links_are_joined_with_their_page() -> None:
    assert normalise_url("../b.png", base="http://example.org/x/y/") == "http://example.org/x/b.png"
    assert normalise_url("//cdn.example.org/b.png", base="https://example.org/") == "https://cdn.example.org/b.png"


def test_only_web_ports_are_asked() -> None:
    policy = AddressPolicy()
    assert refuse_url("http://example.org:22/", policy) == Unusable("port_refused", "22")
    assert refuse_url("http://example.org:6379/", policy) == Unusable("port_refused", "6379")
    assert refuse_url("https://example.org/", policy) is None
    assert refuse_url("http://8.8.8.8/", policy) is None


def test_a_name_that_is_given_an_address_is_allowed_by_name_alone() -> None:
    policy = AddressPolicy(resolve={"demo.test:80": "127.0.0.1:4321"})
    assert refuse_url("http://demo.test/", policy) is None
    assert policy.override("demo.test", 80) == ("127.0.0.1", 4321)
    for other in ("http://127.0.0.1:4321/", "http://127.0.0.1/", "http://demo.test:8080/"):
        assert refuse_url(other, policy) is not None
    with pytest.raises(ConfigError, match="name:port"):
        AddressPolicy(resolve={"demo.test": "127.0.0.1"})


def test_public_addresses_are_public() -> None:
    for address in ("8.8.8.8", "93.184.216.34", "2606:4700::1111"):
        assert is_public_address(address)
    for address in ("", "example.org", "fe80::1%eth0", "127.0.0.1"):
        assert not is_public_address(address)
