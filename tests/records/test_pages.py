import gzip

from cogview.records.pages import Page, PageImage, read_page

URL = "http://example.org/gallery/1.html"


def page(html: str, *, content_type: str = "text/html; charset=utf-8") -> Page:
    return read_page(html.encode(), url=URL, content_type=content_type, product="TestBot")


def image(path: str, *captions: str) -> PageImage:
    return PageImage(url=f"http://example.org{path}", captions=captions)


def test_captions_are_alt_text_and_figure_caption() -> None:
    html = (
        '<figure><a href="x"><img src="/a.png" alt="A &amp; B"></a><figcaption>一<b>只</b>\n 猫</figcaption></figure>'
    )
    assert page(html).images == (image("/a.png", "A & B", "一只 猫"),)


def test_a_figure_does_not_lend_its_caption_to_other_images() -> None:
    html = '<figure><img src="/a.png"><figcaption>cap</figcaption></figure><img src="/b.png" alt="">'
    assert page(html).images == (image("/a.png", "cap"), image("/b.png"))


def test_the_same_image_twice_gathers_its_captions() -> None:
    assert page('<img src="/a.png" alt="one"><img src="a/../../a.png" alt="two">').images == (
        image("/a.png", "one", "two"),
    )


def test_the_largest_of_a_srcset_is_taken() -> None:
    html = '<img src="/s.png" srcset="/a.png 320w, /b.png 1280w, /c.png 640w" alt="x">'
    assert page(html).images[0].url.endswith("/b.png")
    html = '<img src="/s.png" srcset="/a.png, /c,d.png 2.5x, /b.png 2x" alt="x">'
    assert page(html).images[0].url.endswith("/c,d.png")
    assert page('<img data-src="/late.png" src="data:image/gif;base64,AA" alt="x">').images[0].url.endswith("/late.png")
    assert page('<img srcset="1..2w ,,, x 1..2w" src="/a.png" alt="x">').images


def test_images_that_cannot_be_fetched_are_left_out() -> None:
    assert (
        page('<img alt="x"><img src="data:image/png;base64,AA"><img src="file:///a.png"><img src="http://[">').images
        == ()
    )


def test_the_shared_image_counts_where_no_other_has_words() -> None:
    head = '<title>T</title><meta property="og:image" content="/o.png"><meta property="og:title" content="Title">'
    assert page(head).images == (image("/o.png", "Title"),)
    assert page(head + '<img src="/a.png" alt="words">').images == (image("/a.png", "words"),)


def test_links_are_pages_in_their_order() -> None:
    html = '<a href="2.html#top">2</a><a href="2.html">2</a><a href="/big.jpg">i</a><a href="mailto:a@b">m</a>'
    html += '<a rel="nofollow" href="3.html">3</a><a href="http://other.org/">o</a>'
    assert page(html).links == ("http://example.org/gallery/2.html", "http://other.org/")


def test_a_base_moves_the_links() -> None:
    assert page('<base href="http://cdn.org/x/"><img src="a.png" alt="w">').images[0].url == "http://cdn.org/x/a.png"


def test_a_sitemap_is_links() -> None:
    xml = '<?xml version="1.0"?><urlset><url><loc>http://example.org/a?x=1&amp;y=2</loc></url></urlset>'
    assert page(xml).links == ("http://example.org/a?x=1&y=2",)


def test_a_page_that_refuses_training_gives_links_only() -> None:
    body = '<a href="2.html">2</a><img src="/a.png" alt="x">'
    for head in (
        '<meta name="robots" content="noai">',
        '<meta name="ROBOTS" content="NoImageAI, follow">',
        '<meta name="testbot" content="noindex">',
        '<meta name="tdm-reservation" content="1">',
    ):
        assert page(head + body) == Page(links=("http://example.org/gallery/2.html",), refuses=True)
    assert page('<meta name="robots" content="nofollow">' + body).links == ()
    assert page('<meta name="otherbot" content="noai">' + body).images


def test_other_charsets_are_decoded() -> None:
    html = '<meta charset="gbk"><img src="/a.png" alt="一只猫">'
    assert read_page(html.encode("gbk"), url=URL).images[0].captions == ("一只猫",)
    big5 = '<img src="/a.png" alt="一隻貓">'.encode("big5")
    assert read_page(big5, url=URL, content_type="text/html; charset=Big5").images[0].captions == ("一隻貓",)
    assert read_page(b"<img src=/a.png alt=x>", url=URL, content_type="text/html; charset=nonsense").images


def test_broken_markup_gives_what_can_be_made_out() -> None:
    assert page("<figure><img src='/a.png' alt='x'><figure><figcaption>cap").images[0].captions[0] == "x"
    assert page("\x00\xff<<<>>>") == Page()
    assert page("<div>" * 5000 + "<img src=/a.png alt=deep>").images == (image("/a.png", "deep"),)


def test_a_picture_offers_its_sources_in_formats_that_are_read() -> None:
    html = (
        '<picture><source type="image/avif" srcset="/x.avif 4000w"><source srcset="/l.webp 2000w, /m.webp 900w">'
        '<img src="/s.jpg" srcset="/s.jpg 300w" alt="x"></picture>'
    )
    assert page(html).images == (image("/l.webp", "x"),)
    assert page('<img data-srcset="/a.png 1x, /b.png 2x" src="/s.png" alt="x">').images == (image("/b.png", "x"),)


def test_other_words_are_taken_where_they_are_asked_for() -> None:
    html = (
        '<div><p>Floods in the south <a href="n.html"><img src="/a.png" title="A street"></a></p></div>'
        '<div><a><img src="/b.png" alt=""></a><p>Rain falls on\n Hangzhou</p></div>'
        f'<div><img src="/c.png"><p>{"long " * 100}</p></div><img src="/d.png">'
    )
    assert [item.captions for item in page(html).images] == [()] * 4
    given = read_page(html.encode(), url=URL, words=("alt", "title", "surrounding")).images
    assert [item.captions for item in given] == [("A street",), ("Rain falls on Hangzhou",), (), ()]
    assert read_page(html.encode(), url=URL, words=("surrounding",)).images[0].captions == ("Floods in the south",)


def test_a_gzipped_sitemap_and_an_index_are_links() -> None:
    index = b"<sitemapindex><sitemap><loc>http://example.org/1.xml.gz</loc></sitemap></sitemapindex>"
    assert read_page(gzip.compress(index), url=URL).links == ("http://example.org/1.xml.gz",)
    bomb = gzip.compress(b"<urlset><url><loc>http://example.org/a</loc></url></urlset>" + b" " * 40_000_000)
    assert read_page(bomb, url=URL).links == ("http://example.org/a",)
    assert read_page(b"\x1f\x8bbroken", url=URL) == Page()
