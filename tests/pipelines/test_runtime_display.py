"""The display: a panel on a terminal, lines elsewhere, and nobody else writes on the screen meanwhile."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from pipelines.runtime import display
from pipelines.runtime.display import LOG_NAME, PlainDisplay, Stage, duration, open_display, progress_words


def lines(stream: io.StringIO) -> list[str]:
    return [line[9:] for line in stream.getvalue().splitlines()]  # without the time of day


def test_plain_lines_tell_start_end_and_what_was_reused() -> None:
    stream = io.StringIO()
    plain = PlainDisplay(["filter_pairs", "pretrain"], stream=stream)
    plain.finish("filter_pairs", state="reused", seconds=12.0, note="kept 5,700")
    plain.start("pretrain")
    plain.say("2 workers")
    plain.finish("pretrain", state="done", seconds=187.2, note="loss 2.5")
    assert lines(stream) == [
        "filter_pairs: reused, nothing to do (kept 5,700)",
        "pretrain: started",
        "pretrain: 2 workers",
        "pretrain: done in 3:07 (loss 2.5)",
    ]
    assert re.match(r"\d\d:\d\d:\d\d filter_pairs", stream.getvalue())


def test_plain_progress_is_one_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    plain = PlainDisplay(["pretrain"], stream=stream)
    plain.start("pretrain")
    for step in range(100):
        plain.progress(step, 100, "loss 3.2")
    assert lines(stream) == ["pretrain: started"]
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    plain.progress(100, 100, "loss 3.1")
    assert lines(stream)[1].startswith("pretrain: 100 of 100 (100 %), loss 3.1, 0.")


@pytest.mark.parametrize(("seconds", "words"), [(0, "0.0 s"), (7.44, "7.4 s"), (187, "3:07"), (7387, "2:03:07")])
def test_durations_read_well(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_progress_without_a_total_is_the_note_and_the_time() -> None:
    assert progress_words(Stage(name="scrape_pairs", note="300 images", started=10.0), now=50.0) == "300 images, 40.0 s"


def test_the_time_that_is_left_follows_from_the_pace() -> None:
    stage = Stage(name="generate", started=100.0)
    stage.keep(200, 600, "pictures", now=110.0)  # 200 were there from an earlier run, so they say nothing of the pace
    assert stage.seconds_left(now=115.0) is None
    stage.keep(300, 600, "pictures", now=120.0)
    assert stage.seconds_left(now=120.0) == 30.0
    assert progress_words(stage, now=120.0) == "300 of 600 (50 %), pictures, 20.0 s, 30.0 s left"
    stage.keep(0, 12, "sheets", now=121.0)
    assert stage.seconds_left(now=130.0) is None
    stage.keep(12, 12, "sheets", now=130.0)
    assert progress_words(stage, now=130.0) == "12 of 12 (100 %), sheets, 30.0 s"


def test_libraries_children_and_warnings_write_to_the_log_and_not_on_the_screen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with open_display(["pretrain"], title="pretrain smoke", root=tmp_path) as opened:
        opened.start("pretrain")
        os.write(1, b"from a library in C\n")
        os.write(2, b"error of a library in C\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        logging.getLogger("pipelines.test").info("one line for each shard")
        warnings.warn("this is deprecated", UserWarning, stacklevel=1)
        opened.finish("pretrain", state="done", seconds=1.0)
    screen = capfd.readouterr()
    assert [line[9:] for line in screen.out.splitlines()] == ["pretrain: started", "pretrain: done in 1.0 s"]
    assert screen.err == ""
    log = (tmp_path / LOG_NAME).read_text()
    for words in ("from a library in C", "error of a library", "from a child", "one line for each shard", "deprecated"):
        assert words in log


def test_the_screen_is_given_back_after_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="broken"), open_display(["pretrain"], title="pretrain", root=tmp_path):
        raise ValueError("broken")
    os.write(1, b"back again\n")
    assert capfd.readouterr().out == "back again\n"


def test_a_rerun_that_says_nothing_leaves_the_log_untouched(tmp_path: Path) -> None:
    stamps = []
    for _ in range(2):
        with open_display(["pretrain"], title="pretrain", root=tmp_path, stream=io.StringIO()) as opened:
            opened.finish("pretrain", state="reused", seconds=1.0)
        stamps.append((tmp_path / LOG_NAME).stat().st_mtime_ns)
    assert stamps[0] == stamps[1]


def test_verbose_redirects_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with open_display(["pretrain"], title="pretrain", root=tmp_path, is_verbose=True):
        os.write(1, b"from a library in C\n")
    assert "from a library in C" in capfd.readouterr().out
    assert not (tmp_path / LOG_NAME).exists()


PANEL = """
import sys, time
from pathlib import Path
from pipelines.runtime.display import open_display
with open_display(["filter_pairs", "pretrain", "generate"], title="road smoke", root=Path(sys.argv[1])) as display:
    display.finish("filter_pairs", state="reused", seconds=3.0, note="kept 5700")
    display.start("pretrain")
    display.progress(30, 120, "loss 2.75")
    display.say("2 workers")
    print("library chatter")
    time.sleep(0.6)
    display.finish("pretrain", state="done", seconds=61.0, note="loss 2.5")
print("the end")
"""


def test_on_a_terminal_there_is_one_panel_with_every_stage(tmp_path: Path) -> None:
    shown, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    child = subprocess.Popen(
        [sys.executable, "-c", PANEL, str(tmp_path)], stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            part = os.read(shown, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(shown)
    assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    for words in (
        "road smoke",
        "= filter_pairs",
        "▶ pretrain",
        "loss 2.75",
        "· generate",
        "2 workers",
        "✓ pretrain",
        "1:01",
    ):
        assert words in text
    assert text.rstrip().endswith("the end")
    assert "library chatter" not in text
    assert "library chatter" in (tmp_path / LOG_NAME).read_text()
