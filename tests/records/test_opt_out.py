import hashlib
from pathlib import Path

import pytest

from cogview.errors import ConfigError
from cogview.records.opt_out import OptOut, read_opt_out

DIGEST = hashlib.sha256(b"picture").hexdigest()


def test_a_list_names_urls_domains_and_images(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text(
        f"\ufeff# who asked\n\nHTTP://Example.org:80/a b.jpg\nhttps://x.org/1.jpg\tby mail\n*.photo.net,\n"
        f"Bücher.example\nsha256:{DIGEST.upper()}\n{'a' * 64}\n"
    )
    listed = read_opt_out([str(path)])
    assert len(listed.sha256) == 2
    assert listed.domains == {"photo.net", "xn--bcher-kva.example"}
    for url in ("https://x.org/1.jpg#top", "http://photo.net/", "https://a.b.photo.net/x", "http://BÜCHER.example/"):
        assert listed.has_url(url), url
    for url in ("https://x.org/2.jpg", "http://aphoto.net/", "http://net/", "photo.net", "", "http://["):
        assert not listed.has_url(url), url
    assert listed.has_image(b"picture")
    assert not listed.has_image(b"another")


def test_an_empty_list_refuses_nobody(tmp_path: Path) -> None:
    assert not OptOut()
    assert read_opt_out([]) == OptOut()
    assert not OptOut().has_url("http://a.org/")


def test_a_line_that_is_none_of_them_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    for line in ("nonsense", "ftp://a.org/x", "sha256:12", "http://"):
        path.write_text(f"a.org\n{line}\n")
        with pytest.raises(ConfigError, match=r"out\.txt, line 2"):
            read_opt_out([str(path)])
    with pytest.raises(ConfigError, match="does not exist"):
        read_opt_out([str(tmp_path / "none.txt")])
