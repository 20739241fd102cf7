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
    # With a default, because processes of the version before go on making campaigns.
    op.add_column("campaigns", sa.Column("changed_in", sa.BigInteger(), nullable=False, server_default="0"))
    op.create_table(
        "withdrawn",
        sa.Column("lot", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=True),
        sa.Column("generation", sa.BigInteger(), nullable=True),
        sa.Column("outbox_seq", sa.BigInteger(), nullable=True),
        sa.Column("ordinal", sa.Integer(), nullable=True),
        sa.Column("withdrawn_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("lot", "seq", name=op.f("pk_withdrawn")),
        sa.UniqueConstraint(
            "partition",
            "generation",
            "outbox_seq",
            "ordinal",
            name=op.f("uq_withdrawn_partition_generation_outbox_seq_ordinal"),
        ),
    )
    op.create_index(op.f("ix_withdrawn_pool"), "withdrawn", ["pool"])
