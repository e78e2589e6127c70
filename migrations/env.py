"""How alembic reaches the database: over the connection that `coordinator.schema` opened, which holds the lock."""

from alembic import context

from coordinator.tables import Run

context.configure(connection=context.config.attributes["connection"], target_metadata=Run.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
