"""Tables and blocks in Markdown, for the pages and reports that scripts write."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """Returns a Markdown table whose first ``words`` columns hold words, the others figures, to the right."""
    lines = [headings, ["---"] * words + ["---:"] * (len(headings) - words), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def insert_blocks(text: str, blocks: dict[str, str], where: str, writer: str) -> str:
    """Returns a page with the blocks in the place of those of the same name, new ones at the end.

    Args:
        text: the page.
        blocks: what is to stand between the markers of each name.
        where: the page's place, for the error.
        writer: what makes the blocks, named in the markers.

    Raises:
        ValueError: a block of the page has no end.
    """
    for name, content in blocks.items():
        begin, end = f"<!-- begin {name} ({writer}) -->", f"<!-- end {name} -->"
        block = f"{begin}\n\n{content}\n\n{end}"
        before, found, rest = text.partition(begin)
        if not found:
            text = f"{text.rstrip()}\n\n{block}\n"
            continue
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{where} has the line {begin} but not {end}; put that behind the block's last line.")
        text = before + block + after
    return text
