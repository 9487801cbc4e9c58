"""The bilingual text tokenizer: ids tell the language, and nothing else changes; icetk's numbers are the release's."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from cogview.errors import ConfigError, VocabularyError
from cogview.scenes.scene import corpus
from cogview.tokenizers.bilingual import KINDS, kind_of, ordered_model, ranges_of
from cogview.tokenizers.bilingual_vocabulary import ICETK_RANGES, BilingualVocabulary, TextRanges
from cogview.tokenizers.text import TextTokenizer, TextTokenizerConfig, train_text_tokenizer

CAPTIONS = [text for scene in corpus(3, 200) for text in (scene.english, scene.chinese)] + [
    "Привет, мир",
    "第 3 only 1",
]


def plain_model(model_type: str = "bpe") -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS),
        model_writer=model,
        model_type=model_type,
        vocab_size=200,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_ordering_changes_ids_and_not_how_texts_are_cut(model_type: str) -> None:
    before = plain_model(model_type)
    old, new = TextTokenizer(before), TextTokenizer(ordered_model(before))
    assert new.num_pieces == old.num_pieces
    for text in CAPTIONS:
        assert new.pieces(text) == old.pieces(text)
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    assert ordered_model(ordered_model(before)) == ordered_model(before)


def test_ids_tell_the_language_of_their_pieces() -> None:
    tokenizer = TextTokenizer(ordered_model(plain_model()))
    ranges = tokenizer.ranges
    assert ranges.num_pieces == tokenizer.num_pieces
    vocabulary = BilingualVocabulary(num_image_codes=10, text=ranges)
    for token, piece in enumerate(tokenizer.written_pieces()):
        kind = kind_of(piece) if piece else "common"
        assert token + vocabulary.text_offset in getattr(vocabulary, f"{kind}_ids"), piece
    assert min(getattr(ranges, kind) for kind in KINDS) > 0, "this corpus has all four"


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        *(("▁dog", "english"), ("é", "english"), ("红色", "chinese"), ("A座", "chinese"), ("мир", "rare")),
        *(("。", "common"), ("▁", "common"), ("3", "common"), ("12月", "chinese"), ("かな", "rare")),
    ],
)
def test_a_piece_is_of_the_kind_of_its_letters(piece: str, kind: str) -> None:
    assert kind_of(piece) == kind


def test_a_bilingual_tokenizer_is_trained_on_ones_own_captions(tmp_path: Path) -> None:
    config = TextTokenizerConfig(num_pieces=300, exact=False, is_bilingual=True, split_chinese=True)
    train_text_tokenizer(CAPTIONS, config=config, output=tmp_path / "text")
    tokenizer = TextTokenizer.load(tmp_path / "text")
    vocabulary = BilingualVocabulary(num_image_codes=512, text=tokenizer.ranges)
    assert tokenizer.written_pieces()[:4] == ["", "", "", ""], "unknown, begin, end, pad"
    english, chinese = (tokenizer.encode(text) for text in CAPTIONS[:2])
    assert vocabulary.tongue_of(english) == "english"
    assert vocabulary.tongue_of(chinese) == "chinese"
    assert 3 not in tokenizer.encode("<pad> </s>"), "no text writes a pad"


def test_a_tokenizer_that_is_not_ordered_is_refused(tmp_path: Path) -> None:
    train_text_tokenizer(CAPTIONS, config=TextTokenizerConfig(num_pieces=300, exact=False), output=tmp_path / "text")
    with pytest.raises(VocabularyError, match="is-bilingual"):
        _ = TextTokenizer.load(tmp_path / "text").ranges
    with pytest.raises(VocabularyError, match="not ordered by language"):
        ranges_of(plain_model())
    with pytest.raises(VocabularyError, match="not a SentencePiece model"):
        ordered_model(b"nothing")
    with pytest.raises(ConfigError, match="model_type"):
        TextTokenizerConfig(model_type="words")  # type: ignore[arg-type]


def test_settings_of_older_runs_are_written_as_they_were(tmp_path: Path) -> None:
    train_text_tokenizer(CAPTIONS, config=TextTokenizerConfig(num_pieces=300, exact=False), output=tmp_path)
    assert "is_bilingual" not in (tmp_path / "text.json").read_text()
    assert "model_type" not in (tmp_path / "text.json").read_text()


def test_icetks_numbers_give_the_releases_ids() -> None:
    vocabulary = BilingualVocabulary()
    assert ICETK_RANGES.num_pieces == 130_000
    assert vocabulary.common_ids == range(20_000, 20_100)
    assert vocabulary.english_ids == range(20_100, 83_823)
    assert vocabulary.chinese_ids == range(83_823, 145_653)
    assert vocabulary.rare_ids == range(145_653, 150_000)
    assert vocabulary.pad == 20_003
    assert vocabulary.start_of_image == 150_000
    assert vocabulary.start_of_text("english") == 150_001
    assert vocabulary.start_of_text("chinese") == 150_002
    assert vocabulary.size == 150_010
    assert vocabulary.describe(20_003) == "common text piece 3"
    assert vocabulary.describe(150_009) == "unused row 150009"


@given(st.integers(1, 99), st.integers(4, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_every_id_has_one_meaning(codes: int, common: int, english: int, chinese: int, rare: int) -> None:
    text = TextRanges(common=common, english=english, chinese=chinese, rare=rare)
    vocabulary = BilingualVocabulary(num_image_codes=codes, text=text)
    meanings = [vocabulary.describe(token) for token in range(vocabulary.size)]
    assert len(set(meanings)) == vocabulary.size
    assert 0 <= vocabulary.size - vocabulary.num_ids < 10
    with pytest.raises(VocabularyError, match="outside the vocabulary"):
        vocabulary.describe(vocabulary.size)


def test_two_layouts_never_share_a_fingerprint() -> None:
    prints = {
        BilingualVocabulary(
            num_image_codes=codes, text=TextRanges(common=5, english=english, chinese=9, rare=1)
        ).fingerprint
        for codes in (7, 8)
        for english in (3, 4)
    }
    assert len(prints) == 4
