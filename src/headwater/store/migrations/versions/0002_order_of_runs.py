"""Which runs go first, and which wait for others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("runs", sa.Column("priority", sa.Text(), nullable=False, server_default=sa.text("'normal'")))
    op.add_column("runs", sa.Column("waits_for", JSONB(), nullable=False, server_default=sa.text("'[]'::jsonb")))


def downgrade() -> None:
    op.drop_column("runs", "waits_for")
    op.drop_column("runs", "priority")
