"""What training starts from where that is no slice, and which of its directions a job trains"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "starts",
        sa.Column("round_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("rank", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["round_id"], ["rounds.id"], name=op.f("fk_starts_round_id")),
        sa.PrimaryKeyConstraint("round_id", "rank", name=op.f("pk_starts")),
    )
    op.create_index(op.f("ix_starts_digest"), "starts", ["digest"], unique=False)
    op.add_column("jobs", sa.Column("directions", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "directions")
    op.drop_table("starts")
