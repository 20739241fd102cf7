"""The audit log says what came of a change, and whether a worker has it in its log."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "pre_0007"
down_revision = "pre_0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # With defaults, because commands of the version before go on writing this table.
    op.add_column("audit_log", sa.Column("version", sa.BigInteger(), nullable=True))
    op.add_column("audit_log", sa.Column("refused", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("audit_log", sa.Column("written_at", sa.BigInteger(), nullable=True))
    op.execute("update audit_log set written_at = at")  # of before there were lines of them
    unwritten = sa.text("written_at is null")
    op.create_index(
        op.f("ix_audit_log_written_at"), "audit_log", ["written_at"], postgresql_where=unwritten, sqlite_where=unwritten
    )
