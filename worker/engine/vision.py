"""The vision cache: features of pictures by their content, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict

from worker.engine.families.base import ImageFeatures


class VisionCache:
    """Keeps the most recently used features. Sequences that are about to read some hold them
    themselves, so nothing here is pinned."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._features: OrderedDict[bytes, ImageFeatures] = OrderedDict()
        self.nbytes = 0
        self.hits = 0
        self.misses = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._features

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: bytes) -> ImageFeatures | None:
        features = self._features.get(key)
        if features is not None:
            self.hits += 1
            self._features.move_to_end(key)
        return features

    def put(self, key: bytes, features: ImageFeatures) -> None:
        """Keep what had to be computed: a miss. (`get` may be asked again and again for it.)"""
        self.misses += 1
        if key in self._features or features.nbytes > self._max_bytes:
            return
        self._features[key] = features
        self.nbytes += features.nbytes
        while self.nbytes > self._max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def clear(self) -> None:
        self._features.clear()
        self.nbytes = 0
