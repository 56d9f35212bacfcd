"""Alembic migrations of the tables in `models`; `migrations.run` is how visq calls them."""
