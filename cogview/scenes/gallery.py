"""What the demo site holds: its links, its pages, its images, and the dirt among them.

In: a `SiteConfig`. Out: a `Gallery`, which answers any path with a `Response`, the same for the same config. No network
here; `site.py` serves it. The paper's pairs come from the web (section 2.4), and a crawl of the web meets dead links,
broken files and empty captions, so this web has a fixed number of each.
"""

import html
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Literal, NamedTuple, get_args

from PIL import Image

from cogview.errors import ConfigError
from cogview.scenes.scene import CaptionedScene, corpus, draw_scene

LinkKind = Literal[
    "scene",  # a PNG with both captions
    "missing",  # 404
    "moved",  # 302 to an image that nothing else links to
    "duplicate",  # the bytes and captions of a scene under another URL
    "truncated",  # the first 60 % of a JPEG
    "html",  # a web page that calls itself image/jpeg
    "icon",  # 8x8 pixels
    "uncaptioned",  # a scene whose alt text and caption are empty
    "disallowed",  # below /private/, which robots.txt disallows; served all the same to whoever asks
    "blank",  # one flat colour
    "flaky",  # 500 on the first request, then a scene
    "slow",  # a scene after SLOW_SECONDS
]
LINK_KINDS: tuple[LinkKind, ...] = get_args(LinkKind)

DIRT: dict[LinkKind, int] = {
    "missing": 12,
    "moved": 6,
    "duplicate": 8,
    "truncated": 4,
    "html": 4,
    "icon": 4,
    "uncaptioned": 4,
    "disallowed": 5,
    "blank": 3,
    "flaky": 1,
    "slow": 1,
}
SLOW_SECONDS = 0.5
ICON_SIDE = 8

PATHS: dict[LinkKind, str] = {
    "scene": "/images/{:06d}.png",
    "missing": "/images/lost-{:03d}.png",
    "moved": "/images/old-{:03d}.png",
    "duplicate": "/mirror/{:03d}.png",
    "truncated": "/images/cut-{:03d}.jpg",
    "html": "/images/denied-{:03d}.jpg",
    "icon": "/icons/{:03d}.png",
    "uncaptioned": "/images/untitled-{:03d}.png",
    "disallowed": "/private/{:03d}.png",
    "blank": "/images/blank-{:03d}.png",
    "flaky": "/images/flaky-{:03d}.png",
    "slow": "/images/slow-{:03d}.png",
}
MOVED_TARGET = "/images/new-{:03d}.png"


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """The demo site: `num_scenes` clean pairs, `images_per_page` figures a page, dirt on top (`DIRT`)."""

    seed: int = 0
    num_scenes: int = 1000
    images_per_page: int = 50
    image_size: int = 64
    two_shape_share: float = 0.25

    def __post_init__(self) -> None:
        if self.num_scenes < max(DIRT.values()):
            raise ConfigError(f"num_scenes={self.num_scenes} is too few for the site; use {max(DIRT.values())} or more")
        if self.images_per_page < 1:
            raise ConfigError(f"images_per_page={self.images_per_page} leaves the pages empty; use 1 or more")
        if self.image_size < ICON_SIDE:
            raise ConfigError(f"image_size={self.image_size} is below {ICON_SIDE}; use 64, or at least {ICON_SIDE}")
        if not 0.0 <= self.two_shape_share <= 1.0:
            raise ConfigError(f"two_shape_share={self.two_shape_share} is not a share; use a number from 0 to 1")

    @property
    def num_links(self) -> int:
        """Figures on all pages together."""
        return self.num_scenes + sum(DIRT.values())

    @property
    def num_pages(self) -> int:
        """Gallery pages; the last one may be shorter."""
        return -(-self.num_links // self.images_per_page)


class Link(NamedTuple):
    """One figure: the image path, what it leads to, its scene, and the captions it carries."""

    path: str
    kind: LinkKind
    ordinal: int  # its number within the kind
    row: CaptionedScene
    alt: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a path answers; `location` is set for a redirect, `delay` in seconds comes first."""

    status: HTTPStatus
    content_type: str
    body: bytes
    location: str = ""
    delay: float = 0.0


def expected_outcomes(config: SiteConfig) -> dict[str, int]:
    """How many image URLs of each kind the pages link to, every URL once: `LinkKind` -> number."""
    return {kind: config.num_scenes if kind == "scene" else DIRT[kind] for kind in LINK_KINDS}


class Gallery:
    """The content of the site. Images are drawn when asked for, so memory holds the captions alone."""

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self.links = _links(config)
        self._by_path = {link.path: link for link in self.links}
        self._moved = {MOVED_TARGET.format(link.ordinal): link for link in self.links if link.kind == "moved"}
        self._pages = {path: number for number, path in enumerate(self.page_paths())}

    def page_paths(self) -> list[str]:
        """The paths of all gallery pages, in order."""
        return [_page_path(number) for number in range(self.config.num_pages)]

    def respond(self, path: str, *, visit: int, root: str) -> Response:
        """Answer a path on its `visit`-th request, from 1; `root` is the address of the site for absolute URLs."""
        if path in self._by_path:
            link = self._by_path[path]
            return _failure(link, visit=visit) or self._image(link)
        if path in self._moved:
            return _png(draw_scene(self._moved[path].row.scene, image_size=self.config.image_size))
        return self._document(path, root=root) or NOT_FOUND

    def _image(self, link: Link) -> Response:
        if link.kind in PLAIN_IMAGES:
            return _png(PLAIN_IMAGES[link.kind](link.ordinal, self.config.image_size))
        image = draw_scene(link.row.scene, image_size=self.config.image_size)
        if link.kind == "truncated":
            whole = _encoded(image, "JPEG")
            return Response(status=HTTPStatus.OK, content_type="image/jpeg", body=whole[: len(whole) * 6 // 10])
        return _png(image, delay=SLOW_SECONDS if link.kind == "slow" else 0.0)

    def _document(self, path: str, *, root: str) -> Response | None:
        if path in self._pages:
            return _html(self._page(self._pages[path]))
        if path in ("/", "/index.html"):
            return _html(self._index())
        if path == "/robots.txt":
            return _text(f"User-agent: *\nDisallow: /private/\n\nSitemap: {root}/sitemap.xml\n")
        return self._sitemap(root) if path == "/sitemap.xml" else None

    def _index(self) -> bytes:
        items = "".join(f'<li><a href="{path}">Gallery {i}</a></li>\n' for i, path in enumerate(self.page_paths()))
        return _document("Scenes", f"<h1>Scenes</h1>\n<ul>\n{items}</ul>\n")

    def _page(self, number: int) -> bytes:
        start = number * self.config.images_per_page
        figures = "".join(
            _figure(link, side=self.config.image_size) for link in self.links[start:][: self.config.images_per_page]
        )
        neighbours = [n for n in (number - 1, number + 1) if 0 <= n < self.config.num_pages]
        ways = " ".join(f'<a href="{_page_path(n)}">Gallery {n}</a>' for n in neighbours)
        body = f'<h1>Gallery {number}</h1>\n{figures}<nav><a href="/">Index</a> {ways}</nav>\n'
        return _document(f"Gallery {number}", body)

    def _sitemap(self, root: str) -> Response:
        urls = "".join(f"<url><loc>{root}{path}</loc></url>\n" for path in ["/", *self.page_paths()])
        body = f"{XML_HEAD}\n{urls}</urlset>\n".encode()
        return Response(status=HTTPStatus.OK, content_type="application/xml", body=body)


# --- links


def _links(config: SiteConfig) -> list[Link]:
    """All figures in page order: the scenes in the order of the corpus, with the dirt at places drawn by the seed."""
    rows = list(corpus(config.seed, config.num_links, two_shape_share=config.two_shape_share))
    scenes = [_link("scene", ordinal=row.number, row=row) for row in rows[: config.num_scenes]]
    spare = iter(rows[config.num_scenes :])
    dirt = []
    for kind, number in DIRT.items():
        for ordinal in range(number):
            row = next(spare)
            dirt.append(_link(kind, ordinal=ordinal, row=rows[ordinal] if kind == "duplicate" else row))
    rng = random.Random(f"site:{config.seed}")
    rng.shuffle(dirt)
    dirt_places = set(rng.sample(range(config.num_links), len(dirt)))
    from_scenes, from_dirt = iter(scenes), iter(dirt)
    return [next(from_dirt) if place in dirt_places else next(from_scenes) for place in range(config.num_links)]


def _link(kind: LinkKind, *, ordinal: int, row: CaptionedScene) -> Link:
    alt, caption = row.english, row.chinese
    if kind == "uncaptioned":
        alt, caption = "", ""
    elif kind in PLAIN_IMAGES:
        alt, caption = f"{kind} {ordinal}", f"图 {ordinal}"
    return Link(path=PATHS[kind].format(ordinal), kind=kind, ordinal=ordinal, row=row, alt=alt, caption=caption)


# --- pages


XML_HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">'


def _page_path(number: int) -> str:
    return f"/gallery/{number:03d}.html"


def _figure(link: Link, *, side: int) -> str:
    image = f'<img src="{link.path}" alt="{html.escape(link.alt)}" width="{side}" height="{side}">'
    return f'<figure>{image}<figcaption lang="zh">{html.escape(link.caption)}</figcaption></figure>\n'


def _document(title: str, body: str) -> bytes:
    head = f'<meta charset="utf-8">\n<title>{title}</title>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}</body>\n</html>\n'.encode()


# --- bodies


def _failure(link: Link, *, visit: int) -> Response | None:
    """What a link answers in place of an image; None if it has one to show."""
    if link.kind == "missing":
        return NOT_FOUND
    if link.kind == "moved":
        target = MOVED_TARGET.format(link.ordinal)
        return Response(status=HTTPStatus.FOUND, content_type="text/plain", body=b"", location=target)
    if link.kind == "html":
        page = _document("Denied", "<p>Please sign in.</p>\n")
        return Response(status=HTTPStatus.OK, content_type="image/jpeg", body=page)
    if link.kind == "flaky" and visit == 1:
        return _text("try again\n", status=HTTPStatus.INTERNAL_SERVER_ERROR)
    return None


def _icon(ordinal: int, side: int) -> Image.Image:
    """An icon is 8x8 however large the scenes (`side`) are."""
    return Image.new("RGB", (ICON_SIDE, ICON_SIDE), (60 * ordinal % 256, 90, 140))


def _blank(ordinal: int, side: int) -> Image.Image:
    return Image.new("RGB", (side, side), (250 - ordinal, 250, 250))


PLAIN_IMAGES: dict[LinkKind, Callable[[int, int], Image.Image]] = {"icon": _icon, "blank": _blank}


def _encoded(image: Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


def _png(image: Image.Image, *, delay: float = 0.0) -> Response:
    return Response(status=HTTPStatus.OK, content_type="image/png", body=_encoded(image, "PNG"), delay=delay)


def _html(body: bytes) -> Response:
    return Response(status=HTTPStatus.OK, content_type="text/html; charset=utf-8", body=body)


def _text(text: str, *, status: HTTPStatus = HTTPStatus.OK) -> Response:
    return Response(status=status, content_type="text/plain; charset=utf-8", body=text.encode())


NOT_FOUND = _text("not found\n", status=HTTPStatus.NOT_FOUND)
