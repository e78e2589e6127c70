"""Real English text that is on every machine which runs this: what the installed packages say of themselves.

A text is the beginning of a docstring, its label the family of the package that it stands in. Files are parsed, never
imported. What would make the task too easy, or the held-out rows dishonest, is left out:

- a text that names one of the packages is dropped (`families.toml` has the names): the label shall follow from what is said;
- of two texts that share five words in a row only the first is kept, so that nothing that was learned by heart helps;
- whether a text is held out is decided for its whole file, so that no held-out text's neighbours are trained on.

What stays is the vocabulary of each subject, such as "cursor" or "eigenvalue", and some texts that nobody could place.
For the same versions of Python and of the packages the corpus is the same.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import sysconfig
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from demo.departments import Row

FAMILIES = Path(__file__).with_name("families.toml")
PER_FILE = 10  # texts of one file at most, so that no single file stands for its family
HELD_OUT = 5  # one file in so many is held out
WORDS = range(9, 37)  # a text has at least the first and at most the last of so many words
SHARED = 5  # words in a row that no two texts share
SKIPPED = {"tests", "test", "testing", "_vendor", "__pycache__"}


def collect(per_family: int) -> list[Row]:
    """About so many texts of every family, or all that there are; takes a few seconds."""
    known = tomllib.loads(FAMILIES.read_text(encoding="utf-8"))
    giveaways = frozenset(known["giveaways"]["words"])
    seen: set[tuple[str, ...]] = set()
    rows: list[Row] = []
    for family, places in known["packages"].items():
        count = 0
        for name, file in _turns(places):
            fresh = list(itertools.islice(_unseen(file, seen, giveaways), PER_FILE))
            rows += [Row(text, family, held_out=_digest(name) % HELD_OUT == 0, source=name) for text in fresh]
            count += len(fresh)
            if count >= per_family:
                break
    return rows


def _unseen(file: Path, seen: set[tuple[str, ...]], giveaways: frozenset[str]) -> Iterator[str]:
    """The texts of a file that name no package and share no run of words with any before; takes note of them."""
    for doc in _docstrings(file):
        text = prose(doc)
        if text is None or not giveaways.isdisjoint(re.findall(r"[a-z0-9_]+", text.lower())) or (runs := _runs(text)) & seen:
            continue
        seen |= runs
        yield text


def _turns(places: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """All source files of some packages, one of each in turn, those of one package in the order of their names' digests."""
    files = [sorted(_files(place), key=lambda found: _digest(found[0])) for place in places]
    return (file for turn in itertools.zip_longest(*files) for file in turn if file is not None)


def _files(place: str) -> list[tuple[str, Path]]:
    """The source files of a package or module, each with a name that is the same on every machine; none if it is not here."""
    for kind in ("purelib", "platlib", "stdlib"):
        root = Path(sysconfig.get_path(kind), place)
        if root.is_dir():
            found = ((file.relative_to(root), file) for file in root.rglob("*.py"))
            return [(f"{place}/{name.as_posix()}", file) for name, file in found if SKIPPED.isdisjoint(name.parts)]
        if (module := root.with_name(root.name + ".py")).is_file():
            return [(place, module)]
    return []


def _digest(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _docstrings(file: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other people's escape sequences
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # some packages carry templates that only look like Python
            return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (doc := ast.get_docstring(node)):
            yield doc


# --- from docstrings to prose --------------------------------------------------------------------------------------------

SECTION = re.compile(
    r"\n\s*(Args|Arguments|Attributes|Examples?|Notes?|Parameters|Raises|References|Returns?|See Also|Usage|Warning|Yields)\b.{0,30}\n"
    r"|\n\s*[:@]\w|\n\s*[-=~*]{3,}\s*\n|>>>|::\s*\n|\n\s*\.\. "
)
ROLE = re.compile(r":[\w:+-]+:`([^`]*)`")
QUOTED = re.compile(r"`+([^`]*)`+_*")
STARRED = re.compile(r"\*\*?(\w[^*]*)\*\*?")


def prose(doc: str) -> str | None:
    """The first paragraphs of a docstring as one plain text, or None where they are no prose of a fitting length.

    Mark-up goes, because it would tell the package by its habits: roles keep their target's last name, quotes and stars
    their content.
    """
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", SECTION.split(doc.strip() + "\n")[0])[:2]:
        text = " ".join(STARRED.sub(r"\1", QUOTED.sub(r"\1", ROLE.sub(_target, paragraph))).split())
        if not _is_prose(text):
            break
        kept.append(text if text[-1] in ".!?:;" else text + ".")
    words = " ".join(kept).split()
    return " ".join(words[: WORDS[-1]]) if len(words) >= WORDS[0] else None


def _target(role: re.Match[str]) -> str:
    shown, _, _ = role[1].partition(" <")
    return shown.lstrip("~!.").rpartition(".")[2]


def _is_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in text)
    return bool(text) and text[0] not in ":.@>#<-=*|+[" and letters >= 0.85 * len(text) and len(text.split()) >= 4


def _runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[n : n + SHARED]) for n in range(max(1, len(words) - SHARED + 1))}
