"""What the agent is told by its environment; the only place that reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """One agent's settings, each from `HLORA_AGENT_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="HLORA_AGENT_", frozen=True, extra="ignore")

    home: Path = Field(default=Path("~/.hlora/agent"), description="credential.json, datasets.toml, policy.toml and work in progress")
    url: str | None = Field(default=None, description="the coordinator's address, for enrolment")
    token: SecretStr | None = Field(default=None, description="the enrolment token, for enrolment")
    insecure: bool = Field(default=False, description="allow the credential to travel over plain HTTP to another machine")
    ca_file: Path | None = Field(default=None, description="certificates to trust instead of the usual ones, as PEM")
    proxy: str | None = Field(default=None, description="address of the HTTP proxy to go through")
    threads: int | None = Field(default=None, ge=1, description="processor threads that training may use; by default torch's choice")
    wait_seconds: float = Field(
        default=50.0, ge=0, le=300, description="how long one question for work may stay open; many proxies cut what is silent for 60 s"
    )
    checkpoint_seconds: float = Field(
        default=30.0, ge=0, le=30 * 86_400, description="how much training may have to be repeated after the agent was killed; 0: all of it"
    )
    log: Literal["console", "json"] = Field(default="console", description="logs as text, or as JSON lines")
    crash_at: str | None = Field(
        default=None, description="for tests: die at this point, as by `kill -9`; NAME, or NAME:N for the n-th time"
    )

    @property
    def folder(self) -> Path:
        """The home folder, without `~`."""
        return self.home.expanduser()
