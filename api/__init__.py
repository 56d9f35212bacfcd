"""The REST API: checks a request, makes one transition of `models`, answers.

No torch, no pictures, no model: of `worker` only `worker.queue`.
"""
