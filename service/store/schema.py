"""The tables of the durable store.  Migrations bring a database here; a test compares the two.

Times are Unix seconds unless a name ends in ``_ms``.  ``(partition, generation, outbox_seq, ordinal)`` names
one code's way through the outbox: ``outbox_seq`` numbers the entries of a generation, ``ordinal`` the codes in
one entry, issued ones first and set-aside ones after them.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

# What the migrations lead to, oldest first: a process that only looks need not load alembic.
REVISIONS = ("pre_0001", "pre_0002", "pre_0003", "pre_0004", "pre_0005", "pre_0006", "pre_0007")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only for the exact type INTEGER.
RowId = BigInteger().with_variant(Integer(), "sqlite")


def _partial(column: str, where: str) -> Index:
    """An index of the rows of which there may be few."""
    return Index(None, column, postgresql_where=text(where), sqlite_where=text(where))


# --- control plane -------------------------------------------------------------------------------------------

distributors = Table(
    "distributors",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("active", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("rate", BigInteger),  # vouchers a second, and burst at once; both null: no limit
    Column("burst", BigInteger),
)

credentials = Table(
    "credentials",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("distributor", ForeignKey("distributors.id"), nullable=False, index=True),
    Column("token_sha256", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)

pools = Table(
    "pools",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("default_expires_at", BigInteger),  # null: each imported code must bring its own
    Column("least_life_s", BigInteger, nullable=False),
    Column("stock_version", BigInteger, nullable=False),  # + 1 with every commit that adds stock
    Column("created_at", BigInteger, nullable=False),
    Column("generator", Text),  # JSON of what `work` fills it by; null: it is filled by imports alone
)

campaigns = Table(
    "campaigns",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("category", String(64), nullable=False),
    Column("pool", ForeignKey("pools.id"), nullable=False, index=True),
    Column("priority", Integer, nullable=False),  # lower goes first
    Column("starts_at", BigInteger, nullable=False),
    Column("until", BigInteger, nullable=False),  # exclusive; 0: open
    Column("paused", Boolean, nullable=False),
    Column("time_zone", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("changed_in", BigInteger, nullable=False, server_default="0"),  # catalogue version of its last change
)

campaign_products = Table(
    "campaign_products",
    metadata,
    Column("campaign", ForeignKey("campaigns.id"), nullable=False),
    Column("product", String(64), nullable=False),
    PrimaryKeyConstraint("campaign", "product"),
)

assignments = Table(
    "assignments",
    metadata,
    Column("campaign", ForeignKey("campaigns.id"), nullable=False),
    Column("distributor", ForeignKey("distributors.id"), nullable=False, index=True),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("campaign", "distributor"),
)

caps = Table(
    "caps",
    metadata,
    Column("campaign", ForeignKey("campaigns.id"), nullable=False),
    Column("distributor", String(64), nullable=False),  # '': the cap is the campaign's own
    Column("holder", String(16), nullable=False),
    Column("period", String(8), nullable=False),
    Column("limit", BigInteger, nullable=False),
    Column("counted_from", BigInteger, nullable=False),  # since when this holder and period have had some cap
    Column("limited_from", BigInteger, nullable=False),  # since when it has been this limit
    PrimaryKeyConstraint("campaign", "distributor", "holder", "period"),
    CheckConstraint("holder in ('campaign', 'distributor', 'terminal')", name="holder"),
    CheckConstraint("period in ('total', 'day', 'hour')", name="period"),
    CheckConstraint('"limit" >= 0', name="limit"),
)

products = Table(  # what Client API v3 sells; the campaign of the same id says from which pool, when, and to whom
    "products",
    metadata,
    Column("code", ForeignKey("campaigns.id"), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("description", Text, nullable=False),
    Column("is_value_based", Boolean, nullable=False),
    Column("is_open_value", Boolean, nullable=False),
    Column("is_status_available", Boolean, nullable=False),
    Column("is_multiple_use", Boolean, nullable=False),
    Column("currency", String(3), nullable=False),  # '': not value-based
    Column("amount", BigInteger),  # cents, or items; null: open-value
    Column("expiry", String(32), nullable=False),  # '', 'until:<Unix seconds>', 'days:N', 'months:N', 'years:N'
    Column("expiry_scheme", String(200), nullable=False),
    Column("url", String(200), nullable=False),  # what a voucher's id is appended to
    Column("short_url", String(200), nullable=False),  # the same for its short link; '': it has none
    Column("image", String(500), nullable=False),
    Column("terms_and_conditions", Text, nullable=False),
)

clients = Table(
    "clients",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("distributor", ForeignKey("distributors.id"), nullable=False, index=True),
    Column("secret_sha256", String(64), nullable=False),
    Column("scopes", String(200), nullable=False),  # one space between two
    Column("active", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("rotated_at", BigInteger),  # since when it has its present secret, if not from the beginning
)

signing_keys = Table(  # of access tokens; the private half is sealed with a key that is not in the store
    "signing_keys",
    metadata,
    Column("kid", String(64), primary_key=True),
    Column("public", Text, nullable=False),  # JWK
    Column("sealed", Text, nullable=False),
    Column("made_at", BigInteger, nullable=False),
    Column("verifies_until", BigInteger),  # null: it signs
)

catalogue_head = Table(  # one row, the lock and the number under which every change is published
    "catalogue_head",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

catalogue_versions = Table(
    "catalogue_versions",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("snapshot", LargeBinary, nullable=False),
    Column("published_at", BigInteger, nullable=False),
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("at", BigInteger, nullable=False),
    Column("actor", String(128), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(128), nullable=False),
    Column("detail", Text, nullable=False),
    Column("version", BigInteger),  # of the catalogue that it made; null: none
    Column("refused", Boolean, nullable=False, server_default=false()),  # nothing was changed
    Column("written_at", BigInteger),  # since when it is in the log of a worker
    _partial("written_at", "written_at is null"),
)

# --- stock ---------------------------------------------------------------------------------------------------

imports = Table(
    "imports",
    metadata,
    Column("id", String(64), primary_key=True),  # SHA-256 of the content unless the operator names it
    Column("pool", ForeignKey("pools.id"), nullable=False, index=True),
    Column("lines_done", BigInteger, nullable=False),  # an interrupted import goes on after this line
    Column("inserted", BigInteger, nullable=False),
    Column("refused", BigInteger, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Column("content", String(64), nullable=False, server_default=text("''")),  # SHA-256; '': not known
)

lots = Table(
    "lots",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("pool", ForeignKey("pools.id"), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("imported", BigInteger, nullable=False),  # codes; also the next seq to give, for seq starts at 0
    Column("leased_to", BigInteger, nullable=False),  # the next seq to lease
    UniqueConstraint("pool", "expires_at"),
    CheckConstraint("leased_to <= imported", name="lease_within_imported"),
)

codes = Table(
    "codes",
    metadata,
    Column("lot", ForeignKey("lots.id"), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("pool", String(64), nullable=False),
    Column("code", String(128), nullable=False),
    Column("serial", String(64), nullable=False),
    Column("digest", LargeBinary(16), nullable=False),  # blake2b-128 of the code: unique over all pools
    PrimaryKeyConstraint("lot", "seq"),
    UniqueConstraint("digest"),
    UniqueConstraint("pool", "serial"),
)

leases = Table(
    "leases",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("predecessor", String(32), nullable=False),  # '' begins the chain of a generation
    Column("partition", Integer, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("pool", ForeignKey("pools.id"), nullable=False),
    Column("lot", ForeignKey("lots.id"), nullable=False),
    Column("seq_from", BigInteger, nullable=False),
    Column("seq_to", BigInteger, nullable=False),  # exclusive
    Column("codes", BigInteger, nullable=False),
    Column("leased_at", BigInteger, nullable=False),
    UniqueConstraint("partition", "generation", "pool", "predecessor"),
    UniqueConstraint("lot", "seq_from"),
    CheckConstraint("seq_from < seq_to", name="range"),
)

# --- ledger (append-only) --------------------------------------------------------------------------------------

WAY = ("partition", "generation", "outbox_seq", "ordinal")


def _way() -> list[Column[int]]:
    return [
        Column("partition", Integer, nullable=False),
        Column("generation", BigInteger, nullable=False),
        Column("outbox_seq", BigInteger, nullable=False),
        Column("ordinal", Integer, nullable=False),
    ]


requests = Table(
    "requests",
    metadata,
    *_way(),  # ordinal: that of its first code
    Column("quantity", Integer, nullable=False),
    Column("api", String(8), nullable=False),
    Column("distributor", String(64), nullable=False),
    Column("client", String(64), nullable=False),
    Column("key", String(128), nullable=False),
    Column("payload", Text, nullable=False),
    Column("terminal", String(64), nullable=False),
    Column("campaign", String(64), nullable=False),
    Column("pool", String(64), nullable=False),
    Column("category", String(64), nullable=False),
    Column("product", String(64), nullable=False),
    Column("until", BigInteger, nullable=False),
    Column("id_key", String(16), nullable=False, server_default=text("''")),  # what its voucher ids were derived with
    Column("terms", Text, nullable=False, server_default=text("''")),  # of the product when it was issued
    Column("issued_at", BigInteger, nullable=False),
    Column("flushed_at", BigInteger, nullable=False),
    Column("answer_id", LargeBinary(16)),  # the request_id of its answers; null where the key is that
    Column("trace_id", String(32), nullable=False, server_default=text("''")),  # of the call that asked, and the
    Column("parent_id", String(16), nullable=False, server_default=text("''")),  # span in it; '': it said none
    PrimaryKeyConstraint(*WAY),
    Index(None, "client", "api", "key"),  # plain: that no key has two requests is audited, not enforced
    Index(None, "issued_at"),
    Index(None, "campaign", "issued_at"),
    _partial("answer_id", "answer_id is not null"),
    _partial("trace_id", "trace_id <> ''"),
)

issuances = Table(
    "issuances",
    metadata,
    *_way(),
    Column("request_ordinal", Integer, nullable=False),
    Column("lot", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("code", String(128), nullable=False),
    Column("serial", String(64), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("digest", LargeBinary(16), nullable=False),
    Column("voucher_id", LargeBinary(16)),  # null, as the next two, where the API gives none
    Column("short", String(16)),  # end of its short link
    Column("pin", Integer),  # of its short link
    PrimaryKeyConstraint(*WAY),
    UniqueConstraint("lot", "seq"),  # wall: one position of stock, one issuance, ever
    UniqueConstraint("digest"),  # wall: one code, one issuance, ever
    _partial("voucher_id", "voucher_id is not null"),
)

voucher_states = Table(  # what became of vouchers after they were issued, as far as somebody said so
    "voucher_states",
    metadata,
    Column("voucher_id", LargeBinary(16), primary_key=True),
    Column("status", String(8), nullable=False),
    Column("remaining", BigInteger),  # cents or items; null: what it was issued with
    Column("changed_at", BigInteger, nullable=False),
    CheckConstraint("status in ('active', 'inactive', 'used', 'voided')", name="status"),
    CheckConstraint("remaining >= 0", name="remaining"),
)

# Why a code left a window other than by issue.
LITTLE_LIFE = "little_life"
WITHDRAWN = "withdrawn"
TAKEN_BACK = "taken_back"  # it is in stock again, at another position

set_asides = Table(
    "set_asides",
    metadata,
    *_way(),
    Column("lot", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("why", String(16), nullable=False, server_default=LITTLE_LIFE),
    Column("flushed_at", BigInteger, nullable=False),
    PrimaryKeyConstraint(*WAY),
    UniqueConstraint("lot", "seq"),
)

withdrawn = Table(  # stretches of a lot that an operator took out of stock before they were leased
    "withdrawn",
    metadata,
    Column("lot", ForeignKey("lots.id"), nullable=False),
    Column("seq_from", BigInteger, nullable=False),
    Column("seq_to", BigInteger, nullable=False),  # exclusive
    Column("withdrawn_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("lot", "seq_from"),
    CheckConstraint("seq_from < seq_to", name="range"),
)

generations = Table(
    "generations",
    metadata,
    Column("partition", Integer, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),  # why the one before was left
    Column("made_at", BigInteger, nullable=False),
    Column("opened_at", BigInteger),
    Column("closed_at", BigInteger),
    PrimaryKeyConstraint("partition", "generation"),
    CheckConstraint("state in ('building', 'open', 'closed')", name="state"),
)

partitions = Table(  # one row a partition: locked exclusively by a roll, shared by a flush
    "partitions",
    metadata,
    Column("partition", Integer, primary_key=True, autoincrement=False),
)

incidents = Table(
    "incidents",
    metadata,
    Column("id", RowId, primary_key=True, autoincrement=True),
    Column("kind", String(32), nullable=False),  # double_issue, forked_lease, store_older, and more (flush)
    Column("partition", Integer, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("outbox_seq", BigInteger),
    Column("ordinal", Integer),
    Column("codes", Integer, nullable=False),  # codes that left a window and are accounted for here
    Column("lot", BigInteger),
    Column("seq", BigInteger),
    Column("subject", String(128), nullable=False),  # campaign or pool
    Column("detail", Text, nullable=False),  # never a code
    Column("raised_at", BigInteger, nullable=False),
    UniqueConstraint("partition", "generation", "outbox_seq", "ordinal"),
)

parked = Table(
    "parked",
    metadata,
    Column("partition", Integer, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("entry_id", String(64), nullable=False),
    Column("codes", BigInteger, nullable=False),  # what the entry said it held, else 0
    Column("reason", Text, nullable=False),
    Column("content", LargeBinary, nullable=False),
    Column("parked_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("partition", "generation", "entry_id"),
)
