"""What the operator's command is told by its environment; the only place that reads it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where the coordinator is and who asks, each from `HLORA_<NAME>`; the command's options override it."""

    model_config = SettingsConfigDict(env_prefix="HLORA_", frozen=True, extra="ignore", env_ignore_empty=True)

    url: str = Field(default="http://127.0.0.1:8080", description="the coordinator's address")
    token: SecretStr | None = Field(default=None, description="an admin's or viewer's token")
    insecure: bool = Field(default=False, description="allow the token to travel over plain HTTP to another machine")
    ca_file: Path | None = Field(default=None, description="certificates to trust instead of the usual ones, as PEM")
