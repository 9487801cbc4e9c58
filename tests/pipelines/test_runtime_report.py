"""The report is one file that holds everything, and shows text from the web as text."""

import base64
import io
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cogview.shards.manifest import ShardEntry, write_json, write_manifest
from pipelines.runtime.html import format_duration, format_number
from pipelines.runtime.report import write_report

HOSTILE = "<script>alert('caption')</script>"
CHINESE = "白色背景上的一个大红色圆形"


class Page(HTMLParser):
    """What a browser would make of the file: elements, their attributes, and the text between them."""

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.text = ""
        self.open = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"unbalanced <{tag}>"

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def save_picture(path, colour=(200, 30, 30), size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def chain(tmp_path):
    """The outputs of four stages, written with the project's own writers."""
    rejected = {"empty_caption": 3, HOSTILE: 1}
    entry = ShardEntry(shard=0, rows_in=1240, rows_out=1236, rejected=rejected)
    (tmp_path / "filter").mkdir()
    write_manifest(tmp_path / "filter", [entry], extra={})
    save_picture(tmp_path / "tokenizer/reconstructions.png", size=(40, 20))
    rows = [
        {"prompt_index": index, "prompt": prompt, "path": f"samples/{index}.png", "seed": 77 + index}
        for index, prompt in enumerate((HOSTILE, CHINESE, "a large red circle"))
    ]
    for row in rows:
        save_picture(tmp_path / "generate" / row["path"], size=(600, 600) if row["prompt_index"] == 2 else (16, 16))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "generate/samples.parquet")
    score = {"value": 0.934, "n": 200, "low": 0.91, "high": 0.95, "source": "scene reader"}
    scores = {"attributes/mean": score, "loss/validation_image": {"value": 2.5, "n": 128000, "source": "held-out rows"}}
    (tmp_path / "evaluate").mkdir()
    write_json(
        tmp_path / "evaluate/scores.json", {"scores": scores, "groups": {"all": {"mean": score, "shape": score}}}
    )
    write_json(tmp_path / "evaluate/config.json", {"note": HOSTILE})
    folders = {
        "filter_pairs": "filter",
        "train_image_tokenizer": "tokenizer",
        "generate": "generate",
        "evaluate": "evaluate",
    }
    stages = [
        {
            "job": job,
            "output": folder,
            "digest": "ab" * 32,
            "seconds": 75.2,
            "was_done": job == "generate",
            "scores": {},
        }
        for job, folder in folders.items()
    ]
    stages[0]["scores"] = {"pairs": 1236, "share_kept": 0.99677, "note": "not a number"}
    return {"preset": "smoke", "stages": stages}


def read_page(chain, tmp_path):
    html = write_report(chain, tmp_path / "report.html", root=tmp_path).read_text()
    return html, Page(html)


def test_text_from_the_web_stays_text(chain, tmp_path):
    html, page = read_page(chain, tmp_path)
    assert page.all("script") == []
    assert HOSTILE not in html
    assert page.text.count(HOSTILE) == 3  # the caption, the rejection reason and the config
    assert page.open == []
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_nothing_is_loaded_from_elsewhere(chain, tmp_path):
    html, page = read_page(chain, tmp_path)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:")
    assert "script-src" not in policy
    assert page.all("link") == []
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert "http://" not in html
    assert "https://" not in html


def test_samples_stand_over_their_captions_in_any_language(chain, tmp_path):
    _, page = read_page(chain, tmp_path)
    assert [image["alt"] for image in page.all("img")][:3] == [HOSTILE, CHINESE, "a large red circle"]
    assert CHINESE in page.text


def test_large_pictures_are_embedded_small(chain, tmp_path):
    _, page = read_page(chain, tmp_path)
    sizes = [Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))).size for image in page.all("img")]
    assert sizes == [(16, 16), (16, 16), (256, 256), (40, 20)]


def test_the_funnel_names_what_was_rejected_and_why(chain, tmp_path):
    _, page = read_page(chain, tmp_path)
    assert "filter_pairs: 1,240 in, 1,236 out" in page.text
    assert "empty_caption" in page.text


def test_scores_and_stages_are_there(chain, tmp_path):
    _, page = read_page(chain, tmp_path)
    for expected in (
        "93.4 %",
        "2.500",
        "128,000",
        "1 min 15 s",
        "pairs 1,236",
        "share_kept 0.9968",
        "abababababab",
        "was done",
    ):
        assert expected in page.text
    assert "not a number" not in page.text


def test_of_the_pictures_by_step_the_last_four_are_shown(chain, tmp_path):
    for step in (100, 200, 300, 400, 500):
        save_picture(tmp_path / f"pretrain/samples/step_{step:08d}.png")
    chain["stages"].append({"job": "pretrain", "output": "pretrain"})
    _, page = read_page(chain, tmp_path)
    assert "Samples for held-out captions, step_00000100" not in page.text
    assert [f"step_00000{step}00" in page.text for step in (2, 3, 4, 5)] == [True] * 4


def test_stages_that_wait_are_left_out(chain, tmp_path):
    _, before = read_page(chain, tmp_path)
    chain["stages"].append({"job": "evaluate_more", "state": "waiting"})
    _, page = read_page(chain, tmp_path)
    assert page.text == before.text


def test_a_chain_that_has_just_begun_has_a_report(tmp_path):
    (tmp_path / "scrape").mkdir()
    stage = {
        "job": "scrape_pairs",
        "output": "scrape",
        "digest": "cd" * 32,
        "seconds": 1.0,
        "was_done": False,
        "scores": {},
    }
    _, page = read_page({"stages": [stage]}, tmp_path)
    assert "scrape_pairs" in page.text
    assert page.all("img") == []
    assert "Samples" not in page.text


def test_durations_and_numbers_read_well():
    assert [format_duration(seconds) for seconds in (0.24, 59.4, 75.2, 7265)] == [
        "0.2 s",
        "59.4 s",
        "1 min 15 s",
        "2 h 1 min",
    ]
    assert [format_number(value) for value in (1234567, 3.0, 0.123456, "x", True)] == [
        "1,234,567",
        "3",
        "0.1235",
        "x",
        "True",
    ]
