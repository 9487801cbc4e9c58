"""What a picture file says of its owner, its licence, and of being mined: the XMP packet inside it.

Fields: cc:license, dc:rights, dc:creator, xmpRights:WebStatement and plus:DataMining, the word of the IPTC standard for
"not for training". The packet is plain text in JPEG, WebP and PNG; it is searched and not parsed, so that no XML of
strangers is ever expanded.
"""

import re
from collections.abc import Mapping

from cogview.records.captions import clean_caption
from cogview.records.pair import Unusable

MAX_PACKET = 256 * 1024
MAX_FIELD = 500
_START, _END = b"<x:xmpmeta", b"</x:xmpmeta>"
_TAG = re.compile(r"<[^>]*>")
_FIELDS: Mapping[str, str] = {
    "license": "cc:license",
    "license_url": "xmpRights:WebStatement",
    "rights": "dc:rights",
    "author": "dc:creator",
    "credit": "photoshop:Credit",
    "data_mining": "plus:DataMining",
}
_PATTERNS = {
    field: re.compile(rf"""{name}\s*=\s*["']([^"']*)["']|<{name}\b([^>]*)(?:/>|>(.*?)</{name}>)""", re.DOTALL)
    for field, name in _FIELDS.items()
}
_RESOURCE = re.compile(r"""rdf:resource\s*=\s*["']([^"']*)["']""")


def read_rights(data: bytes) -> dict[str, str]:
    """The rights that a picture's own bytes state; empty if they state none."""
    start = data.find(_START)
    end = data.find(_END, start, start + MAX_PACKET) if start >= 0 else -1
    if end < 0:
        return {}
    packet = data[start:end].decode("utf-8", errors="replace")
    found = {field: _value(pattern.search(packet)) for field, pattern in _PATTERNS.items()}
    return {field: value for field, value in found.items() if value}


def refuse_mining(rights: Mapping[str, str]) -> Unusable | None:
    """`data_mining_prohibited` with the code, if the picture's owner has forbidden to train on it."""
    code = rights.get("data_mining", "").rpartition("/")[2]
    return Unusable("data_mining_prohibited", code) if code.upper().startswith("DMI-PROHIBITED") else None


def _value(match: re.Match[str] | None) -> str:
    if match is None:
        return ""
    attribute, inside, content = match.groups(default="")
    resource = _RESOURCE.search(inside)
    text = attribute or (resource.group(1) if resource else _TAG.sub(" ", content))
    return clean_caption(text)[:MAX_FIELD]
