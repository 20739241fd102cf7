"""${message}

Name a revision pre_NNNN if it has to be applied before the new version runs (old processes go on working with
it), post_NNNN if only after the last old one has stopped: ``--rev-id pre_NNNN``.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}
