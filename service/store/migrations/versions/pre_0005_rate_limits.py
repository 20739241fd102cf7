"""Distributors may have a rate limit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "pre_0005"
down_revision = "pre_0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("distributors", sa.Column("rate", sa.BigInteger(), nullable=True))
    op.add_column("distributors", sa.Column("burst", sa.BigInteger(), nullable=True))
