"""The background worker: what keeps windows full, the ledger complete and partitions open.

Each part has ``run_once``, one bounded step that says what it did, and the runner loops over them.  A crash between
any two statements of a step is finished by the next step of anybody.
"""
