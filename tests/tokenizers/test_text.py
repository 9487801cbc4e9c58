"""Text to ids: real SentencePiece models trained here, and any text that the world may send."""

import gzip
import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cogview.errors import ConfigError, VocabularyError
from cogview.tokenizers.text import (
    MODEL_NAME,
    SETTINGS_NAME,
    TextTokenizer,
    TextTokenizerConfig,
    count_characters,
    train_text_tokenizer,
)

SMALL = TextTokenizerConfig(num_pieces=200, exact=False)
CAPTION_FILES = [Path(__file__).parents[2] / "../shared/data" / f"captions_{name}.txt.gz" for name in ("zh", "en")]
CONTROL_IDS = {1, 2}  # <s> and </s>


def small_corpus() -> list[str]:
    choose = random.Random(0).choice
    colours, shapes = ["red", "green", "blue"], ["circle", "square", "star"]
    english = [f"a large {choose(colours)} {choose(shapes)} on a {choose(colours)} background" for _ in range(300)]
    chinese = [f"{choose('红绿蓝')}色背景上的{choose('大小')}{choose('圆方星')}形" for _ in range(300)]
    return english + chinese


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train_text_tokenizer(small_corpus(), config=SMALL, output=tmp_path_factory.mktemp("text"))


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    trained = [train_text_tokenizer(iter(small_corpus()), config=SMALL, output=folder) for folder in folders]
    assert trained[0].fingerprint == trained[1].fingerprint
    for name in (MODEL_NAME, SETTINGS_NAME):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_specials_and_normalizer_are_those_of_the_released_tokenizer(tokenizer: TextTokenizer) -> None:
    assert tokenizer.unknown_id == 0
    assert tokenizer.encode("<n>")[-1] == 3
    assert tokenizer.encode("ｒｅｄ　ｃｉｒｃｌｅ") == tokenizer.encode("red circle")  # full-width forms fold to ASCII
    assert tokenizer.encode("red \n circle") == tokenizer.encode("red circle")
    assert 0 in tokenizer.encode("😀")
    assert tokenizer.encode("") == tokenizer.encode(" \n") == []


def test_captions_survive_the_round_trip(tokenizer: TextTokenizer) -> None:
    for text in small_corpus():
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batches_encode_as_single_texts_do(tokenizer: TextTokenizer) -> None:
    texts = [*small_corpus()[:50], "", "\ud800 a", "<s>"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


SPECIAL_LOOKING = [
    "[ROI1]",
    "[BASE]",
    "[BOI1]",
    "[EOI1]",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "［ROI1］",
    "[RO\u200dI1]",
    "<n>",
]
ANY_TEXT = st.text(st.characters(), max_size=60)  # lone surrogates and NUL included


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(ANY_TEXT, st.sampled_from(SPECIAL_LOOKING), st.sampled_from(["red", "圆形", " "]))))
@example(["\ud800"])
@example(["a\0b"])
@example(["\ud83d\ude00"])
@example(["\u2581\u2585"])
def test_no_text_gives_control_ids_or_ids_outside(tokenizer: TextTokenizer, parts: list[str]) -> None:
    ids = tokenizer.encode("".join(parts))
    assert all(0 <= token < tokenizer.num_pieces for token in ids)
    assert not CONTROL_IDS & set(ids)
    assert isinstance(tokenizer.decode(ids), str)


def test_literal_command_tokens_are_spelled_out(tokenizer: TextTokenizer) -> None:
    for text in SPECIAL_LOOKING[:8]:
        assert len(tokenizer.encode(text)) > 1


def test_surrogate_pairs_are_joined_and_nul_is_removed(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")
    assert tokenizer.encode("re\0d") == tokenizer.encode("red")


def test_a_megabyte_encodes(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("red 圆形 " * 100_000)) >= 200_000


@pytest.mark.parametrize("outside", [-1, 10**6])
def test_decoding_ids_outside_is_refused(tokenizer: TextTokenizer, outside: int) -> None:
    with pytest.raises(VocabularyError, match=f"id {outside} is not"):
        tokenizer.decode([5, outside])


def test_a_tokenizer_can_be_sent_to_another_process(tokenizer: TextTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode("red circle") == tokenizer.encode("red circle")


def test_a_small_corpus_caps_the_vocabulary(tmp_path: Path) -> None:
    trained = train_text_tokenizer(["a cat", "a dog"] * 10, config=replace(SMALL, num_pieces=5000), output=tmp_path)
    assert 10 < trained.num_pieces < 40
    assert json.loads((tmp_path / SETTINGS_NAME).read_text())["num_pieces"] == trained.num_pieces


def test_an_exact_size_that_the_corpus_cannot_give_names_the_possible_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_pieces is 50000, but 20 captions give \d\d at most"):
        train_text_tokenizer(["a cat", "a dog"] * 10, config=TextTokenizerConfig(), output=tmp_path)
    assert not (tmp_path / MODEL_NAME).exists()


def test_more_characters_than_pieces_grow_the_vocabulary_or_are_refused(tmp_path: Path) -> None:
    corpus = ["".join(chr(0x4E00 + 40 * line + place) for place in range(40)) for line in range(10)]
    few = TextTokenizerConfig(num_pieces=100, exact=False, character_coverage=1.0)
    with pytest.raises(ConfigError, match="need 405 alone"):  # 400 characters, the word mark, 4 specials
        train_text_tokenizer(corpus, config=replace(few, exact=True), output=tmp_path)
    trained = train_text_tokenizer(corpus, config=few, output=tmp_path)
    assert 405 <= trained.num_pieces <= 810
    assert all(0 not in trained.encode(text) for text in corpus)


@pytest.mark.parametrize("texts", [[], [""], ["  ", "\0"]])
def test_a_corpus_without_text_is_refused(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="no text"):
        train_text_tokenizer(texts, config=SMALL, output=tmp_path)


def test_no_more_texts_are_read_than_asked_for(tmp_path: Path) -> None:
    def endless():
        while True:
            yield "a red circle"

    trained = train_text_tokenizer(endless(), config=replace(SMALL, max_texts=10), output=tmp_path)
    assert json.loads((tmp_path / SETTINGS_NAME).read_text())["settings"]["texts"] == 10
    assert trained.num_pieces > 4


def test_overlong_and_hostile_texts_do_not_stop_training(tmp_path: Path) -> None:
    corpus = ["x" * 10**6, "\ud800 lone", "a\0b", "\u2585 reserved", "<s> [ROI1] <n>", "红" * 5000]
    trained = train_text_tokenizer(corpus, config=replace(SMALL, character_coverage=1.0), output=tmp_path)
    assert 0 not in trained.encode("lone")
    assert 0 not in trained.encode("红红")


@pytest.mark.parametrize("change", [{"num_pieces": 4}, {"character_coverage": 0.5}, {"max_texts": 0}])
def test_settings_that_cannot_work_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(SMALL, **change)


def test_loading_takes_a_folder_or_a_model_file(tmp_path: Path) -> None:
    trained = train_text_tokenizer(small_corpus(), config=SMALL, output=tmp_path)
    for path in (tmp_path, tmp_path / MODEL_NAME):
        assert TextTokenizer.load(path).fingerprint == trained.fingerprint


@pytest.mark.parametrize("content", [b"", b"garbage", b"\0" * 1000, b"\x0a\xff\xff\xff\xff\x0f", "cut"])
def test_files_that_are_no_model_are_refused(tmp_path: Path, tokenizer: TextTokenizer, content: bytes | str) -> None:
    whole = tokenizer.__reduce__()[1][0]
    path = tmp_path / "other.model"
    path.write_bytes(content if isinstance(content, bytes) else whole[: len(whole) // 2])
    with pytest.raises(VocabularyError, match=r"other\.model: .*give a SentencePiece"):
        TextTokenizer.load(path)


def test_a_missing_or_huge_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"text\.model: .*No such file"):
        TextTokenizer.load(tmp_path)
    with open(tmp_path / MODEL_NAME, "wb") as file:
        file.truncate(500 * 2**20)  # sparse: takes no disk
    with pytest.raises(VocabularyError, match="too many"):
        TextTokenizer.load(tmp_path)


def test_a_model_that_is_not_the_one_its_folder_names_is_refused(tmp_path: Path) -> None:
    train_text_tokenizer(small_corpus(), config=SMALL, output=tmp_path)
    train_text_tokenizer(small_corpus()[:300], config=SMALL, output=tmp_path / "other")
    (tmp_path / MODEL_NAME).write_bytes((tmp_path / "other" / MODEL_NAME).read_bytes())
    with pytest.raises(VocabularyError, match="was changed"):
        TextTokenizer.load(tmp_path)
    (tmp_path / SETTINGS_NAME).write_text("{}")
    with pytest.raises(VocabularyError, match="damaged"):
        TextTokenizer.load(tmp_path)


def test_damaged_models_are_refused_or_stay_in_range(tokenizer: TextTokenizer) -> None:
    """A flipped bit may leave a valid model; it must not give ids outside it."""
    whole = tokenizer.__reduce__()[1][0]
    choose = random.Random(0)
    loaded = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[choose.randrange(len(whole))] ^= 1 << choose.randrange(8)
        try:
            other = TextTokenizer(bytes(damaged))
        except VocabularyError:
            continue
        loaded += 1
        assert all(0 <= token < other.num_pieces for token in other.encode("a large red circle 红色"))
    assert loaded > 50


@pytest.mark.skipif(not all(path.exists() for path in CAPTION_FILES), reason="../shared/data captions are not here")
def test_the_released_settings_train_on_real_captions(tmp_path: Path) -> None:
    corpus = [line for path in CAPTION_FILES for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    assert count_characters(corpus, coverage=0.9995) == 1584
    trained = train_text_tokenizer(corpus, config=TextTokenizerConfig(num_pieces=8000), output=tmp_path)
    assert trained.num_pieces == 8000
    ids = [token for tokens in trained.encode_batch(corpus) for token in tokens]
    assert ids.count(trained.unknown_id) / len(ids) < 0.003
    assert trained.pieces("A black motorcycle on a street") == ["▁A", "▁black", "▁motorcycle", "▁on", "▁a", "▁street"]


def test_split_chinese_learns_no_phrase_by_heart(tmp_path: Path) -> None:
    corpus = ["一个大红色圆形", "a large red circle"] * 50
    tokenizer = train_text_tokenizer(corpus, config=replace(SMALL, split_chinese=True), output=tmp_path)
    assert len(tokenizer.encode("大红色圆形")) >= len("大红色圆形")
    assert len(tokenizer.encode("large red circle")) == 3
    assert tokenizer.decode(tokenizer.encode("大红色圆形")) == "大红色圆形"
