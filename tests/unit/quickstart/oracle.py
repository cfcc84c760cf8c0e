"""Answers worked out anew from the scene and the question's words alone.

Written without the demo's own functions for questions, on a plain table of rows and columns, so
that a mistake in one of the two shows.
"""

import re

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ROW_WORDS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMN_WORDS = {2: ("left", "right"), 3: ("left", "middle", "right")}

Board = list[list[int | None]]


def board_of(grid: int, cells: tuple[int | None, ...]) -> Board:
    """Rows of cells."""
    return [[cells[row * grid + column] for column in range(grid)] for row in range(grid)]


def name_of(grid: int, row: int, column: int) -> str:
    """What a cell is called."""
    if grid == 3 and row == column == 1:
        return "center"
    return f"{ROW_WORDS[grid][row]} {COLUMN_WORDS[grid][column]}"


def places(board: Board) -> dict[str, int | None]:
    """Cell name -> digit, in reading order."""
    grid = len(board)
    return {
        name_of(grid, row, column): board[row][column]
        for row in range(grid)
        for column in range(grid)
    }


def answer(board: Board, question: str) -> str:
    """The right answer to a question about a picture."""
    named = places(board)
    present = [str(digit) for digit in named.values() if digit is not None]
    if match := re.fullmatch(r"(?:Which digit|What) is at the (.+)\?", question):
        digit = named[match[1]]
        return "empty" if digit is None else str(digit)
    if match := re.fullmatch(r"Where is the (?:digit )?(\d)\?", question):
        (found,) = [name for name, digit in named.items() if digit == int(match[1])]
        return found
    if re.fullmatch(r"How many digits (?:are there|do you see)\?", question):
        return str(len(present))
    if match := re.fullmatch(r"(?:Is there|Do you see) a (\d)\?", question):
        return "yes" if match[1] in present else "no"
    if match := re.fullmatch(r"Is the (\d) (left|right) of the (\d)\?", question):
        columns = [
            [column for row in board for column, digit in enumerate(row) if digit == int(wanted)]
            for wanted in (match[1], match[3])
        ]
        (first,), (second,) = columns  # each stands exactly once
        return "yes" if (first < second if match[2] == "left" else first > second) else "no"
    if re.fullmatch(r"Read (?:all digits in order|the digits row by row)\.", question):
        return ", ".join(present)
    raise AssertionError(f"a question of no known form: {question}")


def text_answer(question: str) -> str:
    """The right answer to a question without a picture."""
    if match := re.fullmatch(r"How is (\d) written as a word\?", question):
        return WORDS[int(match[1])]
    if match := re.fullmatch(r"Which digit is called (\w+)\?", question):
        return str(WORDS.index(match[1]))
    if match := re.fullmatch(r"What comes (before|after) (\d+)\?", question):
        return str(int(match[2]) + (1 if match[1] == "after" else -1))
    raise AssertionError(f"a question of no known form: {question}")


def read_dense_caption(grid: int, caption: str) -> dict[str, int | None]:
    """Cell name -> digit, as a dense caption tells it."""
    text = caption.removesuffix(".")
    if ":" in text:
        pairs = [part.split(": ") for part in text.split(", ")]
        return {place: None if shown == "empty" else int(shown) for place, shown in pairs}
    names = [name_of(grid, row, column) for row in range(grid) for column in range(grid)]
    told = {place: int(digit) for digit, place in (p.split(" ", 1) for p in text.split(", "))}
    return {name: told.get(name) for name in names}
