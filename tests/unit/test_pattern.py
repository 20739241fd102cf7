"""Patterns of generated codes: what is drawn, what a check character tells, what is refused."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from service.errors import Conflict
from service.worker.pattern import ALPHABET, CHECKED_MAX, DIGITS, SPARSENESS, Pattern, folded, refuse_crowded

PLACEHOLDERS = st.text("#%-A", min_size=1, max_size=CHECKED_MAX).filter(lambda text: "#" in text or "%" in text)
LOOK_ALIKES = ("0O", "1IL", "2Z", "5S", "8B", "UV")


def test_no_two_characters_of_the_alphabet_look_alike() -> None:
    for group in LOOK_ALIKES:
        assert len(set(group) & set(ALPHABET)) == 0
    assert len(set(ALPHABET)) == len(ALPHABET) == 23


@given(PLACEHOLDERS, st.booleans(), st.integers())
def test_every_code_is_of_its_pattern(text: str, checked: bool, seed: int) -> None:
    pattern = Pattern(text + "*" * checked)
    for code in islice(pattern.draw(random.Random(seed)), 20):
        assert pattern.verifies(code)
        assert len(code) == len(pattern.text)
        for wanted, one in zip(pattern.text, code, strict=True):
            assert one in {"#": ALPHABET, "%": DIGITS, "*": ALPHABET + DIGITS}.get(wanted, wanted)


@given(PLACEHOLDERS, st.integers(), st.data())
def test_every_single_wrong_character_is_told(text: str, seed: int, data: st.DataObject) -> None:
    pattern = Pattern(text + "-*")
    code = next(pattern.draw(random.Random(seed)))
    at = data.draw(st.integers(0, len(code) - 1))
    wrong = data.draw(st.sampled_from(ALPHABET + DIGITS))
    assume(wrong != code[at])
    assert not pattern.verifies(code[:at] + wrong + code[at + 1 :])


@given(PLACEHOLDERS, st.integers(), st.data())
def test_every_two_neighbours_that_changed_places_are_told(text: str, seed: int, data: st.DataObject) -> None:
    pattern = Pattern(text + "*")
    code = next(pattern.draw(random.Random(seed)))
    at = data.draw(st.integers(0, len(code) - 2))
    assume(code[at] != code[at + 1])
    assert not pattern.verifies(code[:at] + code[at + 1] + code[at] + code[at + 2 :])


def test_the_check_digit_is_damm_s() -> None:
    assert Pattern("%%%*").fill("572") == "5724"  # the example of his thesis


def test_every_code_of_a_pattern_can_be_drawn() -> None:
    drawn = set(islice(Pattern("A%%").draw(random.Random(1)), 3_000))
    assert drawn == {f"A{number:02}" for number in range(100)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "1 to 128"), ("#" * 129, "1 to 128"), ("# #", "without space"), ("#\n", "without space"),
        ("Ä##", "printable ASCII"), ("SUN", "placeholders"), ("*", "placeholders"), ("=##", "formula"),
        ("#*#", "after all placeholders"), ("#**", "at most one check character"),
        ("#" * (CHECKED_MAX + 1) + "*", f"at most {CHECKED_MAX}"),
    ],
)  # fmt: skip
def test_a_pattern_by_which_no_good_code_can_be_drawn_is_refused(text: str, says: str) -> None:
    with pytest.raises(Conflict, match=says):
        Pattern(text)


@pytest.mark.parametrize("text", ["##", "%%%", "A-####", "#%#%*"])
@pytest.mark.parametrize("wanted", [1, 1_000, 5_000_000])
def test_a_crowded_pattern_is_refused_with_the_number_that_would_do(text: str, wanted: int) -> None:
    pattern = Pattern(text)
    if wanted * SPARSENESS <= pattern.space:
        refuse_crowded(pattern, 0, wanted)
        return
    with pytest.raises(Conflict) as refused:
        refuse_crowded(pattern, 0, wanted)
    more = pattern.longer(wanted)
    placeholder = "#" if "#" in text else "%"
    assert f"{more} more {placeholder} would do" in str(refused.value)
    refuse_crowded(Pattern(placeholder * more + text), 0, wanted)
    with pytest.raises(Conflict):
        refuse_crowded(Pattern(placeholder * (more - 1) + text), 0, wanted)


def test_codes_that_there_are_count_as_well() -> None:
    pattern = Pattern("#" * 5)
    refuse_crowded(pattern, 0, pattern.capacity)
    with pytest.raises(Conflict):
        refuse_crowded(pattern, 1, pattern.capacity)


def test_no_code_holds_a_word_that_is_kept_out() -> None:
    words = folded(["gag", " cat ", "Tee", ""])
    assert words == ("CAT", "GAG", "TEE")
    codes = list(islice(Pattern("%##-#", words).draw(random.Random(3)), 30_000))
    read = [code.replace("-", "").translate(str.maketrans("0123456789", "OIZEASGTBG")) for code in codes]
    assert not [code for code in read if any(word in code for word in words)]
    unfiltered = list(islice(Pattern("%##-#").draw(random.Random(3)), 30_000))
    assert any("CAT" in code.replace("-", "") for code in unfiltered)


def test_words_that_leave_no_code_are_told_and_not_looked_for_for_ever() -> None:
    pattern = Pattern("AAA#", ("AAA",))
    with pytest.raises(Conflict, match="leave no code"):
        next(pattern.draw(random.Random(1)))


def test_words_too_short_are_refused() -> None:
    with pytest.raises(Conflict, match="3 letters and more"):
        Pattern("####", ("AB",))


@pytest.mark.parametrize("word", ["---", "ÄÖ", "слово", "6-6"])
def test_words_of_which_no_letters_are_left_are_refused(word: str) -> None:
    with pytest.raises(Conflict, match="A to Z"):
        Pattern("####", folded([word]))


def test_accents_hide_no_word() -> None:
    codes = list(islice(Pattern("%##-#", folded(["cät"])).draw(random.Random(3)), 30_000))
    assert not [code for code in codes if "CAT" in code.replace("-", "")]
