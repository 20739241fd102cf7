"""What generated codes look like: a pattern of placeholders, drawn from a secure random source.

``#`` stands for one of 23 letters and digits of which no two look alike, ``%`` for a digit, ``*`` for a check
character; everything else stands for itself.  ``SPR-####-###*`` is one.

The check character covers the random ones before it.  Over digits alone it is a digit, by Damm's quasigroup; otherwise
one of the 23, their weighted sum modulo 23, a prime.  Both tell every single wrong character and every two neighbours
that changed places, the check character among them.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Collection, Iterator
from typing import Final

import msgspec

from service.errors import Conflict

# Without 0 O, 1 I L, 2 Z, 5 S, 8 B and U V, which are mistaken for each other in print and by hand.
ALPHABET: Final = "34679ACDEFGHJKMNPQRTWXY"
DIGITS: Final = "0123456789"

# Possible codes for each one that there is: a guess is a code at most once in so many, and codes drawn twice stay rare.
SPARSENESS: Final = 1_000

CHARACTERS_MAX: Final = 128  # the column's width

# With more the last one and the check character could change places unseen: their weights would be 22 and -1.
CHECKED_MAX: Final = len(ALPHABET) - 2

# Words that codes must not contain.  A filter of short ones, or of many, leaves hardly any code.
WORDS_MAX: Final = 10_000
WORD_CHARACTERS_MIN: Final = 3

# Draws for one code before it is said that the words leave none.
DRAWS_MAX: Final = 1_000

_DAMM: Final = (
    "0317598642", "7092154863", "4206871359", "1750983426", "6123045978",
    "3674209581", "5869720134", "8945362017", "9438617205", "2581436790",
)  # fmt: skip

# What a digit of a code is read as by who looks for words in it.
_LOOKS_LIKE: Final = str.maketrans("0123456789", "OIZEASGTBG")


class Pattern(msgspec.Struct, frozen=True):
    """A pattern that codes can be drawn by.  ``words``: none of them is to be read in a code, whatever its case and
    with digits read as the letters that they look like."""

    text: str
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises Conflict if no code can be drawn by it, or only bad ones."""
        if not 1 <= len(self.text) <= CHARACTERS_MAX or re.fullmatch(r"[\x21-\x7e]+", self.text) is None:
            raise Conflict(f"a pattern has 1 to {CHARACTERS_MAX} printable ASCII characters without space")
        if self.text[0] == "=":
            raise Conflict("a code must not begin with =, as a spreadsheet's formula does")
        if not self._random:
            raise Conflict("a pattern needs placeholders: # for a letter or digit, % for a digit")
        if "*" in self.text and re.fullmatch(r"[^*]*\*[^*#%]*", self.text) is None:
            raise Conflict("a pattern has at most one check character (*), after all placeholders")
        if "*" in self.text and "#" in self.text and len(self._random) > CHECKED_MAX:
            raise Conflict(f"a check character covers at most {CHECKED_MAX} others")
        if len(self.words) > WORDS_MAX or any(len(_read(word)) < WORD_CHARACTERS_MIN for word in self.words):
            raise Conflict(
                f"at most {WORDS_MAX} words of {WORD_CHARACTERS_MIN} letters and more, A to Z, can be kept out"
            )

    @property
    def space(self) -> int:
        """How many codes there are of this pattern, words not looked at."""
        return math.prod(len(_CHARACTERS[one]) for one in self._random)

    @property
    def capacity(self) -> int:
        """How many codes may be drawn altogether, so that they stay sparse."""
        return self.space // SPARSENESS

    def draw(self, source: random.Random) -> Iterator[str]:
        """Codes without end, each independent of those before; so one may come twice.

        Raises Conflict if the words leave none.
        """
        unwanted = frozenset(map(_read, self.words))
        lengths = sorted({len(word) for word in unwanted})
        while True:
            for _ in range(DRAWS_MAX):
                code = self.fill(self._spelled(source.randrange(self.space)))
                if not unwanted or unwanted.isdisjoint(_parts(_read(code), lengths)):
                    break
            else:
                raise Conflict(
                    f"the words to keep out leave no code of {self.text}: take fewer words or another pattern"
                )
            yield code

    def fill(self, drawn: str) -> str:
        """The code with these characters for its placeholders, in order."""
        characters = iter(drawn)
        check = check_character(drawn, digits="#" not in self.text) if "*" in self.text else ""
        return "".join(check if one == "*" else next(characters) if one in _CHARACTERS else one for one in self.text)

    def verifies(self, code: str) -> bool:
        """Whether ``code`` is of this pattern and its check character, if it has one, is right."""
        if len(code) != len(self.text):
            return False
        drawn = ""
        for wanted, one in zip(self.text, code, strict=True):
            if wanted in _CHARACTERS:
                if one not in _CHARACTERS[wanted]:
                    return False
                drawn += one
            elif wanted != "*" and wanted != one:
                return False
        return self.fill(drawn) == code

    def longer(self, codes: int) -> int:
        """How many more ``#`` it would take (``%`` if it has digits alone) to have room for so many codes."""
        more, space = 0, self.space
        while space // SPARSENESS < codes:
            space *= len(ALPHABET) if "#" in self.text else 10
            more += 1
        return more

    def _spelled(self, number: int) -> str:
        drawn = []
        for one in self._random:
            number, at = divmod(number, len(_CHARACTERS[one]))
            drawn.append(_CHARACTERS[one][at])
        return "".join(drawn)

    @property
    def _random(self) -> str:
        return "".join(one for one in self.text if one in _CHARACTERS)


_CHARACTERS: Final = {"#": ALPHABET, "%": DIGITS}


def check_character(drawn: str, *, digits: bool) -> str:
    """The check character over these random ones; ``digits``: by the rule for digits alone."""
    if digits:
        interim = 0
        for one in drawn:
            interim = int(_DAMM[interim][int(one)])
        return str(interim)
    total = sum(weight * _VALUES[one] for weight, one in enumerate(drawn, 1))
    return ALPHABET[total % len(ALPHABET)]


# A digit that is not in the alphabet has the value of one of its letters that no digit has; so all ten differ.
_VALUES: Final = dict(zip(ALPHABET + "01258", [*range(len(ALPHABET)), *range(18, 23)], strict=True))


def refuse_crowded(pattern: Pattern, there: int, more: int) -> None:
    """Raises Conflict, with what would do, if ``more`` codes beside those ``there`` are too many for the pattern."""
    if there + more <= pattern.capacity:
        return
    placeholder = "#" if "#" in pattern.text else "%"
    raise Conflict(
        f"{pattern.text} has {pattern.space:,} codes, enough for {pattern.capacity:,} that can't be guessed "
        f"(1 in {SPARSENESS:,}), and {there + more:,} are wanted: {pattern.longer(there + more)} more {placeholder} "
        "would do"
    )


def folded(words: Collection[str]) -> tuple[str, ...]:
    """Words as a pattern keeps them: each once, in capitals."""
    return tuple(sorted({word.strip().upper() for word in words if word.strip()}))


def _read(text: str) -> str:
    """What somebody reads in ``text`` who looks for words: letters alone, without their accents."""
    plain = text if text.isascii() else unicodedata.normalize("NFKD", text)
    return re.sub(r"[^A-Z]", "", plain.upper().translate(_LOOKS_LIKE))


def _parts(text: str, lengths: Collection[int]) -> Iterator[str]:
    """Every part of ``text`` that has one of these lengths: looked up, ten thousand words cost no more than ten."""
    return (text[at : at + length] for length in lengths for at in range(len(text) - length + 1))
