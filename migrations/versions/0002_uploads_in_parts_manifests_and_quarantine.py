"""Uploads in parts, manifests, quarantine, and what a sweep and an outage need"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    # First, while no table names jobs: SQLite makes the table anew.
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("counted_in", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True))
        batch_op.add_column(sa.Column("max_steps", sa.BigInteger(), nullable=True))
        batch_op.create_index(batch_op.f("ix_jobs_base"), ["base"], unique=False)
        batch_op.create_index(batch_op.f("ix_jobs_counted_in"), ["counted_in"], unique=False)
        batch_op.create_foreign_key(batch_op.f("fk_jobs_counted_in"), "rounds", ["counted_in"], ["id"])
    op.execute("update jobs set counted_in = round_id where weight is not null")

    op.add_column("rounds", sa.Column("merge_failures", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
    op.add_column("rounds", sa.Column("manifest", sa.JSON(), nullable=True))
    op.add_column("rounds", sa.Column("forgotten", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_index(op.f("ix_rounds_adapter"), "rounds", ["adapter"], unique=False)

    op.create_table(
        "beats",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_beats_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_beats")),
    )
    op.create_table(
        "condemned",
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_condemned")),
    )
    op.create_table(
        "housekeeping",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_housekeeping_single")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_housekeeping")),
    )
    op.execute("insert into housekeeping (id, at) values (1, '1970-01-01 00:00:00')")
    op.create_table(
        "quarantine",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("client_id", sa.String(length=40), nullable=False),
        sa.Column("problem", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["client_id"], ["clients.id"], name=op.f("fk_quarantine_client_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_quarantine_job_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quarantine")),
    )
    for column in ("at", "client_id", "job_id"):
        op.create_index(op.f(f"ix_quarantine_{column}"), "quarantine", [column], unique=False)

    op.create_table(
        "uploads",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column("offset", sa.BigInteger(), nullable=False),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint('"offset" <= length', name=op.f("ck_uploads_offset")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_uploads_job_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_uploads")),
    )
    op.create_index(op.f("ix_uploads_touched_at"), "uploads", ["touched_at"], unique=False)
    op.create_table(
        "parts",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=71), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["uploads.job_id"], name=op.f("fk_parts_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "start", name=op.f("pk_parts")),
    )
    op.create_index(op.f("ix_parts_digest"), "parts", ["digest"], unique=False)


def downgrade() -> None:
    for table in ("parts", "uploads", "quarantine", "housekeeping", "condemned", "beats"):
        op.drop_table(table)
    op.drop_index(op.f("ix_rounds_adapter"), "rounds")
    op.drop_column("rounds", "forgotten")
    op.drop_column("rounds", "manifest")
    op.drop_column("rounds", "merge_failures")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("fk_jobs_counted_in"), type_="foreignkey")
        batch_op.drop_index(batch_op.f("ix_jobs_counted_in"))
        batch_op.drop_index(batch_op.f("ix_jobs_base"))
        batch_op.drop_column("max_steps")
        batch_op.drop_column("counted_in")
