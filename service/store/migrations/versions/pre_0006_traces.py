"""Requests have the trace of the call that asked, and the id of their answer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "pre_0006"
down_revision = "pre_0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # With defaults, because workers of the version before go on writing this table.
    op.add_column("requests", sa.Column("answer_id", sa.LargeBinary(length=16), nullable=True))
    op.add_column("requests", sa.Column("trace_id", sa.String(length=32), nullable=False, server_default=sa.text("''")))
    op.add_column(
        "requests", sa.Column("parent_id", sa.String(length=16), nullable=False, server_default=sa.text("''"))
    )
    answered, traced = sa.text("answer_id is not null"), sa.text("trace_id <> ''")
    op.create_index(
        op.f("ix_requests_answer_id"), "requests", ["answer_id"], postgresql_where=answered, sqlite_where=answered
    )
    op.create_index(
        op.f("ix_requests_trace_id"), "requests", ["trace_id"], postgresql_where=traced, sqlite_where=traced
    )
