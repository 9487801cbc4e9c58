"""The state of the batch in the first two rooms: an image with its captions, or the reason why there is none."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KEY_PATTERN = re.compile(r"^[0-9A-Za-z_-]{1,64}$")


@dataclass(frozen=True, kw_only=True)
class TextImagePair:
    """One image and its captions (one at least once it is kept; several languages or wordings are several captions).

    key: unique in its corpus, `[0-9A-Za-z_-]{1,64}`; image_bytes: an encoded JPEG, PNG, WebP or GIF;
    source: URL or path that it came from; extra: licence, author, page, ... as plain JSON values.
    """

    key: str
    captions: tuple[str, ...]
    image_bytes: bytes
    source: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The first caption, or the empty string."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A candidate that never became a pair, or is none any more: one reason code, and a detail for people.

    tombstone: what is still known of a pair that was taken down (`sha256`, `original_sha256`).
    """

    key: str
    source: str
    reason: str
    detail: str = ""
    tombstone: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unusable:
    """Why a single thing (a URL, a body, an image, a caption) cannot be used: one reason code, a detail for people.

    Details are free of addresses, ports and times, so that the same bad input is written as the same bytes.
    """

    reason: str
    detail: str = ""
