"""The demo site, asked over real HTTP: every link is classified by what a client sees, never by its name."""

import hashlib
import http.client
import io
import time
import urllib.robotparser
import xml.etree.ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from cogview.errors import ConfigError
from cogview.scenes.gallery import SLOW_SECONDS
from cogview.scenes.reading import compare, read_scene
from cogview.scenes.scene import corpus
from cogview.scenes.site import DIRT, DemoSite, SiteConfig, expected_outcomes

CONFIG = SiteConfig(seed=3, num_scenes=130, images_per_page=50)


class PageParser(HTMLParser):
    def __init__(self):
        super().__init__()
        self.hrefs, self.figures = [], []
        self._in_caption = False

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag == "a":
            self.hrefs.append(attributes["href"])
        elif tag == "img":
            self.figures.append([attributes["src"], attributes["alt"], ""])
        elif tag == "figcaption":
            self._in_caption = True

    def handle_endtag(self, tag):
        if tag == "figcaption":
            self._in_caption = False

    def handle_data(self, data):
        if self._in_caption:
            self.figures[-1][2] += data


@dataclass
class Answer:
    status: int
    content_type: str
    location: str | None
    body: bytes
    seconds: float


class Client:
    """One keep-alive connection."""

    def __init__(self, url):
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)

    def get(self, path, *, method="GET"):
        start = time.monotonic()
        self._connection.request(method, path)
        response = self._connection.getresponse()
        body = response.read()
        headers = response.headers
        seconds = time.monotonic() - start
        return Answer(response.status, headers["Content-Type"], headers["Location"], body, seconds)

    def close(self):
        self._connection.close()

    def page(self, path):
        answer = self.get(path)
        assert (answer.status, answer.content_type) == (200, "text/html; charset=utf-8")
        parser = PageParser()
        parser.feed(answer.body.decode())
        return parser


@pytest.fixture
def site():
    with DemoSite(CONFIG) as running:
        yield running


@pytest.fixture
def client(site):
    connection = Client(site.url)
    yield connection
    connection.close()


def all_figures(client):
    pages = [href for href in client.page("/").hrefs if href.startswith("/gallery/")]
    return [figure for page in pages for figure in client.page(page).figures]


def robots(client):
    rules = urllib.robotparser.RobotFileParser()
    rules.parse(client.get("/robots.txt").body.decode().splitlines())
    return rules


def decoded(body):
    """The image, or None if the bytes are none or not a whole one."""
    try:
        with Image.open(io.BytesIO(body)) as image:
            return image.convert("RGB")
    except OSError:
        return None


def test_index_leads_to_every_figure_page_by_page(site, client):
    pages = [href for href in client.page("/").hrefs if href.startswith("/gallery/")]
    sizes = [len(client.page(page).figures) for page in pages]
    assert len(pages) == CONFIG.num_pages
    assert sizes[:-1] == [50] * (len(pages) - 1)
    assert sum(sizes) == CONFIG.num_links == sum(expected_outcomes(CONFIG).values())


def test_pages_link_to_their_neighbours(client):
    assert client.page("/gallery/001.html").hrefs == ["/", "/gallery/000.html", "/gallery/002.html"]


def test_every_figure_has_a_path_of_its_own(client):
    paths = [path for path, _, _ in all_figures(client)]
    assert len(set(paths)) == len(paths)


def test_robots_disallows_private_alone_and_asks_for_no_delay(site, client):
    rules = robots(client)
    assert not rules.can_fetch("anyone", site.url + "/private/000.png")
    assert rules.can_fetch("anyone", site.url + "/images/000000.png")
    assert rules.crawl_delay("anyone") is None
    assert rules.site_maps() == [site.url + "/sitemap.xml"]


def test_sitemap_lists_the_pages(site, client):
    tree = xml.etree.ElementTree.fromstring(client.get("/sitemap.xml").body)
    urls = [element.text for element in tree.iter("{http://www.sitemaps.org/schemas/sitemap/0.9}loc")]
    assert urls[0] == site.url + "/"
    assert len(urls) == 1 + CONFIG.num_pages
    assert all(client.get(url.removeprefix(site.url)).status == 200 for url in urls)


def classify(client, figure, *, rules, seen):
    """What a client makes of a link; `seen` holds the digests of the images so far."""
    path, alt, caption = figure
    if not rules.can_fetch("anyone", path):
        return "disallowed"
    answer = client.get(path)
    if answer.status == 500:
        assert decoded(client.get(path).body) is not None
        return "flaky"
    if answer.status == 404:
        return "missing"
    if answer.status == 302:
        target = client.get(answer.location)
        assert (target.status, decoded(target.body).size) == (200, (64, 64))
        return "moved"
    image = decoded(answer.body)
    if image is None:
        assert answer.content_type == "image/jpeg"
        return "html" if answer.body.startswith(b"<!doctype html>") else "truncated"
    digest = hashlib.sha256(answer.body).digest()
    if digest in seen:
        return "duplicate"
    seen.add(digest)
    return classify_image(image, answer, texts=(alt, caption))


def classify_image(image, answer, *, texts):
    if image.size == (8, 8):
        return "icon"
    if np.asarray(image).std(axis=(0, 1)).max() < 2:
        return "blank"
    if texts == ("", ""):
        return "uncaptioned"
    return "slow" if answer.seconds >= SLOW_SECONDS else "scene"


def test_outcomes_seen_over_http_are_exactly_the_expected(client):
    rules, seen = robots(client), set()
    outcomes = Counter(classify(client, figure, rules=rules, seen=seen) for figure in all_figures(client))
    assert outcomes == expected_outcomes(CONFIG)


def test_dirt_is_mixed_among_the_scenes(client):
    paths = [path for path, _, _ in all_figures(client)]
    places = [place for place, path in enumerate(paths) if not path.startswith("/images/0")]
    assert len(places) == sum(DIRT.values())
    halves = Counter(place < len(paths) // 2 for place in places)
    assert min(halves[True], halves[False]) > len(places) // 4


def test_scenes_carry_their_captions_and_show_what_these_say(client):
    rows = list(corpus(CONFIG.seed, CONFIG.num_scenes, two_shape_share=CONFIG.two_shape_share))
    captions = {path: (alt, caption) for path, alt, caption in all_figures(client)}
    for row in rows:
        path = f"/images/{row.number:06d}.png"
        assert captions[path] == (row.english, row.chinese)
        scores = compare(row.scene, read_scene(decoded(client.get(path).body)))
        assert set(scores.values()) == {1.0}, (row, scores)


def test_requests_are_counted_by_path(site, client):
    assert site.requests.total == 0
    client.get("/")
    client.get("/images/000001.png?size=large")
    client.get("/images/000001.png")
    assert site.requests.total == 3
    assert site.requests.paths == {"/": 1, "/images/000001.png": 2}


def test_unknown_paths_are_not_found(client):
    for path in ("/nothing", "/gallery/999.html", "/gallery/0.html", "/gallery/../robots.txt", "/images/999999.png"):
        assert client.get(path).status == 404


def test_head_answers_without_a_body(client):
    answer = client.get("/images/000001.png", method="HEAD")
    assert (answer.status, answer.content_type, answer.body) == (200, "image/png", b"")
    assert client.get("/images/000001.png").status == 200


def test_the_same_config_serves_the_same_bytes():
    bodies = []
    for _ in range(2):
        with DemoSite(CONFIG) as site:
            client = Client(site.url)
            bodies.append([client.get(path).body for path in ("/gallery/001.html", "/images/000007.png")])
            client.close()
    assert bodies[0] == bodies[1]


def test_many_connections_are_served_at_once(site):
    def fetch(part):
        client = Client(site.url)
        statuses = [client.get(f"/images/{number:06d}.png").status for number in range(part, 130, 16)]
        client.close()
        return statuses

    with ThreadPoolExecutor(16) as pool:
        statuses = [status for part in pool.map(fetch, range(16)) for status in part]
    assert statuses == [200] * 130
    assert site.requests.total == 130


def test_a_given_port_is_kept_and_free_again_afterwards():
    with DemoSite(CONFIG) as first:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=f"port={port}"), DemoSite(CONFIG, port=port):
            pass
    with DemoSite(CONFIG, port=port) as again:
        assert again.url == first.url
        assert Client(again.url).get("/").status == 200


def test_leaving_the_block_ends_open_connections():
    with DemoSite(CONFIG) as site:
        client = Client(site.url)
        assert client.get("/").status == 200
    with pytest.raises((http.client.HTTPException, OSError)):
        client.get("/")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"num_scenes": 2}, "num_scenes=2"),
        ({"images_per_page": 0}, "images_per_page=0"),
        ({"image_size": 4}, "image_size=4"),
        ({"two_shape_share": -0.1}, "two_shape_share=-0.1"),
    ],
)
def test_configs_that_cannot_work_are_named(settings, key):
    with pytest.raises(ConfigError, match=key):
        SiteConfig(**settings)
