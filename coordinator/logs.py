"""How the coordinator's log is written on the standard error: lines of text, or of JSON."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, WrappedLogger


def configure(as_json: bool) -> None:
    """From now on, in this process."""
    text = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_trace)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info if as_json else structlog.processors.StackInfoRenderer(),
            *([structlog.processors.JSONRenderer()] if as_json else [_tame, text]),
        ],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )


@dataclass(frozen=True)
class _Odd:
    """A text that the renderer would write as it is, and that a terminal might obey: clients' words are in the log."""

    text: str

    def __repr__(self) -> str:
        return repr(self.text)


def _tame(_: WrappedLogger, __: str, entry: EventDict) -> EventDict:
    return {name: _Odd(value) if isinstance(value, str) and not value.isprintable() else value for name, value in entry.items()}


def _trace(file: TextIO, about: ExcInfo) -> None:
    """A plain trace: the prettier ones show every frame's values, and with them callers' secrets."""
    plain = io.StringIO()
    structlog.dev.plain_traceback(plain, about)
    file.write("".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in plain.getvalue()))
