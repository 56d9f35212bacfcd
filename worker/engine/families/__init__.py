"""Model families: what differs between models, one small file each.

`worker.engine.families.base` says what a family does; `family_of` finds a model's.
"""

from __future__ import annotations

from worker.engine.families.registry import family_of

__all__ = ["family_of"]
