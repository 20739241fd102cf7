"""The operator's side: withdrawn codes, pools that are generated, and in which catalogue a campaign last changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "pre_0002"
down_revision = "pre_0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("pools", sa.Column("generator", sa.Text(), nullable=True))
    # With a default, because processes of the version before go on writing these tables.
    op.add_column("campaigns", sa.Column("changed_in", sa.BigInteger(), nullable=False, server_default="0"))
    op.add_column("set_asides", sa.Column("why", sa.String(length=16), nullable=False, server_default="little_life"))
    op.create_table(
        "withdrawn",
        sa.Column("lot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq_from", sa.BigInteger(), nullable=False),
        sa.Column("seq_to", sa.BigInteger(), nullable=False),
        sa.Column("withdrawn_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("seq_from < seq_to", name=op.f("ck_withdrawn_range")),
        sa.ForeignKeyConstraint(["lot"], ["lots.id"], name=op.f("fk_withdrawn_lot")),
        sa.PrimaryKeyConstraint("lot", "seq_from", name=op.f("pk_withdrawn")),
    )
