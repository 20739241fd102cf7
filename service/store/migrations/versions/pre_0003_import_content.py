"""Imports know what they import, so that other content under the same id is noticed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "pre_0003"
down_revision = "pre_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("imports", sa.Column("content", sa.String(length=64), nullable=False, server_default=sa.text("''")))
