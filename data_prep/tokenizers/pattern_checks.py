"""Regular expressions that somebody else wrote, for a matcher that goes back and tries again (Oniguruma).

Time grows exponentially where a repeated group can match one text in several ways, as in `(a+)+` and `(a|a)*`. Patterns of
tokenizers repeat classes of characters and groups of fixed length, so that everything else is refused.
"""

import re

MOST_CHARS = 8192
MOST_COPIES = 4096
"""Largest product of the counts of nested repetitions, by which a compiled pattern grows."""
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(\d*)(,?)(\d*)\})")
_BACKWARD = re.compile(r"\\(?:[1-9]|k|g)")
_STRANGE_GROUP = re.compile(r"\(\*|\(\?(?:[(~{]|<[^=!])")
"""Names, conditions, absence and calls."""


def pattern_problem(pattern: str) -> str:
    """Return what speaks against a pattern, as the rest of a sentence about it; empty if nothing does."""
    if len(pattern) > MOST_CHARS:
        return f"has more than {MOST_CHARS} characters"
    # Of each open group, the outermost first: whether it can match in several ways, and how many copies of it there are.
    varies, copies = [False], [1.0]
    place = 0
    while place < len(pattern):
        varied, copied, end = False, 1.0, place + 1
        sign = pattern[place]
        if sign == "\\":
            if _BACKWARD.match(pattern, place):
                return "refers to its own groups"
            end = place + 2
            if pattern[end : end + 1] == "{" and pattern[place + 1] in "pPxo":
                end = pattern.find("}", end) + 1 or len(pattern)
        elif sign == "[":
            end = _class_end(pattern, place)
        elif sign == "(":
            if _STRANGE_GROUP.match(pattern, place):
                return "has a group that is no plain one"
            varies.append(False)
            copies.append(1)
            place = end
            continue
        elif sign == ")" and len(varies) > 1:
            varied, copied = varies.pop(), copies.pop()
        elif sign == "|":
            varies[-1] = True
        quantifier = _QUANTIFIER.match(pattern, end)
        if quantifier is not None and sign not in "|(":
            least, most = _counts(quantifier)
            end = quantifier.end()
            if pattern[end : end + 1] in ("?", "+"):
                end += 1
            if varied and most > 1:
                return "repeats what can match in several ways"
            varied = varied or least != most
            copied *= max(1, least, most if most < float("inf") else 1)
            if copied > MOST_COPIES:
                return f"repeats more than {MOST_COPIES} times"
        varies[-1] = varies[-1] or varied
        copies[-1] = max(copies[-1], copied)
        place = end
    return ""


def _counts(quantifier: re.Match[str]) -> tuple[float, float]:
    sign = quantifier[0][0]
    if sign != "{":
        return {"*": (0, float("inf")), "+": (1, float("inf")), "?": (0, 1)}[sign]
    least = int(quantifier[1][:9] or 0)
    return least, least if not quantifier[2] else int(quantifier[3][:9] or 0) if quantifier[3] else float("inf")


def _class_end(pattern: str, place: int) -> int:
    """The place behind a class of characters, which may hold others."""
    depth = 0
    while place < len(pattern):
        if pattern[place] == "\\":
            place += 1
        elif pattern[place] == "[":
            depth += 1
            # A bracket that comes first is a character.
            first = place + 2 if pattern[place + 1 : place + 2] == "^" else place + 1
            place += pattern[first : first + 1] == "]" and first - place
        elif pattern[place] == "]":
            depth -= 1
            if not depth:
                return place + 1
        place += 1
    return len(pattern)
