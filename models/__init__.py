"""What is stored: tables, and the life of jobs, sessions and batches as transitions on them.

Every transition is a plain function that takes a SQLAlchemy ``Session`` first and runs inside the
caller's transaction, so that it is written once and used by the API (async) and by the worker
(sync). No HTTP, no Celery, no torch here.
"""
