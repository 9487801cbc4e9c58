"""Word replacing: a prompt that leaves open who or what is meant gets a word drawn from a distribution of one's choice.

In: a prompt and a seed. Out: the prompt as it is drawn, and what was put in. A model that was asked for "a doctor"
draws those that it has seen most of; a model that is told which kind follows. So the words that leave it open (a
lexicon, a file of one's own) are qualified before sampling, and the distribution of the pictures is the one that was
asked for, not that of the corpus (CogView, conclusion and appendix D: "a simple word replacing method"). A prompt that
says it already is left as it is. The draw depends on seed, rule and prompt alone.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cogview.errors import ConfigError

MAX_WEIGHT = 1e9
RULES, CHOICE, WORD = "rules", "{choice}", "{word}"
_UNSPACED = "\u0e00-\u0e7f\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # written without spaces
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[^\w\s]")  # a comma keeps words apart as a word does
_ARTICLE = re.compile(r"(?<![^\W_])(a)(n?)(\s+)$", re.IGNORECASE)
_VOWELS = tuple("aeiou")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Words that leave something open, and how it is decided.

    words: whole words or phrases, in Chinese any part of the text, without regard to case; choices: what may be put
    in -> its weight, where "" leaves the word as it is; template: of {choice} and {word}; unless: words by which a
    prompt says it already (always counting the choices themselves), within `reach` words of the word, 0 for anywhere.
    """

    name: str
    words: tuple[str, ...]
    choices: Mapping[str, float]
    template: str = f"{CHOICE} {WORD}"
    unless: tuple[str, ...] = ()
    reach: int = 0

    def __post_init__(self) -> None:
        _check_names(self)
        _check_choices(self)
        if self.template.count(CHOICE) != 1 or self.template.count(WORD) > 1:
            raise ConfigError(f"{self._where}: template={self.template!r} needs {CHOICE} once, and {WORD} at most once")
        if type(self.reach) is not int or self.reach < 0:
            raise ConfigError(f"{self._where}: reach={self.reach!r}: give a number of words, or 0 for the whole prompt")

    @property
    def shares(self) -> dict[str, float]:
        """The distribution that is asked for: choice -> share, in sum 1."""
        total = sum(self.choices.values())
        return {choice: weight / total for choice, weight in self.choices.items()}

    def draw(self, key: str) -> str:
        """The choice that belongs to this key: the inverse of the cumulative shares at a hash of it."""
        place = int.from_bytes(hashlib.sha256(f"{self.name}:{key}".encode()).digest()[:8], "big") / 2**64
        possible = [(choice, share) for choice, share in self.shares.items() if share > 0]
        for choice, share in possible:
            if place < share:
                return choice
            place -= share
        return possible[-1][0]  # the shares' sum is 1 up to rounding

    @property
    def _where(self) -> str:
        return f"lexicon, rule {self.name!r}"


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One word of a prompt that was qualified."""

    rule: str
    word: str
    choice: str


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """A prompt as it is drawn, and what was put in; nothing where it stayed as it was."""

    text: str
    replacements: tuple[Replacement, ...]


class Lexicon:
    """Rules, ready to be applied. ConfigError for none, or for a word that two of them claim."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        claimed: dict[str, Rule] = {}
        for rule in self.rules:
            for word in rule.words:
                other = claimed.setdefault(word.casefold(), rule)
                if other is not rule:
                    raise ConfigError(f"lexicon: {word!r} is in the rules {other.name!r} and {rule.name!r}; keep one")
        if not claimed:
            raise ConfigError(f"lexicon: there is no rule; write one or more [[{RULES}]]")
        self._claimed = claimed
        self._words = _any_of(claimed)
        self._said = [_any_of({*rule.unless, *rule.choices} - {""}) for rule in self.rules]

    def rewrite(self, prompt: str, *, seed: int) -> Rewritten:
        """The prompt with every open word decided; each occurrence has a draw of its own."""
        pieces: list[str] = []
        made: list[Replacement] = []
        end = 0
        for number, match in enumerate(self._words.finditer(prompt)):
            rule = self._claimed.get(match[0].casefold())
            if rule is None:  # the expression takes a Turkish dotted I for an i, which it is not
                continue
            choice = "" if self._is_said(prompt, match, rule=rule) else rule.draw(f"{seed}:{number}:{prompt}")
            if not choice:
                continue
            made.append(Replacement(rule=rule.name, word=match[0], choice=choice))
            text = rule.template.replace(CHOICE, choice).replace(WORD, match[0])
            pieces += [_with_article(prompt[end : match.start()], text), text]
            end = match.end()
        return Rewritten(text="".join([*pieces, prompt[end:]]), replacements=tuple(made))

    def _is_said(self, prompt: str, match: re.Match[str], *, rule: Rule) -> bool:
        """Whether the prompt decides by itself what the rule would."""
        said = self._said[self.rules.index(rule)].finditer(prompt)
        if rule.reach == 0:
            return next(said, None) is not None
        first, last = _places(prompt, match)
        near = (_places(prompt, other) for other in said)
        return any(first - end <= rule.reach and start - last <= rule.reach for start, end in near)


def read_lexicon(path: Path) -> Lexicon:
    """Read a lexicon, TOML or JSON: a list `rules` whose items have the fields of `Rule`. ConfigError says what is off.

    ```toml
    [[rules]]
    name = "circles"
    words = ["circle"]
    choices = { red = 1, blue = 1 }
    ```
    """
    try:
        data = path.read_bytes()
        content = json.loads(data) if path.suffix.lower() == ".json" else tomllib.loads(data.decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"lexicon={path} cannot be read ({error}); give a TOML file, or JSON named *.json") from error
    rules = content.get(RULES) if isinstance(content, dict) else None
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise ConfigError(f"lexicon={path} has no list of {RULES}; write one or more [[{RULES}]]")
    unknown = sorted(content.keys() - {RULES})
    if unknown:
        raise ConfigError(f"lexicon={path}: {unknown[0]!r} is unknown; at its top there is only {RULES}")
    return Lexicon([_rule(rule, number=number) for number, rule in enumerate(rules, start=1)])


def _rule(plain: Mapping[str, Any], *, number: int) -> Rule:
    known = {field.name for field in fields(Rule)}
    unknown, missing = sorted(plain.keys() - known), sorted({"words", "choices"} - plain.keys())
    if unknown or missing:
        what = f"{unknown[0]!r} is unknown" if unknown else f"{missing[0]} is missing"
        raise ConfigError(f"lexicon, rule {number}: {what}; a rule has {', '.join(sorted(known))}")
    lists = {name: plain[name] for name in ("words", "unless") if name in plain}
    for name, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"lexicon, rule {number}: {name}={value!r}: give a list of words")
    for name in ("name", "template"):
        if not isinstance(plain.get(name, ""), str):
            raise ConfigError(f"lexicon, rule {number}: {name}={plain[name]!r}: give a text")
    if not isinstance(plain["choices"], dict):
        raise ConfigError(f"lexicon, rule {number}: choices={plain['choices']!r}: give words with their weights")
    changed = {name: tuple(value) for name, value in lists.items()}
    return Rule(**{"name": f"rule {number}", **plain, **changed})


def _check_names(rule: Rule) -> None:
    if not rule.words:
        raise ConfigError(f"lexicon, rule {rule.name!r}: words=[]: name the words that leave something open")
    for word in (*rule.words, *rule.unless):
        if word != word.strip() or not any(map(str.isalnum, word)):
            raise ConfigError(f"lexicon, rule {rule.name!r}: {word!r} is no word; write it without spaces around it")


def _check_choices(rule: Rule) -> None:
    for choice, weight in rule.choices.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight <= MAX_WEIGHT or choice != choice.strip():
            given = f"{choice!r} = {str(weight)[:20]}"
            raise ConfigError(f"lexicon, rule {rule.name!r}: {given}: give a word a weight from 0 to {MAX_WEIGHT:g}")
    if not sum(rule.choices.values()):
        raise ConfigError(f"lexicon, rule {rule.name!r}: all weights are 0; give at least one choice a weight")


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the words, the longest first; those of letters and spaces as whole words."""
    ordered = sorted(words, key=lambda word: (-len(word), word))
    return re.compile("|".join(_bounded(word) for word in ordered) or r"(?!)", re.IGNORECASE)


def _bounded(word: str) -> str:
    """Between letters that are written without spaces there is no boundary to be found."""
    letter = rf"[^\W_{_UNSPACED}]"
    before = rf"(?<!{letter})" if re.match(letter, word) else ""
    after = rf"(?!{letter})" if re.search(rf"{letter}$", word) else ""
    return before + re.escape(word) + after


def _places(prompt: str, match: re.Match[str]) -> tuple[int, int]:
    """The first and last word of the prompt that a match covers, by number."""
    before = len(_TOKEN.findall(prompt[: match.start()]))
    return before, before + len(_TOKEN.findall(match[0])) - 1


def _with_article(before: str, text: str) -> str:
    """What stands before `text`, its last word "a" or "an" as the next letter wants it; exceptions are not known."""
    match = _ARTICLE.search(before)
    if match is None:
        return before
    n = "n" if text.lower().startswith(_VOWELS) else ""
    return f"{before[: match.start()]}{match[1]}{n.upper() if match[1] == 'A' and match[2] == 'N' else n}{match[3]}"
