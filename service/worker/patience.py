"""How long a command tries to reach Redis or a partition that is being recovered, before it says that it could not."""

from __future__ import annotations

from typing import Final

# A roll takes well under a second on a small ledger; an operator waits this long for the rest and not for ever.
UNREACHED_S: Final = 5.0
UNREACHED_POLL_S: Final = 0.1
