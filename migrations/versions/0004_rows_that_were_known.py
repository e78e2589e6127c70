"""How many rows a client was known to have when it was drawn, whatever its profile says later"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("known_rows", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "known_rows")
