"""Client API v3: products, clients, signing keys, and vouchers that have an id and a state."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "pre_0004"
down_revision = "pre_0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "products",
        sa.Column("code", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("is_value_based", sa.Boolean(), nullable=False),
        sa.Column("is_open_value", sa.Boolean(), nullable=False),
        sa.Column("is_status_available", sa.Boolean(), nullable=False),
        sa.Column("is_multiple_use", sa.Boolean(), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("amount", sa.BigInteger(), nullable=True),
        sa.Column("expiry", sa.String(length=32), nullable=False),
        sa.Column("expiry_scheme", sa.String(length=200), nullable=False),
        sa.Column("url", sa.String(length=200), nullable=False),
        sa.Column("short_url", sa.String(length=200), nullable=False),
        sa.Column("image", sa.String(length=500), nullable=False),
        sa.Column("terms_and_conditions", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["code"], ["campaigns.id"], name=op.f("fk_products_code")),
        sa.PrimaryKeyConstraint("code", name=op.f("pk_products")),
    )
    op.create_table(
        "clients",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("distributor", sa.String(length=64), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("scopes", sa.String(length=200), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("rotated_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["distributor"], ["distributors.id"], name=op.f("fk_clients_distributor")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_clients")),
    )
    op.create_index(op.f("ix_clients_distributor"), "clients", ["distributor"])
    op.create_table(
        "signing_keys",
        sa.Column("kid", sa.String(length=64), nullable=False),
        sa.Column("public", sa.Text(), nullable=False),
        sa.Column("sealed", sa.Text(), nullable=False),
        sa.Column("made_at", sa.BigInteger(), nullable=False),
        sa.Column("verifies_until", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("kid", name=op.f("pk_signing_keys")),
    )
    # With defaults, because workers of the version before go on writing these tables.
    op.add_column("requests", sa.Column("id_key", sa.String(length=16), nullable=False, server_default=sa.text("''")))
    op.add_column("requests", sa.Column("terms", sa.Text(), nullable=False, server_default=sa.text("''")))
    op.add_column("issuances", sa.Column("voucher_id", sa.LargeBinary(length=16), nullable=True))
    op.add_column("issuances", sa.Column("short", sa.String(length=16), nullable=True))
    op.add_column("issuances", sa.Column("pin", sa.Integer(), nullable=True))
    given = sa.text("voucher_id is not null")
    op.create_index(
        op.f("ix_issuances_voucher_id"), "issuances", ["voucher_id"], postgresql_where=given, sqlite_where=given
    )
    op.create_table(
        "voucher_states",
        sa.Column("voucher_id", sa.LargeBinary(length=16), nullable=False),
        sa.Column("status", sa.String(length=8), nullable=False),
        sa.Column("remaining", sa.BigInteger(), nullable=True),
        sa.Column("changed_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("remaining >= 0", name=op.f("ck_voucher_states_remaining")),
        sa.CheckConstraint("status in ('active', 'inactive', 'used', 'voided')", name=op.f("ck_voucher_states_status")),
        sa.PrimaryKeyConstraint("voucher_id", name=op.f("pk_voucher_states")),
    )
