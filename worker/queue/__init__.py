"""The broker's side of visq, light enough for the API: no torch, no pictures.

`Courier` publishes what a committed transition leaves to publish, at once; `Maintenance` is the
loop, in every API and worker process, that publishes what was left behind and looks after
deadlines and dead workers; `BatchLoop` reads and writes the files of batches. The Celery
application itself is in `worker.queue.app`.
"""

from worker.queue.batch_loop import BatchLoop
from worker.queue.courier import Courier
from worker.queue.maintenance import Maintenance

__all__ = ["BatchLoop", "Courier", "Maintenance"]
