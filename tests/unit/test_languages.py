"""The language table: codes, aliases, texts, and what it says about how far they can be trusted."""

import unicodedata

import pytest

from megatron_copsd.errors import UserError
from megatron_copsd.languages import LANGUAGES, language

CODES = "EN DE ES FR JA ZH RU SW BN TE TH AMH EWE HAU IBO KIN LIN LUG ORM SNA SOT SWA TWI VAI WOL XHO YOR ZUL"
TEXTS = ("problem_label", "solution_label", "instruction", "think_prefix", "transition")
SCRIPT_NAMES = {"Beng": "BENGALI", "Telu": "TELUGU", "Thai": "THAI", "Ethi": "ETHIOPIC", "Cyrl": "CYRILLIC"}


def test_all_codes_are_known_and_only_swahili_has_two() -> None:
    codes = CODES.split()
    assert {language(code).code for code in codes} == {entry.code for entry in LANGUAGES} == set(codes) - {"SW"}
    assert language("SW") is language("SWA")


@pytest.mark.parametrize(
    ("name", "code"),
    [("swa", "SWA"), ("swh_Latn", "SWA"), ("sw", "SWA"), ("ben", "BN"), ("BEN_beng", "BN"), ("jpn-Jpan", "JA"),
     ("zho_Hans", "ZH"), ("yo", "YOR"), ("ENG", "EN"), ("FRA", "FR"), ("Southern Sotho", "SOT"), (" am ", "AMH")],
)  # fmt: skip
def test_aliases_resolve_whatever_their_case(name: str, code: str) -> None:
    assert language(name).code == code


@pytest.mark.parametrize("name", ["", "xx", "zho_Hant", "aka", "e"])
def test_unknown_or_ambiguous_names_are_errors_and_never_english(name: str) -> None:
    with pytest.raises(UserError, match="unknown language"):
        language(name)


def test_error_names_the_place_and_the_nearest_code() -> None:
    with pytest.raises(UserError, match=r"data\.train\[0\]\.language: 'SWAH'.*Did you mean SWA.*ZUL"):
        language("SWAH", "data.train[0].language")


@pytest.mark.parametrize("entry", LANGUAGES, ids=lambda entry: entry.code)
def test_every_row_has_its_own_clean_texts(entry) -> None:
    for name in TEXTS:
        text = getattr(entry, name)
        assert text == text.strip()
        assert text == unicodedata.normalize("NFC", text)
        assert "  " not in text
        assert "\n" not in text
    assert entry.instruction.count("\\boxed{}") == 1
    assert "\\boxed" not in entry.think_prefix + entry.transition
    if entry.code != "EN":
        english = language("EN")
        assert all(getattr(entry, name) != getattr(english, name) for name in TEXTS)


@pytest.mark.parametrize("entry", [e for e in LANGUAGES if e.script in SCRIPT_NAMES], ids=lambda entry: entry.code)
def test_texts_are_in_the_script_the_row_names(entry) -> None:
    for name in TEXTS:
        letters = [c for c in getattr(entry, name).replace("\\boxed", "") if c.isalpha()]
        assert letters
        assert all(unicodedata.name(c).startswith(SCRIPT_NAMES[entry.script]) for c in letters)


def test_rows_nobody_checked_carry_a_caveat() -> None:
    assert language("EN").caveat is None
    assert [entry.code for entry in LANGUAGES if entry.caveat is None] == ["EN"]
    assert language("VAI").caveat == "the prompt texts of VAI are written in EN, not in Vai"
    assert "SWA" in language("SWA").caveat
