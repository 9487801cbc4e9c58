"""One web page in; out come its images with the words that belong to them, and its links.

A caption is what people wrote for the picture: the alternative text and the caption of the figure around it. Where the
caller asks for more, also its title, and the words around it: news pages say there what their pictures show.
"""

import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from selectolax.lexbor import LexborHTMLParser, LexborNode

from cogview.records.captions import clean_captions
from cogview.records.robots import tag_forbids_training
from cogview.records.urls import normalise_url

MAX_CAPTIONS = 16
MAX_UNZIPPED = 20 * 2**20  # sitemaps.org allows 50 MB; those that come near it are split in practice
Words = Literal["alt", "figcaption", "title", "surrounding", "page"]
DEFAULT_WORDS: tuple[Words, ...] = ("alt", "figcaption", "page")  # page: og: tags and title, for its own picture
_MAX_SURROUNDING = 300  # characters
_MAX_RISE = 4  # elements around a picture
_UNREAD_TYPES = frozenset({"image/avif", "image/jxl", "image/svg+xml", "image/heic"})
_CHARSET = re.compile(r"charset=[\"']?([\w.:-]+)", re.IGNORECASE)
_SRCSET_ITEM = re.compile(r"(\S*[^\s,])(?:\s+([\d.]+)([wx]))?\s*(?:,|$)")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".svg", ".ico", ".bmp", ".css", ".js", ".zip", ".pdf")


@dataclass(frozen=True, kw_only=True)
class PageImage:
    """An image's normalised URL and its captions; none if nobody wrote one."""

    url: str
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a page offers. links: normalised, in the order of the page, without repetitions.

    refuses: the page asks not to be used for training, so it has no images here.
    """

    images: tuple[PageImage, ...] = ()
    links: tuple[str, ...] = ()
    refuses: bool = False


def read_page(
    body: bytes, *, url: str, content_type: str = "", product: str = "", words: Collection[Words] = DEFAULT_WORDS
) -> Page:
    """Read an HTML page or a sitemap, gzipped or not, that came from `url`. Broken markup gives what can be made out.

    words: where captions may come from.
    """
    body = _unzipped(body)
    tree = LexborHTMLParser(_decode(body, content_type))
    if tree.css_first("urlset > url > loc, sitemapindex > sitemap > loc") is not None:
        return Page(links=_links((node.text() for node in tree.css("loc")), base=url))
    robots = [value for name, value in _metas(tree) if name == "robots" or (product and name == product.lower())]
    base = _base(tree, url)
    follow = not any("nofollow" in value.lower() or value.lower().strip() == "none" for value in robots)
    anchors = tree.css("a[href], area[href]") if follow else []
    links = _links(
        (_attribute(node, "href") for node in anchors if "nofollow" not in _attribute(node, "rel")), base=base
    )
    reserved = any(name == "tdm-reservation" and value.strip() == "1" for name, value in _metas(tree))
    if reserved or tag_forbids_training(robots, product=product):
        return Page(links=links, refuses=True)
    return Page(images=_images(tree, base, words), links=links)


def _images(tree: LexborHTMLParser, base: str, words: Collection[Words]) -> tuple[PageImage, ...]:
    found: dict[str, tuple[str, ...]] = {}
    for node in tree.css("img"):
        url = normalise_url(_best_source(node), base=base)
        if isinstance(url, str):
            captions = clean_captions(_words_of(node, words))
            found[url] = tuple(dict.fromkeys((*found.get(url, ()), *captions)))[:MAX_CAPTIONS]
    if "page" in words and not any(found.values()):
        found.update(_shared_image(tree, base))
    return tuple(PageImage(url=url, captions=captions) for url, captions in found.items())


def _words_of(node: LexborNode, words: Collection[Words]) -> Iterator[str]:
    """The captions of a picture from the places that are asked for; the words around it only where it has no other."""
    places: dict[Words, Callable[[], Iterable[str]]] = {
        "alt": lambda: [_attribute(node, "alt")],
        "figcaption": lambda: _figure_captions(node),
        "title": lambda: [_attribute(node, "title")],
    }
    has_own = False
    for place, texts in places.items():
        for text in texts() if place in words else ():
            has_own = has_own or bool(text.strip())
            yield text
    if "surrounding" in words and not has_own:
        yield _surrounding(node)


def _surrounding(node: LexborNode) -> str:
    """The text of the smallest part of the page around a picture that has any, if it is short enough to be about it."""
    parent = node.parent
    for _ in range(_MAX_RISE):
        if parent is None or parent.tag in ("body", "html", "main"):
            return ""
        text = " ".join(parent.text(separator=" ").split())
        if text:
            return text if len(text) <= _MAX_SURROUNDING else ""
        parent = parent.parent
    return ""


def _shared_image(tree: LexborHTMLParser, base: str) -> dict[str, tuple[str, ...]]:
    """The picture that a page without captions of its own gives to those who share it, with the page's title."""
    metas = dict(reversed(_metas(tree)))  # the first of a name counts
    url = normalise_url(metas.get("og:image", ""), base=base)
    if not isinstance(url, str):
        return {}
    title = tree.css_first("title")
    texts = (metas.get("og:image:alt"), metas.get("og:title"), title.text() if title is not None else None)
    captions = clean_captions(texts)[:1]
    return {url: captions} if captions else {}


def _best_source(node: LexborNode) -> str:
    """The largest of what srcset offers, here or in the picture around it, else src, else what lazy loaders keep."""
    sets = [_attribute(node, "srcset") or _attribute(node, "data-srcset"), *_sources_of_picture(node)]
    offers = [
        (float(size or 1.0), unit or "x", address)
        for offered in sets
        for address, size, unit in _SRCSET_ITEM.findall(offered)
        if size.count(".") <= 1 and size != "."
    ]
    widths = [offer for offer in offers if offer[1] == "w"]
    if offers:
        best: tuple[float, str, str] = max(widths or offers, key=lambda offer: offer[0])
        return best[2]
    source = _attribute(node, "src")
    lazy = _attribute(node, "data-src")
    return lazy if lazy and (not source or source.startswith("data:")) else source


def _sources_of_picture(node: LexborNode) -> list[str]:
    """What the <source> elements of a <picture> offer in a format that is read here."""
    picture = node.parent
    if picture is None or picture.tag != "picture":
        return []
    sources = [source for source in picture.css("source") if _attribute(source, "type").lower() not in _UNREAD_TYPES]
    return [_attribute(source, "srcset") for source in sources]


def _figure_captions(node: LexborNode) -> list[str]:
    parent = node.parent
    while parent is not None:
        if parent.tag == "figure":
            return [caption.text() for caption in parent.css("figcaption")]
        parent = parent.parent
    return []


def _links(addresses: Iterable[str], *, base: str) -> tuple[str, ...]:
    urls = (normalise_url(address, base=base) for address in addresses)
    pages = (url for url in urls if isinstance(url, str) and not url.lower().endswith(_IMAGE_SUFFIXES))
    return tuple(dict.fromkeys(pages))


def _metas(tree: LexborHTMLParser) -> list[tuple[str, str]]:
    return [
        ((_attribute(node, "name") or _attribute(node, "property")).strip().lower(), _attribute(node, "content"))
        for node in tree.css("meta")
    ]


def _base(tree: LexborHTMLParser, url: str) -> str:
    node = tree.css_first("base[href]")
    base = normalise_url(_attribute(node, "href"), base=url) if node is not None else url
    return base if isinstance(base, str) else url


def _attribute(node: LexborNode, name: str) -> str:
    return node.attributes.get(name) or ""


def _unzipped(body: bytes) -> bytes:
    """A gzipped file, as sitemaps are served, unpacked up to MAX_UNZIPPED bytes; anything else as it is."""
    if not body.startswith(b"\x1f\x8b"):
        return body
    try:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(body, MAX_UNZIPPED)
    except zlib.error:
        return b""


def _decode(body: bytes, content_type: str) -> str:
    """Text of a page: the charset of its header, else of its first kilobyte, else UTF-8."""
    match = _CHARSET.search(content_type) or _CHARSET.search(body[:1024].decode("latin-1"))
    try:
        return body.decode(match.group(1) if match else "utf-8-sig", errors="replace")
    except LookupError:
        return body.decode("utf-8-sig", errors="replace")
