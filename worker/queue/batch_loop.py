"""The loop that reads the inputs of batches and writes their outputs.

It runs in every API and worker process, without a leader: a batch is held by one of them at a time
(`models.batch_holds`). One that has much to read gives way to others after `TURN_SECONDS`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Final

import redis
import structlog

from models import batch_holds, files
from models.batch_holds import Hold, HoldLostError, place_of
from models.batch_items import ImageOrder
from models.database import Database
from models.outbox import OutboxEntry
from models.tables import Batch
from visq import points
from visq.errors import InternalError, ObjectForbidden, Unavailable, VisqError
from visq.objects import ObjectStore, parse_uri
from visq.settings import Settings
from visq.streams import live_workers
from worker.queue.batch_reading import BatchReader
from worker.queue.batch_writing import BatchWriter
from worker.queue.courier import Courier

log = structlog.get_logger(__name__)

HOLD_SECONDS: Final = 30.0
"""Without a chunk for so long, another process takes over."""

TURN_SECONDS: Final = 5.0

CLEAR_SECONDS: Final = 60.0
"""Time between two looks for files that have expired."""
EXPIRED_AT_ONCE: Final = 100

UNEXPECTED_TRIES: Final = 10
"""Times in a row that something unknown goes wrong with a batch until it is given up."""
WRITE_TRIES: Final = 1440
"""Times in a row that the store does not take an output until the batch ends without it: in about
a day (`models.batch_holds.LONGEST_PAUSE`). An input is waited for until its batch is cancelled, or
expires."""

ORDERS: Final = 8
"""Batches whose images are remembered, so that a batch that had to give way goes on as it began."""


class BatchLoop:
    """A thread that repeats `round` while there is something to do, and looks now and then whether
    there is."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        store: ObjectStore,
        courier: Courier,
        wake_for_windows: Callable[[], None],
    ) -> None:
        """:param wake_for_windows: called when there are new items."""
        self._settings = settings
        self._database = database
        self._store = store
        self._courier = courier
        self._wake_for_windows = wake_for_windows
        self._reader = BatchReader(settings, database, store, self._served)
        self._writer = BatchWriter(settings, database, store)
        self._orders: dict[str, ImageOrder] = {}
        self._stopping = threading.Event()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="batches", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the loop after its present chunk."""
        self._stopping.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Look at once: there is a new batch, or the last item of one has ended."""
        self._woken.set()

    def round(self) -> bool:
        """Read or write for one batch; False: there is none.

        :raises Unavailable: the database does not answer.
        """
        if not self._database.read(batch_holds.is_any_to_do):
            return False
        hold = self._database.run(batch_holds.take, seconds=HOLD_SECONDS)
        if hold is None:
            return False
        try:
            self._do(hold)
        except HoldLostError as lost:
            log.info("batch left alone", reason=str(lost))
        except Unavailable as error:
            if hold.reads or hold.batch.hold_failures < WRITE_TRIES:
                log.warning("batch is left for later", batch=hold.batch.id, error=str(error))
                self._unless_lost(lambda: self._database.run(batch_holds.postpone, hold))
            else:
                self._fail(hold, error)
        except VisqError as error:
            self._fail(hold, error)
        except Exception as error:
            log.exception("batch failed", batch=hold.batch.id)
            if hold.batch.hold_failures < UNEXPECTED_TRIES:
                self._unless_lost(lambda: self._database.run(batch_holds.postpone, hold))
            else:
                said = f"visq failed at this batch ({type(error).__name__}); its log says why"
                self._fail(hold, InternalError(said))
        return True

    def _do(self, hold: Hold) -> None:
        if not hold.reads:
            self._write(hold)
        elif hold.is_expired:
            self._tell(self._database.run(batch_holds.expire, hold))
        else:
            self._read(hold)

    def _read(self, hold: Hold) -> None:
        batch = hold.batch
        if batch.input_etag is None and not (batch.input_uri or "").endswith("/"):
            etag = self._store.stat(parse_uri(batch.input_uri or "")).etag
            self._database.run(batch_holds.begin, hold, etag)
            batch.input_etag = etag
        order = self._order_of(batch)
        until = time.monotonic() + TURN_SECONDS
        alive = self._still_ours(hold)
        for chunk in self._reader.chunks(batch, hold.tenant, place_of(batch), alive):
            points.reached("batch.chunk_read")
            events = self._database.run(
                batch_holds.add_chunk,
                hold,
                chunk.items,
                order,
                place=chunk.place,
                is_last=chunk.is_last,
                seconds=HOLD_SECONDS,
            )
            points.reached("batch.chunk_added")
            self._wake_for_windows()
            self._tell(events)
            gives_way = time.monotonic() > until and not chunk.is_last
            if self._stopping.is_set() or (gives_way and self._others_wait()):
                self._unless_lost(lambda: self._database.run(batch_holds.release, hold))
                return
        self._orders.pop(batch.id, None)
        self._woken.set()  # it may have ended already, and be to be written

    def _others_wait(self) -> bool:
        """If not, going on is better: of a packed file all is unpacked again at the next turn."""
        return self._database.read(batch_holds.is_any_to_do)

    def _order_of(self, batch: Batch) -> ImageOrder:
        order = self._orders.pop(batch.id, None) or ImageOrder()
        self._orders[batch.id] = order
        if len(self._orders) > ORDERS:
            del self._orders[next(iter(self._orders))]
        return order

    def _write(self, hold: Hold) -> None:
        output, errors = self._writer.write(hold.batch, hold.tenant, self._still_ours(hold))
        points.reached("batch.output_written")
        self._tell(self._database.run(batch_holds.close, hold, output, errors))

    def _still_ours(self, hold: Hold) -> Callable[[], None]:
        """To be called often by what takes long: it renews the hold now and then, and raises
        `HoldLostError` if this is not to go on."""
        renewed = time.monotonic()

        def still_ours() -> None:
            nonlocal renewed
            if self._stopping.is_set():
                self._database.run(batch_holds.release, hold)
                raise HoldLostError("this process stops")
            if time.monotonic() - renewed > HOLD_SECONDS / 3:
                self._database.run(batch_holds.renew, hold, seconds=HOLD_SECONDS)
                renewed = time.monotonic()

        return still_ours

    def _fail(self, hold: Hold, error: VisqError) -> None:
        what = "read" if hold.reads else "written"
        log.warning(f"batch cannot be {what}", batch=hold.batch.id, error=str(error))
        self._unless_lost(lambda: self._tell(self._database.run(batch_holds.fail, hold, error)))

    def _tell(self, events: list[OutboxEntry]) -> None:
        if events:
            self._courier.deliver(events=events)

    def _unless_lost(self, write: Callable[[], object]) -> None:
        try:
            write()
        except HoldLostError as lost:
            log.info("batch left alone", reason=str(lost))

    def _served(self) -> Collection[str] | None:
        try:
            return {worker.model for worker in live_workers(self._courier.redis)} or None
        except (redis.RedisError, OSError):
            return None

    def clear_files(self) -> None:
        """Delete files whose time is over. Several processes may do it at a time.

        :raises Unavailable: the database or the store does not answer.
        """
        for file in self._database.read(files.expired, EXPIRED_AT_ONCE):
            try:
                # The object first: a row that is left is found again.
                self._store.delete(parse_uri(file.uri))
            except ObjectForbidden as error:  # or it would be in the way of the others for ever
                log.warning("an expired file is left in the store", file=file.id, error=str(error))
            self._database.run(files.remove, file.id)

    def _loop(self) -> None:
        cleared = -CLEAR_SECONDS
        while not self._stopping.is_set():
            self._woken.clear()
            try:
                while not self._stopping.is_set() and self.round():
                    pass
                if time.monotonic() - cleared > CLEAR_SECONDS:
                    cleared = time.monotonic()
                    self.clear_files()
            except Unavailable as error:
                log.warning("batches are left for later", error=str(error))
            except Exception:
                log.exception("batches are left for later")
            self._woken.wait(self._settings.maintenance_seconds)
