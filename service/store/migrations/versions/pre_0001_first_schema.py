"""The first schema: control plane, stock, ledger; one partition, catalogue version 0."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "pre_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "audit_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("actor", sa.String(length=128), nullable=False),
        sa.Column("action", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=128), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_table(
        "catalogue_head",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_catalogue_head_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_catalogue_head")),
    )
    op.create_table(
        "catalogue_versions",
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("snapshot", sa.LargeBinary(), nullable=False),
        sa.Column("published_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("version", name=op.f("pk_catalogue_versions")),
    )
    op.create_table(
        "distributors",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("active", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_distributors")),
    )
    op.create_table(
        "generations",
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("made_at", sa.BigInteger(), nullable=False),
        sa.Column("opened_at", sa.BigInteger(), nullable=True),
        sa.Column("closed_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint("state in ('building', 'open', 'closed')", name=op.f("ck_generations_state")),
        sa.PrimaryKeyConstraint("partition", "generation", name=op.f("pk_generations")),
    )
    op.create_table(
        "incidents",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("outbox_seq", sa.BigInteger(), nullable=True),
        sa.Column("ordinal", sa.Integer(), nullable=True),
        sa.Column("codes", sa.Integer(), nullable=False),
        sa.Column("lot", sa.BigInteger(), nullable=True),
        sa.Column("seq", sa.BigInteger(), nullable=True),
        sa.Column("subject", sa.String(length=128), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("raised_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_incidents")),
        sa.UniqueConstraint(
            "partition",
            "generation",
            "outbox_seq",
            "ordinal",
            name=op.f("uq_incidents_partition_generation_outbox_seq_ordinal"),
        ),
    )
    op.create_table(
        "issuances",
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("outbox_seq", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("request_ordinal", sa.Integer(), nullable=False),
        sa.Column("lot", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("code", sa.String(length=128), nullable=False),
        sa.Column("serial", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=16), nullable=False),
        sa.PrimaryKeyConstraint("partition", "generation", "outbox_seq", "ordinal", name=op.f("pk_issuances")),
        sa.UniqueConstraint("digest", name=op.f("uq_issuances_digest")),
        sa.UniqueConstraint("lot", "seq", name=op.f("uq_issuances_lot_seq")),
    )
    op.create_table(
        "parked",
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("entry_id", sa.String(length=64), nullable=False),
        sa.Column("codes", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.Column("parked_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("partition", "generation", "entry_id", name=op.f("pk_parked")),
    )
    op.create_table(
        "partitions",
        sa.Column("partition", sa.Integer(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("partition", name=op.f("pk_partitions")),
    )
    op.create_table(
        "pools",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("default_expires_at", sa.BigInteger(), nullable=True),
        sa.Column("least_life_s", sa.BigInteger(), nullable=False),
        sa.Column("stock_version", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_pools")),
    )
    op.create_table(
        "requests",
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("outbox_seq", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("quantity", sa.Integer(), nullable=False),
        sa.Column("api", sa.String(length=8), nullable=False),
        sa.Column("distributor", sa.String(length=64), nullable=False),
        sa.Column("client", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("payload", sa.Text(), nullable=False),
        sa.Column("terminal", sa.String(length=64), nullable=False),
        sa.Column("campaign", sa.String(length=64), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("category", sa.String(length=64), nullable=False),
        sa.Column("product", sa.String(length=64), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.Column("issued_at", sa.BigInteger(), nullable=False),
        sa.Column("flushed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("partition", "generation", "outbox_seq", "ordinal", name=op.f("pk_requests")),
    )
    op.create_index(op.f("ix_requests_campaign_issued_at"), "requests", ["campaign", "issued_at"], unique=False)
    op.create_index(op.f("ix_requests_client_api_key"), "requests", ["client", "api", "key"], unique=False)
    op.create_index(op.f("ix_requests_issued_at"), "requests", ["issued_at"], unique=False)
    op.create_table(
        "set_asides",
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("outbox_seq", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("lot", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("flushed_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("partition", "generation", "outbox_seq", "ordinal", name=op.f("pk_set_asides")),
        sa.UniqueConstraint("lot", "seq", name=op.f("uq_set_asides_lot_seq")),
    )
    op.create_table(
        "campaigns",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("category", sa.String(length=64), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("starts_at", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("time_zone", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["pool"], ["pools.id"], name=op.f("fk_campaigns_pool")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaigns")),
    )
    op.create_index(op.f("ix_campaigns_pool"), "campaigns", ["pool"], unique=False)
    op.create_table(
        "credentials",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("distributor", sa.String(length=64), nullable=False),
        sa.Column("token_sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["distributor"], ["distributors.id"], name=op.f("fk_credentials_distributor")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.UniqueConstraint("token_sha256", name=op.f("uq_credentials_token_sha256")),
    )
    op.create_index(op.f("ix_credentials_distributor"), "credentials", ["distributor"], unique=False)
    op.create_table(
        "imports",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("lines_done", sa.BigInteger(), nullable=False),
        sa.Column("inserted", sa.BigInteger(), nullable=False),
        sa.Column("refused", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(["pool"], ["pools.id"], name=op.f("fk_imports_pool")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_imports")),
    )
    op.create_index(op.f("ix_imports_pool"), "imports", ["pool"], unique=False)
    op.create_table(
        "lots",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("imported", sa.BigInteger(), nullable=False),
        sa.Column("leased_to", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("leased_to <= imported", name=op.f("ck_lots_lease_within_imported")),
        sa.ForeignKeyConstraint(["pool"], ["pools.id"], name=op.f("fk_lots_pool")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_lots")),
        sa.UniqueConstraint("pool", "expires_at", name=op.f("uq_lots_pool_expires_at")),
    )
    op.create_table(
        "assignments",
        sa.Column("campaign", sa.String(length=64), nullable=False),
        sa.Column("distributor", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["campaign"], ["campaigns.id"], name=op.f("fk_assignments_campaign")),
        sa.ForeignKeyConstraint(["distributor"], ["distributors.id"], name=op.f("fk_assignments_distributor")),
        sa.PrimaryKeyConstraint("campaign", "distributor", name=op.f("pk_assignments")),
    )
    op.create_index(op.f("ix_assignments_distributor"), "assignments", ["distributor"], unique=False)
    op.create_table(
        "campaign_products",
        sa.Column("campaign", sa.String(length=64), nullable=False),
        sa.Column("product", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["campaign"], ["campaigns.id"], name=op.f("fk_campaign_products_campaign")),
        sa.PrimaryKeyConstraint("campaign", "product", name=op.f("pk_campaign_products")),
    )
    op.create_table(
        "caps",
        sa.Column("campaign", sa.String(length=64), nullable=False),
        sa.Column("distributor", sa.String(length=64), nullable=False),
        sa.Column("holder", sa.String(length=16), nullable=False),
        sa.Column("period", sa.String(length=8), nullable=False),
        sa.Column("limit", sa.BigInteger(), nullable=False),
        sa.Column("counted_from", sa.BigInteger(), nullable=False),
        sa.Column("limited_from", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("holder in ('campaign', 'distributor', 'terminal')", name=op.f("ck_caps_holder")),
        sa.CheckConstraint("period in ('total', 'day', 'hour')", name=op.f("ck_caps_period")),
        sa.CheckConstraint('"limit" >= 0', name=op.f("ck_caps_limit")),
        sa.ForeignKeyConstraint(["campaign"], ["campaigns.id"], name=op.f("fk_caps_campaign")),
        sa.PrimaryKeyConstraint("campaign", "distributor", "holder", "period", name=op.f("pk_caps")),
    )
    op.create_table(
        "codes",
        sa.Column("lot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("code", sa.String(length=128), nullable=False),
        sa.Column("serial", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.LargeBinary(length=16), nullable=False),
        sa.ForeignKeyConstraint(["lot"], ["lots.id"], name=op.f("fk_codes_lot")),
        sa.PrimaryKeyConstraint("lot", "seq", name=op.f("pk_codes")),
        sa.UniqueConstraint("digest", name=op.f("uq_codes_digest")),
        sa.UniqueConstraint("pool", "serial", name=op.f("uq_codes_pool_serial")),
    )
    op.create_table(
        "leases",
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("predecessor", sa.String(length=32), nullable=False),
        sa.Column("partition", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("pool", sa.String(length=64), nullable=False),
        sa.Column("lot", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("seq_from", sa.BigInteger(), nullable=False),
        sa.Column("seq_to", sa.BigInteger(), nullable=False),
        sa.Column("codes", sa.BigInteger(), nullable=False),
        sa.Column("leased_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("seq_from < seq_to", name=op.f("ck_leases_range")),
        sa.ForeignKeyConstraint(["lot"], ["lots.id"], name=op.f("fk_leases_lot")),
        sa.ForeignKeyConstraint(["pool"], ["pools.id"], name=op.f("fk_leases_pool")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leases")),
        sa.UniqueConstraint("lot", "seq_from", name=op.f("uq_leases_lot_seq_from")),
        sa.UniqueConstraint(
            "partition",
            "generation",
            "pool",
            "predecessor",
            name=op.f("uq_leases_partition_generation_pool_predecessor"),
        ),
    )
    # Rows that are locks: there from the beginning, so that nobody has to race to make them.
    op.execute("insert into catalogue_head (id, version) values (1, 0)")
    op.execute("insert into partitions (partition) values (0)")
