"""The durable store: schema and migrations, control plane, stock, ledger (PostgreSQL, or one SQLite file)."""
