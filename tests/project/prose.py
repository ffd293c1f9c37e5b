"""Sentences of comments and docstrings: python -m tests.project.prose prints those of 25 words and more, by file."""

import ast
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for path in ROOT.rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh") and not path.is_symlink()
    if not any(part.startswith((".", "__py")) for part in path.relative_to(ROOT).parts)
)
LONGEST = 24  # words
# A full stop, question or exclamation mark, perhaps followed by quotes or brackets, before white space.
END = re.compile(r"(?<=[^.…][.!?])[\"')\]`]*\s+|(?<=[^.…][.!?][\"')\]`])\s+")
ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|etc|al|approx|no|fig|sec)\.$", re.IGNORECASE)


def sentences(prose: str) -> Iterator[str]:
    """The sentences of a text. Blank lines and items of a list end one; tables, code and pictures are indented."""
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*] )", prose):
        indented = "    " if paragraph.startswith(("- ", "* ")) else "  "
        lines = [line for line in paragraph.splitlines() if not line.startswith((indented, "\t"))]
        begun = ""
        for part in END.split(" ".join(line.strip() for line in lines)):
            begun = f"{begun} {part}".strip()
            if not ABBREVIATION.search(begun):
                yield begun
                begun = ""
        if begun:
            yield begun


def words(sentence: str) -> int:
    """How many words a sentence has: what stands between spaces and holds a letter or digit; [B, T, C] is one."""
    return sum(bool(re.search(r"\w", word)) for word in re.sub(r"\[[^\]]*\]", "[shape]", sentence).split())


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every docstring, and of every comment with the comments on the lines right below it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring
    block: list[str] = []
    start = last = column = -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        row, at = token.start
        if block and (row != last + 1 or at != column):
            yield start, textwrap.dedent("\n".join(block))
            block = []
        if not block:
            start = row
        block.append(token.string.removeprefix("#").removeprefix(" "))
        last, column = row, at
    if block:
        yield start, textwrap.dedent("\n".join(block))


def comments_of_cpp(source: str) -> Iterator[tuple[int, str]]:
    """As prose_of, for C++: comments that begin with two slashes; one that follows code stands alone."""
    block: list[str] = []
    lines = [*source.splitlines(), ""]
    for row, line in enumerate(lines, 1):
        code, slashes, comment = line.partition("//")
        if slashes and not code.strip():
            block.append(comment.removeprefix(" "))
            continue
        if block:
            yield row - len(block), "\n".join(block)
            block = []
        if slashes:
            yield row, comment.strip()


def prose_in(path: Path) -> list[tuple[int, str]]:
    """(line, text) of a file's comments and, in Python, docstrings."""
    source = path.read_text(encoding="utf-8")
    return list(prose_of(source) if path.suffix == ".py" else comments_of_cpp(source))


def long_sentences(path: Path) -> list[tuple[int, int, str]]:
    """(line where its text begins, words, sentence) of each that is too long in a file."""
    return [
        (line, words(sentence), sentence)
        for line, prose in prose_in(path)
        for sentence in sentences(prose)
        if words(sentence) > LONGEST
    ]


if __name__ == "__main__":
    for path in SOURCES:
        for line, count, sentence in long_sentences(path):
            print(f"{path.relative_to(ROOT)}:{line}: {count} words: {sentence}")
