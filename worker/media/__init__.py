"""From an image's name to its pixels: fetch, check, decode. No jobs, no database, no model here.

A load, in order (`media.Media` is the whole of it)::

    "s3://bucket/key"   parse and check access              visq.objects.images
    "https://..."
      -> bytes          one fetch for all who ask at once,  fetch.Fetcher
                        through a folder that caches        cache.DiskCache
      -> pixels         once for all who show the content   pixel_cache.PixelCache
                        in a process of its own             decoders.Decoders
                        by strict rules                     decode
      -> PixelBuffer    in shared memory                    visq.pixels

`Media.load_if_changed` ends at the fetch if the store (or the server) says that it is unchanged.
`Media.load` reads no bytes then if the pixels of that content are still here (`contents`).
"""

from worker.media.media import LoadedImage, Media

__all__ = ["LoadedImage", "Media"]
