"""What an operator sets by environment; the only reader of it on this side."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from protocol import errors

DAY = 86_400
CENTURY_DAYS = 36_500  # farther back the calendar ends; whoever wants to keep something for ever is told the most that there is


class Settings(BaseSettings):
    """The coordinator's settings. Every one has a default that works on one machine; each is `HLORA_COORDINATOR_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="HLORA_COORDINATOR_", frozen=True, extra="ignore")

    data: Path = Field(default=Path("hlora-data"), description="folder of the default database, blobs and spool")
    database_url: str | None = Field(default=None, description="SQLAlchemy URL; by default a SQLite file in the data folder")
    blobs_url: str | None = Field(default=None, description="obstore URL; by default files in the data folder")
    direct_seconds: float | None = Field(
        default=None,
        gt=0,
        le=604800,
        description="large slices go straight from and to the object store, at signed addresses that are good for so long; "
        "by default everything goes through the coordinator",
    )
    spool: Path | None = Field(default=None, description="folder of unfinished uploads and merges; by default in the data folder")
    executor: str = Field(
        default="threads://", description="where modules are merged: threads://N, processes://N, cuda://N or dask://HOST:PORT"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8080, ge=0, le=65535, description="port to listen on; 0 for any free one")
    tick_seconds: float = Field(default=1.0, gt=0, le=DAY, description="longest pause between two looks of the conductor")
    poll_seconds: float = Field(
        default=20.0, gt=0, le=300, description="how long a poll for work may wait; longer in a fleet of more than 50 times as many clients"
    )
    rejections: int = Field(default=3, ge=1, le=10**6, description="a client is paused after so many rejected contributions in a row")
    keep_rounds: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="contributions and slices of rounds older than a run's last so many published ones are given up; "
        "global adapters stay; by default nothing is",
    )
    housekeeping_seconds: float = Field(
        default=600.0, gt=0, le=30 * DAY, description="how often one of the coordinators gives up what is old"
    )
    sweep_grace_seconds: float = Field(
        default=3600.0, ge=0, le=CENTURY_DAYS * DAY, description="bytes that nothing names are deleted when they are so old"
    )
    quarantine_bytes: int = Field(default=2**30, ge=0, lt=2**53, description="most bytes of rejected slices that are kept, the newest")
    quarantine_days: float = Field(
        default=30.0, gt=0, le=CENTURY_DAYS, description="how long a rejected contribution is kept, with its reason"
    )
    event_days: float = Field(default=365.0, gt=0, le=CENTURY_DAYS, description="how long the log of changes is kept")
    stall_seconds: float = Field(
        default=30.0, gt=0, le=DAY, description="a body of which no byte comes for so long is waited for no longer"
    )
    json_limit_bytes: int = Field(
        default=8 * 2**20, ge=2**16, le=2**30, description="longest plan as JSON; what else is sent as JSON may have 64 KiB, a profile 256"
    )
    log_json: bool = Field(default=False, description="logs as JSON lines instead of text")
    crash_at: str | None = Field(
        default=None, description="for tests: die at this point, as by `kill -9`; NAME, or NAME:N for the n-th time"
    )

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.data.resolve() / 'hlora.sqlite'}"

    @property
    def blobs(self) -> str:
        """The store's URL. Raises Conflict where an earlier version put the blobs elsewhere, because the folder's name has a %."""
        if self.blobs_url:
            return self.blobs_url
        place = self.data.resolve() / "blobs"
        former = Path(unquote(str(place)))
        if former.is_dir() and not place.exists():
            raise errors.Conflict(f"an earlier version kept the blobs of {self.data} in {former}: move that folder to {place}")
        return place.as_uri()

    @property
    def spool_folder(self) -> Path:
        return self.spool or self.data.resolve() / "spool"
