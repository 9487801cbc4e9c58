import pytest

from cogview.records.images import ImageSettings
from cogview.records.pair import Failure, TextImagePair
from cogview.records.pair_shards import store_pair
from cogview.records.rights import read_rights, refuse_mining
from tests.records.test_images import RED_TO_BLUE
from tests.records.web_site import encode

PLUS = "http://ns.useplus.org/ldf/vocab/"
PACKET = """<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description xmpRights:WebStatement='https://a.org/terms'
 {attributes}><cc:license rdf:resource="https://creativecommons.org/licenses/by-nc/4.0/"/>
 <dc:creator><rdf:Seq><rdf:li>Ann  Author</rdf:li></rdf:Seq></dc:creator>
 <dc:rights><rdf:Alt><rdf:li xml:lang="x-default">(c) 2026 Ann</rdf:li></rdf:Alt></dc:rights>{elements}
 </rdf:Description></rdf:RDF></x:xmpmeta>"""


def packet(attributes: str = "", elements: str = "") -> bytes:
    return PACKET.format(attributes=attributes, elements=elements).encode()


def stored(data: bytes, **settings: bool) -> TextImagePair | Failure:
    pair = TextImagePair(key="k", captions=("x",), image_bytes=data, source="s", extra={"license": "CC BY 4.0"})
    return store_pair(pair, ImageSettings(**settings))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_licence_and_author_in_the_file_travel_with_the_pair(image_format: str) -> None:
    answer = stored(encode(RED_TO_BLUE, image_format, **xmp_option(image_format)))
    assert isinstance(answer, TextImagePair)
    assert answer.extra["license"] == "CC BY 4.0"  # what its source said comes first
    assert answer.extra["file_license"] == "https://creativecommons.org/licenses/by-nc/4.0/"
    assert answer.extra["file_license_url"] == "https://a.org/terms"
    assert (answer.extra["file_author"], answer.extra["file_rights"]) == ("Ann Author", "(c) 2026 Ann")
    assert b"Ann" not in answer.image_bytes


def xmp_option(image_format: str) -> dict[str, object]:
    if image_format != "PNG":
        return {"xmp": packet()}
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet().decode())
    return {"pnginfo": info}


@pytest.mark.parametrize(
    ("attributes", "elements", "code"),
    [
        (f'plus:DataMining="{PLUS}DMI-PROHIBITED"', "", "DMI-PROHIBITED"),
        ("", f"<plus:DataMining>{PLUS}DMI-PROHIBITED-AIMLTRAINING</plus:DataMining>", "DMI-PROHIBITED-AIMLTRAINING"),
        (
            "",
            f'<plus:DataMining rdf:resource="{PLUS}DMI-PROHIBITED-GENAIMLTRAINING"/>',
            "DMI-PROHIBITED-GENAIMLTRAINING",
        ),
        (f'plus:DataMining="{PLUS}DMI-ALLOWED"', "", ""),
        ("", "", ""),
    ],
)
def test_a_picture_that_must_not_be_mined_is_refused(attributes: str, elements: str, code: str) -> None:
    data = encode(RED_TO_BLUE, "JPEG", xmp=packet(attributes, elements))
    answer = stored(data)
    refused = (answer.reason, answer.detail) if isinstance(answer, Failure) else ("", "")
    assert refused == (("data_mining_prohibited", code) if code else ("", ""))
    assert isinstance(stored(data, honour_data_mining=False), TextImagePair)


@pytest.mark.parametrize("data", [b"", b"<x:xmpmeta", b"<x:xmpmeta>\xff</x:xmpmeta>", b"<x:xmpmeta>" + b"<" * 300_000])
def test_broken_packets_say_nothing(data: bytes) -> None:
    assert read_rights(data) == {}
    assert refuse_mining({}) is None
