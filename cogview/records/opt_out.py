"""Lists of those who want to be left out: URLs, domains and sha256 of images, one to a line.

A line is `https://example.org/a.jpg`, `example.org` (with everything below it; `*.example.org` is the same) or a sha256
of 64 hex digits (`sha256:` before it is allowed), of the file as it was served or as it is stored here. What follows a
blank or a tab is a remark; lines that start with # are remarks altogether.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from cogview.errors import ConfigError
from cogview.locations import find_files, open_decompressed
from cogview.records.pair import Unusable
from cogview.records.urls import normalise_url

OPTED_OUT = "opted_out"  # the reason of what is left out
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".lst")
_SHA256 = re.compile(r"^(?:sha256:)?([0-9a-f]{64})$")
_DOMAIN = re.compile(r"^[^\s/:@?#]+\.[^\s/:@?#]+$")


@dataclass(frozen=True, kw_only=True)
class OptOut:
    """Whom to leave out. urls: normalised; domains: lower-case ASCII, each with its subdomains; sha256: of images."""

    urls: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()
    sha256: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.urls or self.domains or self.sha256)

    def has_url(self, url: str) -> bool:
        """Whether this URL, in whatever spelling, or its domain or one above it is listed."""
        if not (self.urls or self.domains):
            return False
        normalised = normalise_url(url)
        if isinstance(normalised, Unusable):
            return False
        if normalised in self.urls:
            return True
        labels = (urlsplit(normalised).hostname or "").split(".")
        return any(".".join(labels[start:]) in self.domains for start in range(len(labels)))

    def has_image(self, data: bytes) -> bool:
        """Whether the file with these bytes is listed."""
        return bool(self.sha256) and hashlib.sha256(data).hexdigest() in self.sha256


def read_opt_out(addresses: Sequence[str]) -> OptOut:
    """Read the lists at these addresses. ConfigError names the line that is none of the three."""
    urls: set[str] = set()
    domains: set[str] = set()
    digests: set[str] = set()
    for file in find_files(addresses, suffixes=LIST_SUFFIXES, setting="opt_out") if addresses else ():
        with io.TextIOWrapper(open_decompressed(file.address), encoding="utf-8-sig", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                word = line.split(maxsplit=1)[0].strip(",;\"'") if line.strip() else ""
                if word and not word.startswith("#"):
                    _add(word, urls, domains, digests, where=f"{file.name}, line {number}")
    return OptOut(urls=frozenset(urls), domains=frozenset(domains), sha256=frozenset(digests))


def _add(word: str, urls: set[str], domains: set[str], digests: set[str], *, where: str) -> None:
    digest = _SHA256.match(word.lower())
    if digest:
        digests.add(digest.group(1))
        return
    is_domain = bool(_DOMAIN.match(word))
    normalised = normalise_url(f"http://{word.removeprefix('*.').removeprefix('.')}" if is_domain else word)
    if isinstance(normalised, Unusable):
        raise ConfigError(f"opt_out: {where}: {word[:80]!r} is neither a URL nor a domain nor a sha256")
    if is_domain:
        domains.add(urlsplit(normalised).hostname or "")
    else:
        urls.add(normalised)
