"""The skills of the demo zoo: generated tasks with exact answers."""

import datetime
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LEXICON = """
amber apple arrow basket bridge candle castle cloud copper falcon feather forest garden hammer harbor island jungle
kettle lantern maple marble meadow mirror needle ocean orange pepper pillow river rocket saddle silver stone thunder
tiger tunnel violet window winter yellow
"""
WORDS = LEXICON.split()

# Spelled out, because strftime's %B follows the locale.
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)

NUMERALS = (
    (1000, "M"),
    (900, "CM"),
    (500, "D"),
    (400, "CD"),
    (100, "C"),
    (90, "XC"),
    (50, "L"),
    (40, "XL"),
    (10, "X"),
    (9, "IX"),
    (5, "V"),
    (4, "IV"),
    (1, "I"),
)


@dataclass(frozen=True)
class Row:
    """One prompt and its only right answer."""

    prompt: str
    completion: str


def dates(rng: random.Random) -> Row:
    """Draw a written-out date, answered in ISO 8601."""
    day = datetime.date(1950, 1, 1) + datetime.timedelta(rng.randrange(30000))
    return Row(f"{MONTHS[day.month - 1]} {day.day}, {day.year}", day.isoformat())


def roman(rng: random.Random) -> Row:
    """Draw a number below 2000, answered in Roman numerals."""
    number = rest = rng.randrange(1, 2000)
    numeral = ""
    for value, letters in NUMERALS:
        numeral += letters * (rest // value)
        rest %= value
    return Row(f"{number} in roman", numeral)


def sort(rng: random.Random) -> Row:
    """Draw three words, answered in alphabetical order."""
    words = rng.sample(WORDS, 3)
    return Row("sort " + " ".join(words), " ".join(sorted(words)))


def record(rng: random.Random) -> Row:
    """Draw a sentence about a purchase, answered as a JSON object."""
    who, what = rng.sample(WORDS, 2)
    count = rng.randrange(2, 100)
    return Row(
        f"{who} bought {count} {what}s", json.dumps({"who": who, "n": count, "what": what}, separators=(",", ":"))
    )


def swap(rng: random.Random) -> Row:
    """Draw two words, answered in the opposite order."""
    first, second = rng.sample(WORDS, 2)
    return Row(f"swap {first} {second}", f"{second} {first}")


TASKS: dict[str, Callable[[random.Random], Row]] = {
    "dates": dates,
    "roman": roman,
    "sort": sort,
    "record": record,
    "swap": swap,
}


def is_held_out(prompt: str) -> bool:
    """Say whether a prompt belongs to the test split, about one in eight.

    The prompt's own hash decides, so no seed and no order of drawing can bring a test row into training.

    Args:
        prompt: the prompt, without a trailing newline.

    Returns:
        True for a test prompt, False for a training prompt.
    """
    return hashlib.sha256(prompt.encode()).digest()[0] < 32


def training_rows(task: str, rng: random.Random) -> Iterator[Row]:
    """Draw training rows without end, with repetition.

    Args:
        task: a name in `TASKS`.
        rng: the source of chance.

    Returns:
        An infinite iterator over rows that are not held out.

    Raises:
        KeyError: if there is no such task.
    """
    draw = TASKS[task]
    while True:
        row = draw(rng)
        if not is_held_out(row.prompt):
            yield row


def held_out_rows(task: str, count: int, rng: random.Random) -> list[Row]:
    """Draw distinct held-out rows.

    Args:
        task: a name in `TASKS`.
        count: how many rows; every task has more than 150.
        rng: the source of chance.

    Returns:
        The rows, no prompt twice.

    Raises:
        KeyError: if there is no such task.
    """
    draw = TASKS[task]
    rows: dict[str, Row] = {}
    while len(rows) < count:
        row = draw(rng)
        if is_held_out(row.prompt):
            rows[row.prompt] = row
    return list(rows.values())
