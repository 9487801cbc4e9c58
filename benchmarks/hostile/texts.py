"""Bad captions: what is left of each once it is cleaned, and which ids it may become."""

from pathlib import Path

import pyarrow as pa

from benchmarks.hostile.cases import Case, Verdict
from cogview.records.captions import clean_caption
from cogview.tokenizers.text import NUM_RESERVED, TextTokenizerConfig, encodable, train_text_tokenizer
from pipelines.runtime.page import Page, write_page

# (what it is, the caption, what is left of it; None: whatever is left can be stored and shown)
CAPTIONS: list[tuple[str, str, str | None]] = [
    *(
        (f"the words {token}", f"a {token} b", f"a {token} b")
        for token in ("[ROI1]", "[BASE]", "[BOI1]", "[EOI1]", "<s>")
    ),
    ("full-width brackets", "\uff3bROI1\uff3d", "\uff3bROI1\uff3d"),
    ("a zero-width space in a command", "[RO\u200bI1]", "[ROI1]"),
    ("an escaped bracket", "\\u005bROI1\\u005d", "\\u005bROI1\\u005d"),
    ("NUL", "a\x00b", "ab"),
    ("a lone surrogate", "a\ud800b", "ab"),
    ("text from right to left", "a\u202egnp.exe", "agnp.exe"),
    ("isolates", "\u2066a\u2069 b", "a b"),
    ("a byte order mark", "\ufeffa", "a"),
    ("tag characters", "a\U000e0041\U000e0042", "a"),
    ("a flood of marks", "a" + "\u0300" * 500, "a" + "\u0300" * 3),
    ("family emoji keep their joiners", "\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ("Persian keeps its joiners", "می\u200cخواهم", "می\u200cخواهم"),
    ("a private code point", "a\ue000b", "ab"),
    ("blanks of every kind", "\u3000a\u00a0\t\r\n b\u2028", "a b"),
    ("only blanks", " \t\n\u3000", ""),
    ("nothing", "", ""),
    ("only emoji", "\U0001f600\U0001f600", "\U0001f600\U0001f600"),
    ("a megabyte", "x" * 1_000_000, None),
    ("an ANSI escape", "a\x1b[31mred\x1b[0m", "a[31mred[0m"),
    ("a line for a log", "a\nERROR root: b", "a ERROR root: b"),
    ("HTML entities", "a &lt;b&gt;", "a &lt;b&gt;"),
    ("a script", "<script>alert(1)</script>", None),
    ("a file name", "IMG_1234.jpg", None),
    ("an address", "https://example.org/a", None),
    ("mojibake", "ç‹—", None),
    ("GBK read as UTF-8", "狗".encode("gbk").decode("utf-8", errors="replace"), None),
    ("full-width letters", "\uff21\uff22", "\uff21\uff22"),
]


def text_verdicts(folder: Path) -> list[Verdict]:
    """Clean every caption, store it, encode it and show it in a page."""
    corpus = [f"a {word} on a {other} [x] <s>" for word in ("red dog", "blue cat") for other in ("mat", "hat")] * 50
    tokenizer = train_text_tokenizer(
        corpus, config=TextTokenizerConfig(num_pieces=200, exact=False), output=folder / "tokenizer"
    )
    verdicts = []
    for name, caption, left in CAPTIONS:
        cleaned = clean_caption(caption)
        problems = [] if left is None or cleaned == left else [f"became {cleaned[:40]!r}"]
        problems += [] if clean_caption(cleaned) == cleaned else ["not idempotent"]
        pa.array([cleaned], pa.string()).validate(full=True)
        ids = tokenizer.encode(encodable(cleaned[:2000]))
        reserved = {number for number in ids if number < NUM_RESERVED} - {tokenizer.unknown_id}
        problems += ["encoded as a special id"] if reserved or any(i >= tokenizer.num_pieces for i in ids) else []
        problems += [] if is_escaped(cleaned[:2000], folder / "page.html") else ["not escaped"]
        case = Case(topic="captions", name=name, expected=("clean",))
        verdicts.append(Verdict(case=case, found="; ".join(problems) or "clean"))
    return verdicts


def is_escaped(caption: str, path: Path) -> bool:
    """Whether a page that shows this caption has no markup of the caption's."""
    rows = [{"caption": caption}]
    write_page(Page(title=caption, lead=caption, headline={}, figures=(), table_title="Captions", rows=rows), path)
    return "<script>" not in path.read_text(encoding="utf-8")
