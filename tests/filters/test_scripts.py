import pytest

from cogview.filters.scripts import SCRIPTS, has_han, has_kana, language_group, letters_by_script


@pytest.mark.parametrize(
    ("caption", "letters"),
    [
        ("a dog 3", {"latin": 4}),
        ("naïve Ångström", {"latin": 13}),
        ("一只 dog", {"han": 2, "latin": 3}),
        ("犬がいる", {"han": 1, "kana": 3}),
        ("кошка", {"cyrillic": 5}),
        ("고양이", {"hangul": 3}),
        ("قطة", {"arabic": 3}),
        ("γάτα", {"other": 4}),
        ("123 !? 🙂", {}),
    ],
)
def test_letters_belong_to_scripts(caption: str, letters: dict[str, int]) -> None:
    assert letters_by_script(caption) == letters
    assert set(letters) <= set(SCRIPTS)


@pytest.mark.parametrize(
    ("caption", "group"),
    [
        ("a dog", "Latin script"),
        ("一只狗", "Chinese"),
        ("一只狗 in Paris", "Chinese"),
        ("the Chinese character 狗 means dog", "Chinese and Latin"),
        ("犬がいる", "Japanese"),
        ("кошка", "Cyrillic"),
        ("고양이", "Korean"),
        ("γάτα", "other scripts"),
        ("2021", "no letters"),
    ],
)
def test_a_caption_has_a_language_group(caption: str, group: str) -> None:
    assert language_group(caption) == group


def test_japanese_is_told_from_chinese() -> None:
    assert [has_han("漢字"), has_kana("漢字")] == [True, False]
    assert [has_kana("漢字かな"), has_kana("dog")] == [True, False]
