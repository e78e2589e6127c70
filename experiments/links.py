"""Words of the trade, linked on a page where they are first used; and decisions, wherever one is named."""

from __future__ import annotations

import re
from pathlib import Path

GLOSSARY, STRATEGIES, DECISIONS = "glossary.md", "strategies.md", "decisions"
_TERMS = (
    "adapter, cap, changes, cohort, contestants, cut, energy, frozen, global adapter, held-out rows, kept energy, momentum, products, "
    "read out, slices, whole adapter"
)
_STRATEGIES = (
    "`delta`, `folded`, `hlora`, `raflora`, `flora`, `fedex`, `ffa`, `hetlora`, `reweighted`, `rotating`, FFA, FLoRA, FedEx, HetLoRA, "
    "federated averaging, zero padding"
)
WORDS = dict.fromkeys(_TERMS.split(", "), GLOSSARY) | dict.fromkeys(_STRATEGIES.split(", "), STRATEGIES)
LEFT = r"^```.*?^```|^[#|<][^\n]*|!?\[[^\]]*\]\([^)]*\)"  # blocks of code, headings, tables, and what is a link already
FOUND = re.compile(
    rf"(?ms)(?P<left>{LEFT})|(?P<word>(?<![\w`-])(?:{'|'.join(sorted(map(re.escape, WORDS), key=len, reverse=True))})(?![\w`-]))"
    r"|(?P<decision>decision (?P<number>\d+))|(?P<code>`[^`]*`)"
)


def linked(text: str, docs: Path) -> str:
    """The text of a page in that folder, with these links."""
    seen: set[str] = set()

    def link(found: re.Match[str]) -> str:
        if (word := found["word"]) and word not in seen:
            seen.add(word)
            return f"[{word}]({WORDS[word]})"
        files = sorted((docs / DECISIONS).glob(f"{int(found['number']):04}-*.md")) if found["decision"] else []
        return f"[{found[0]}]({DECISIONS}/{files[0].name})" if files else found[0]

    return FOUND.sub(link, text)
