"""Alembic's entry. `headwater.store.migrate` hands it an open connection; it never makes its own."""

from __future__ import annotations

from alembic import context

from headwater.store.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    version_table=context.config.attributes["version_table"],
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
