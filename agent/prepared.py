"""Rows as token ids, kept in memory from job to job while the files that they were read from stay as they are. Never on disk."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from agent.data import Catalogue, Part
from agent.encoding import Example, Tokenizer, encode
from protocol.messages import Job

MOST = 4_000_000  # tokens, about 32 MB; what is larger is tokenised anew for every job


@dataclass(frozen=True)
class Prepared:
    """The rows of a device's last training, and of its last evaluation."""

    catalogue: Catalogue
    most: int = MOST
    _kept: dict[Part, tuple[Hashable, list[Example]]] = field(default_factory=dict, repr=False)

    def examples(self, job: Job, part: Part, tokenizer: Tokenizer) -> list[Example]:
        """One part of a job's data, as it is in its files now. Raises DataRefusal."""
        version = self.catalogue.version(job.data, part)
        key = (version, job.data, job.task.model_dump_json(), tokenizer)
        kept, found = self._kept.pop(part, (None, []))
        if kept != key:
            found = encode(self.catalogue.rows(job.data, part), job.task, tokenizer, job.data)
        if version is not None and sum(len(example.ids) for example in found) <= self.most:
            self._kept[part] = key, found
        return found
