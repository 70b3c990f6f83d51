"""Puts a simulated world under the production code: its clock, threads, dice, sockets, brokers.

The code runs as it is. What it imported from the outside (`time`, `threading`, confluent-kafka's
clients, …) is found among the globals of its modules by identity, and replaced for as long as a
world lasts. Modules that the list does not reach are none of the simulation's: they neither wait
nor look at a clock.
"""

from __future__ import annotations

import concurrent.futures
import random
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import confluent_kafka
import redis._parsers.hiredis
import redis.backoff
import redis.client
import redis.connection
import redis.retry
from confluent_kafka.admin import AdminClient

from stream import updater
from stream.swapping import wanted_space
from stream.updater import Updater

from . import broker_double as broker
from . import scheduling
from .broker_double import Cluster
from .scheduling import Scheduler
from .shop import SPACE
from .wires import Network, Sockets

EPOCH_S: Final = 1_790_000_000.0  # of the wall clock, where the monotonic one is 0
_PACKAGES: Final = ("stream", "profiles")
_REDIS: Final = (redis.connection, redis.client, redis.retry, redis.backoff)


class _Over:
    """A module with some of its names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def wall_s(scheduler: Scheduler) -> float:
    """What the wall clock of the current process shows."""
    return EPOCH_S + scheduler.now_s + scheduler.current.process.clock_error_s


def _replacements(
    scheduler: Scheduler, network: Network, cluster: Cluster
) -> list[tuple[Any, Any]]:
    """What stands for what."""
    clock = _Over(
        time,
        monotonic=lambda: scheduler.now_s,
        perf_counter=lambda: scheduler.now_s,
        time=lambda: wall_s(scheduler),
        sleep=scheduler.sleep,
    )
    threads = _Over(
        threading,
        Lock=partial(scheduling.Lock, scheduler),
        RLock=partial(scheduling.Lock, scheduler, again=True),
        Condition=partial(scheduling.Condition, scheduler),
        Event=partial(scheduling.Event, scheduler),
        Thread=lambda target, args=(), name="thread", daemon=True: scheduling.Thread(
            scheduler, target, args, name
        ),
        get_ident=lambda: scheduler.current.number,
    )
    dice = _Over(
        secrets,
        randbits=scheduler.chance.getrandbits,
        token_hex=lambda n: f"{scheduler.chance.getrandbits(8 * n):0{2 * n}x}",
    )

    def consumer(config: Mapping[str, Any]) -> broker.Consumer:
        return broker.Consumer(cluster, config)

    def producer(config: Mapping[str, Any], logger: Any = None) -> broker.Producer:
        return broker.Producer(cluster)

    def admin(config: Mapping[str, Any], logger: Any = None) -> broker.Admin:
        return broker.Admin(cluster)

    return [
        (time, clock),
        (time.sleep, scheduler.sleep),
        (threading, threads),
        (secrets, dice),
        (random, _Over(random, uniform=scheduler.chance.uniform, random=scheduler.chance.random)),
        (socket, Sockets(network)),
        (concurrent.futures.ThreadPoolExecutor, partial(scheduling.Executor, scheduler)),
        (concurrent.futures.wait, partial(scheduling.wait, scheduler)),
        (confluent_kafka, _Over(confluent_kafka, Consumer=consumer, Producer=producer)),
        (confluent_kafka.Consumer, consumer),
        (confluent_kafka.Producer, producer),
        (AdminClient, admin),
        (wanted_space, lambda folder: SPACE),  # no release lies in a folder
        (redis._parsers.hiredis._socket_can_read, lambda sock, timeout: sock.readable()),
        (redis._parsers.hiredis._socket_is_closed, lambda sock: sock.closed()),
    ]


@contextmanager
def under(
    scheduler: Scheduler, network: Network, cluster: Cluster, lane_users: int = 256
) -> Iterator[None]:
    """Inside, production code lives in this world. `lane_users`: how many users make it worth while
    to fold in lanes; a world has far fewer than a shop."""
    given = {id(real): stand_in for real, stand_in in _replacements(scheduler, network, cluster)}
    changed: list[tuple[Any, str, Any]] = []
    modules = [
        module for name, module in list(sys.modules.items()) if name.partition(".")[0] in _PACKAGES
    ]
    for module in [*modules, *_REDIS, redis._parsers.hiredis]:
        for name, value in list(vars(module).items()):
            if id(value) in given:
                changed.append((module, name, value))
                setattr(module, name, given[id(value)])
    # A default is bound when a function is defined, before any world there is.
    defaults = Updater.__init__.__kwdefaults__
    clock, defaults["clock"] = defaults["clock"], lambda: wall_s(scheduler)
    in_a_shop, updater._LANE_USERS = updater._LANE_USERS, lane_users  # type: ignore[misc]
    try:
        yield
    finally:
        defaults["clock"] = clock
        updater._LANE_USERS = in_a_shop  # type: ignore[misc]
        for module, name, value in changed:
            setattr(module, name, value)
