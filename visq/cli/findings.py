"""How `visq doctor` judges what the servers said (`visq.cli.checks`): one finding a question.

``problem``: a promise is not kept now, or soon will not be. ``warning``: all goes on, but somebody
should know. Each says what it means and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from visq.cli.checks import Database, Disk, Keeping, Redis, Workers
from visq.cli.show_settings import hide_password
from visq.settings import Settings

if TYPE_CHECKING:
    from models.checkup import Checkup, Late

Level = Literal["ok", "warning", "problem"]

SKEW_SECONDS: Final = 2.0
NEARLY_FULL: Final = 0.9
IDLE_SHARE: Final = 0.5
"""Part of the workers' places that is free when jobs need not wait: of a busy worker some are free
for a moment, between two jobs."""
SHORTEST_WAIT: Final = 60.0
"""Seconds that a job may wait beside free workers; at least four times `republish_seconds`."""

MIB: Final = 1024 * 1024
LEAST_FREE: Final = 256 * MIB
"""Bytes on a disk."""

LOOP: Final = (
    "the maintenance loop does this; one runs in every `visq api` and `visq worker`: is one of "
    "them up, and what does its log say of `maintenance step failed`?"
)


@dataclass(frozen=True)
class Finding:
    check: str
    level: Level
    message: str
    advice: str = ""


def database(found: Database, settings: Settings) -> Finding:
    where = hide_password(settings.database)
    if found.revision == found.needed:
        return Finding("database", "ok", f"{where} answers, at revision {found.revision}")
    message = f"{where} is at revision {found.revision}, this visq needs {found.needed}"
    newer = found.revision is not None and found.revision > found.needed
    advice = "this visq is older than the database: upgrade it" if newer else "run `visq migrate`"
    return Finding("database", "problem", message, advice)


def broker(found: Redis | None, settings: Settings) -> Iterator[Finding]:
    yield Finding("broker", "ok", f"{hide_password(settings.broker)} answers")
    if found is not None:
        yield from _keeping(found.keeping)


def _keeping(keeping: Keeping) -> Iterator[Finding]:
    """Of the Redis that is the broker. One that has values and streams only may lose all."""
    lost = (
        "jobs are safe: they are in the database, and published again; but results that consumers "
        "have not yet taken from their queues are lost there, and must be read from the API"
    )
    check = "broker: disk"
    if keeping.write_error is not None:
        yield Finding(check, "problem", f"this Redis is in trouble: {keeping.write_error}", lost)
    elif keeping.appendonly:
        yield Finding(check, "ok", "appendonly is on: messages survive a restart")
    elif keeping.appendonly is None:
        yield Finding(check, "warning", "this Redis does not say whether it is persistent", lost)
    else:
        when = (
            f"snapshots are rare (save {keeping.save}): a crash loses what came since the last"
            if keeping.save
            else "a restart loses all its messages"
        )
        yield Finding(check, "warning", f"appendonly is off, and {when}", f"{lost}; set appendonly")
    check = "broker: memory"
    if keeping.full is not None and keeping.full >= NEARLY_FULL:
        yield Finding(
            check,
            "problem",
            f"{keeping.full:.0%} of maxmemory is used",
            "when it is full, messages are refused or evicted: raise maxmemory, look for queues of "
            "results that nobody consumes, or lower VISQ_RESULT_TTL_SECONDS",
        )
    elif keeping.policy in ("noeviction", None):
        yield Finding(check, "ok", f"maxmemory-policy {keeping.policy or 'is not told'}")
    else:
        yield Finding(
            check,
            "warning",
            f"maxmemory-policy is {keeping.policy}: at maxmemory, queues may be evicted",
            f"{lost}; set maxmemory-policy to noeviction",
        )


def disks(found: list[Disk]) -> Finding:
    full = [each for each in found if each.free < LEAST_FREE]
    if full:
        said = "; ".join(
            f"{each.free // MIB} MiB are free for {each.what} ({each.folder})" for each in full
        )
        advice = (
            "make room, or give it a larger disk: when it is full, jobs and uploads are refused, "
            "and results cannot be stored"
        )
        return Finding("disk", "problem", said, advice)
    if not found:
        return Finding("disk", "ok", "neither database nor object store lies on this machine")
    said = ", ".join(f"{each.free // MIB} MiB free for {each.what}" for each in found)
    return Finding("disk", "ok", said)


def redis(settings: Settings) -> Finding:
    return Finding("redis", "ok", f"{hide_password(settings.redis)} answers")


def clocks(found: Checkup | None, redis_found: Redis | None) -> Iterator[Finding]:
    ahead = {}
    if found is not None:
        ahead["the database"] = (found.clock.ahead_seconds, found.clock.uncertain_seconds)
    if redis_found is not None:
        ahead["Redis"] = (redis_found.ahead_seconds, redis_found.uncertain_seconds)
    skewed = False
    for server, (seconds, uncertain) in ahead.items():
        if abs(seconds) - uncertain < SKEW_SECONDS:
            continue
        skewed = True
        direction = "ahead of" if seconds > 0 else "behind"
        yield Finding(
            "clock",
            "warning",
            f"{server} is {_span(abs(seconds))} {direction} this machine",
            "leases, deadlines and back-off are safe, as they go by the database's clock alone; "
            "but ids, and with them the order of lists, go by each machine's own, as do logs; S3 "
            "refuses requests from 15 minutes on. Let NTP set both clocks",
        )
    if ahead and not skewed:
        yield Finding("clock", "ok", f"this machine agrees with {' and '.join(ahead)}")


def workers(found: Workers, queued: int, start: str) -> Iterator[Finding]:
    """
    :param queued: jobs that wait for a worker.
    :param start: how a worker is started here.
    """
    failed = [
        Finding(
            "workers",
            "warning" if found.alive else "problem",
            f"a worker of {each.host} could not load {each.model} ({each.at:%Y-%m-%d %H:%M:%S} "
            f"UTC): {each.reason}",
            "it takes no jobs: mend its VISQ_MODEL or the model's files, and start it again",
        )
        for each in found.failed
    ]
    if found.alive:
        places = sum(each.concurrency for each in found.alive)
        busy = sum(each.in_flight for each in found.alive)
        models = ", ".join(sorted({each.model for each in found.alive}))
        message = f"{len(found.alive)} live, {busy} of {places} places taken ({models})"
        yield Finding("workers", "ok", message)
    elif queued or not failed:
        yield Finding(
            "workers",
            "problem" if queued else "warning",
            f"no worker lives; {_number(queued, 'job')} wait{'s' * (queued == 1)} for one",
            f"jobs are accepted and kept, but none runs: {start}",
        )
    for each in found.alive:
        if each.engine_down is not None:
            yield Finding(
                "workers",
                "problem",
                f"the engine of {each.id} is down: {each.engine_down}",
                "the worker claims no jobs, and starts its engine again and again: if that goes "
                "on, its log says why; has the machine enough memory for the model?",
            )
    yield from failed


def queue(found: Checkup, alive: Workers | None, settings: Settings) -> Finding:
    """Whether jobs wait although they need not."""
    if found.unpublished.count:
        late = _late(found.unpublished, "queued", "should have been published")
        return Finding("queue", "problem", late, f"{LOOP}; or the broker refuses them")
    if not found.queued.count:
        return Finding("queue", "ok", "no job waits for a worker")
    waits = "waits" if found.queued.count == 1 else "wait"
    message = (
        f"{_number(found.queued.count, 'job')} {waits}, the first for {_span(found.queued.seconds)}"
    )
    able = [] if alive is None else [each for each in alive.alive if each.engine_down is None]
    if not able:  # "workers" tells why
        return Finding("queue", "ok", message)
    places = sum(each.concurrency for each in able)
    free = places - sum(each.in_flight for each in able)
    patience = max(SHORTEST_WAIT, 4 * settings.republish_seconds)
    if found.queued.seconds > patience and free >= IDLE_SHARE * places:
        return Finding(
            "queue",
            "problem",
            f"{message}, while {free} of the workers' {places} places are free "
            f"({_names(found.queued)})",
            "do the workers use this broker and this database (`visq config` on their machines)? "
            "What do their logs say? A new start of a worker harms nothing",
        )
    return Finding("queue", "ok", message)


def leases(found: Checkup) -> Finding:
    if not found.lost.count:
        return Finding("leases", "ok", "every running job has its worker")
    late = _late(found.lost, "running", "lost their worker")
    return Finding("leases", "problem", late, f"they should be queued again: {LOOP}")


def deadlines(found: Checkup) -> Finding:
    if not found.expired.count:
        return Finding("deadlines", "ok", "no job has outlived its deadline in the queue")
    late = _late(found.expired, "waiting", "passed their deadline")
    return Finding("deadlines", "problem", late, LOOP)


def turns(found: Checkup) -> Finding:
    if not found.blocked.count:
        return Finding("turns", "ok", "no turn waits in vain")
    return Finding(
        "turns",
        "problem",
        f"{_number(found.blocked.count, 'turn')} still waiting although every earlier turn of the "
        f"session has ended ({_names(found.blocked)})",
        "this is a defect of visq: please report it with `visq show` of such a job; to go on, "
        "`visq cancel` the turn and submit it again",
    )


def outbox(found: Checkup) -> Finding:
    if not found.untold.count:
        return Finding("results", "ok", "every result event is published")
    told = (
        f"tried up to {found.most_tries} times: the broker or Redis refuses them; the logs of the "
        "API and the workers say why (`maintenance step failed`). They are kept, and sent later"
        if found.most_tries
        else LOOP
    )
    return Finding(
        "results",
        "problem",
        f"{_number(found.untold.count, 'result event')} not published, the first for "
        f"{_span(found.untold.seconds)}",
        told,
    )


def dead_jobs(found: Checkup, data: str) -> Finding:
    """:param data: the option of the commands that names the data folder, if one is needed."""
    if not found.dead_letters:
        none = "none (letters in a consumer's <queue>.dead are not looked at)"
        return Finding("dead jobs", "ok", none)
    number = sum(found.dead_letters.values())
    codes = ", ".join(f"{of_it} {code}" for code, of_it in found.dead_letters.items())
    return Finding(
        "dead jobs",
        "warning",
        f"{_number(number, 'job')} used up {'its' if number == 1 else 'their'} attempts ({codes})",
        f"`visq dead list{data}` tells why; when the cause is mended, "
        f"`visq dead retry --all{data}`, else `visq dead drop --all{data}`",
    )


def _late(late: Late, state: str, what: str) -> str:
    jobs = _number(late.count, f"{state} job")
    return f"{jobs} {what}, the first {_span(late.seconds)} ago ({_names(late)})"


def _number(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'s' * (count != 1)}"


def _names(late: Late) -> str:
    return ", ".join(late.examples) + (", ..." if late.count > len(late.examples) else "")


def _span(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
