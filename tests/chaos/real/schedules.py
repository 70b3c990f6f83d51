"""What may happen, one kind at a time, at seeded random moments; and a short mix of several.

Each is a function that does harm to a world until its time is over, and says so when it does.
"""

from __future__ import annotations

import random
import signal
from contextlib import ExitStack
from typing import Any, Final

from stream.events import Forget, Item
from tests.integration.shop_traffic import Bad, Sendable, films
from tests.integration.worker_process import LocalWorker, eventually

from .watch import Sample
from .world import SESSION_S, Terms, World

_KAFKA_STOP_S: Final = 20.0
_FLOOD_S: Final = 10.0
_TIMES: Final = 3


def kill_workers(world: World) -> None:
    while world.going_on():
        world.pause(2, 8)
        world.fault("kill -9 of a worker")
        world.kill(world.chance.choice(world.alive))


def stall_workers(world: World) -> None:
    while world.going_on():
        world.pause(1, 4)
        _stall(world)


def _stall(world: World) -> None:
    """Beyond the session: it wakes up with partitions and profiles that are another's now."""
    victim = world.chance.choice(world.alive)
    world.fault("worker stopped past its session")
    victim.send(signal.SIGSTOP)
    world.pause(SESSION_S + 1, SESSION_S + 4)
    victim.send(signal.SIGCONT)


def lose_brokers(world: World) -> None:
    while world.going_on():
        world.pause(1, 4)
        _lose_broker(world)


def _lose_broker(world: World) -> None:
    node = world.chance.choice(world.kafka.node_ids)
    world.fault("kill -9 of a broker")
    world.kafka.kill(node)
    world.pause(1, 8)
    world.kafka.start()


def kill_redis(world: World) -> None:
    while world.going_on():
        world.pause(1, 5)
        if world.chance.random() < 0.5:
            world.fault("kill -9 of Redis")
            world.store.die()
        else:
            world.fault("power loss of Redis")
            world.store.lose_power(world.chance.randrange(1, 200_000))


def fail_redis_over(world: World) -> None:
    while world.going_on():
        world.pause(1, 4)
        behind_s = world.chance.choice([0.0, world.chance.uniform(0, 1.5)])
        world.fault("Redis failover")
        world.store.fail_over(behind_s)


def cut_networks(world: World) -> None:
    wires = world.networks.wires
    while world.going_on():
        world.pause(3, 8)
        worker, other = world.chance.choice(sorted(wires))
        # A worker from one other party, from all brokers, or from everybody.
        everything = [wire for (name, _), wire in sorted(wires.items()) if name == worker]
        brokers = [w for (n, o), w in sorted(wires.items()) if n == worker and o != "redis"]
        cut = world.chance.choice([[wires[worker, other]], brokers, everything])
        told = "one party" if len(cut) == 1 else "all brokers" if cut == brokers else "everybody"
        world.fault(f"worker cut from {told}")
        for wire in cut:
            wire.cut()
        world.pause(1, SESSION_S + 4)
        for wire in cut:
            wire.mend()


def restart_all(world: World) -> None:
    """Worker by worker, then broker by broker, then Redis, each in order."""
    for worker in list(world.alive):
        world.fault("restart of a worker")
        world.alive.remove(worker)
        worker.send(signal.SIGTERM)
        if (code := worker.wait()) != 0:
            world.outcome.wrong.append(f"{worker.name} ended with {code}:\n{worker.log[-2000:]}")
        world.start(worker.name.partition("-")[0]).wait_ready()
    for node in world.kafka.node_ids:
        world.fault("restart of a broker")
        world.kafka.processes[node - 1].stop(_KAFKA_STOP_S)
        world.kafka.start()
    world.fault("restart of Redis")
    world.store.restart()


def rebalance(world: World) -> None:
    """Up to three more workers come and go. They run on threads here, where they start at once."""
    with ExitStack() as stack:
        guests: list[LocalWorker] = []
        while world.going_on():
            world.pause(0.5, 3)
            if len(guests) < 3 and (not guests or world.chance.random() < 0.6):
                world.fault("worker joins")
                guests.append(stack.enter_context(LocalWorker(world.settings)))
            else:
                world.fault("worker leaves")
                guest = guests.pop(world.chance.randrange(len(guests)))
                guest.stop()
                assert guest.error is None, guest.error


def poison(world: World) -> None:
    """It is in the traffic: see `with_poison`."""
    world.fault("a third of all records is bad")
    world.pause(world.terms.seconds, world.terms.seconds)


def with_poison(chance: random.Random, records: list[Sendable]) -> list[Sendable]:
    """In bursts of up to 40, amid what is good."""
    poisoned: list[Sendable] = []
    for record in records:
        poisoned.append(record)
        if chance.random() < 0.025:
            poisoned += [_bad(chance) for _ in range(chance.randrange(40))]
    return poisoned


def _bad(chance: random.Random) -> Bad:
    value = chance.choice(
        [
            b"",
            b"{",
            b"null",
            b"\xff\xfe",
            b'{"type":"view"}',
            b'{"type":"view","user_id":"u","item_id":7,"ts":-1}',
            b'{"type":"purchase","user_id":"u","item_id":"i","price":"NaN"}',
            b"[" * chance.randrange(1, 2_000),
            b'{"type":"search","user_id":"u","query":"' + b"x" * 100_000,
        ]
    )
    return Bad(str(chance.randrange(1_000)).encode(), value)


def slow_redis(world: World) -> None:
    world.fault("Redis answers after 500 ms")
    world.store.delay_s = 0.5
    world.pause(world.terms.seconds, world.terms.seconds)
    world.store.delay_s = 0.0


def one_shopper(world: World) -> None:
    """It is in the traffic: see `of_one_shopper`. Here a worker is killed now and then."""
    world.fault("half of all events are one shopper's")
    while world.going_on():
        world.pause(8, 12)
        world.fault("kill -9 of a worker")
        world.kill(world.chance.choice(world.alive))


def of_one_shopper(chance: random.Random, records: list[Sendable]) -> list[Sendable]:
    """Items come first: no more than MAX_PENDING events of one shopper wait for their text."""
    return [
        record
        if isinstance(record, Bad | Item | Forget) or chance.random() < 0.5
        else record.model_copy(update={"user_id": "everybody"})
        for record in sorted(records, key=lambda record: not isinstance(record, Item))
    ]


def fill_disk(world: World) -> None:
    while world.going_on():
        world.pause(2, 4)
        world.fault("disk of Redis full")
        world.store.fill_disk()
        world.pause(3, 8)
        world.store.free_disk()


def overload(world: World) -> None:
    """Three times what the workers can take, for some seconds. A Redis that takes 50 ms makes
    that a rate which is the same on every machine."""
    world.store.delay_s = 0.05
    measured = world.send(_flood(world, 4_000), per_s=1e6)
    begin_s = world.watch.samples[-1].at_s
    measured.finish()
    _drained(world)
    sustained = _rate(world.watch.between(begin_s, world.watch.samples[-1].at_s))
    per_s = _TIMES * sustained
    resident_mb = world.watch.told[-1].most_resident_mb
    world.fault(f"{_TIMES} times as much as can be taken")
    begin_s = world.watch.samples[-1].at_s
    flood = world.send(_flood(world, int(per_s * _FLOOD_S)), per_s)
    eventually("the flood is sent", lambda: flood.sent == int(per_s * _FLOOD_S), 10 * _FLOOD_S)
    flood.finish()
    flood_s = world.watch.samples[-1].at_s - begin_s
    _drained(world)
    world.store.delay_s = 0.0
    end_s = world.watch.samples[-1].at_s
    lag = max(sample.lag for sample in world.watch.between(begin_s, end_s))
    most_mb = max(told.most_resident_mb for told in world.watch.told)
    off = world.watch.lag_told_wrongly()
    world.outcome.notes.append(
        f"sustained {sustained:,.0f}/s; {int(per_s * _FLOOD_S):,} records in "
        f"{flood_s:.0f} s on top; "
        f"lag up to {lag:,}, which the workers' metric told to within {max(off):,.0f} records "
        f"({sum(each > 0 for each in off)} of {len(off)} answers off); a worker's memory "
        f"{resident_mb:,.0f} MB before, {most_mb:,.0f} MB at most"
    )
    if most_mb > resident_mb + 128:  # more than librdkafka's queue and what is in hand may take
        world.outcome.wrong.append(f"a worker grew from {resident_mb:.0f} to {most_mb:.0f} MB")
    if max(off) > lag / 20:
        world.outcome.wrong.append(f"the lag was told wrongly by {max(off):.0f} records")


def _flood(world: World, count: int) -> list[Sendable]:
    """Events of other shoppers."""
    seed = world.chance.randrange(2**32)
    flood = [
        record.model_copy(update={"user_id": f"flood-{record.user_id}"})
        for record in films(seed, heavy=count // 150 + 1, light=min(900, count // 20))
        if not isinstance(record, Bad | Item)
    ]
    while len(flood) < count:
        flood += flood
    return list(flood[:count])


def _drained(world: World) -> None:
    usual = world.terms.per_s
    eventually("it catches up", lambda: world.watch.samples[-1].lag <= usual, 180)


def _rate(samples: list[Sample]) -> float:
    """Records per second while there were enough waiting."""
    top = max(range(len(samples)), key=lambda i: samples[i].lag)
    busy = [s for s in samples[top:] if s.lag > samples[top].lag * 0.2]
    return (busy[-1].committed - busy[0].committed) / (busy[-1].at_s - busy[0].at_s)


def mix(world: World) -> None:
    """A little of what needs no permission, for every day."""
    chance = world.chance
    world.fault("kill -9 of a broker")
    world.kafka.kill(chance.choice(world.kafka.node_ids))
    world.fault("kill -9 of a worker")
    world.kill(chance.choice(world.alive))
    world.pause(0.5, 2)
    world.fault("power loss of Redis")
    world.store.lose_power(100_000)
    world.pause(0.5, 2)
    world.fault("Redis failover")
    world.store.fail_over(0.5)
    world.kafka.start()


MIX: Final = Terms("mix", mix, seconds=10, per_s=120)

SCHEDULES: Final = {
    terms.name: terms
    for terms in (
        Terms("killed workers", kill_workers, redis_s=0.01),
        Terms("stalled workers", stall_workers, seconds=45, redis_s=0.01),
        Terms("lost brokers", lose_brokers, seconds=45),
        Terms("killed Redis", kill_redis),
        Terms("Redis failovers", fail_redis_over),
        Terms("cut networks", cut_networks, seconds=60, redis_s=0.01, own_networks=True),
        Terms("rolling restart", restart_all, seconds=75),
        Terms("rebalance storm", rebalance, redis_s=0.01),
        Terms("poison", poison, seconds=15, no_letter_twice=True, records=with_poison),
        Terms("slow Redis", slow_redis, seconds=20),
        Terms("one shopper", one_shopper, records=of_one_shopper),
        Terms("full disk", fill_disk, small_disk=True),
        Terms("overload", overload, seconds=0, per_s=50),
    )
}


def cluster_options() -> dict[str, Any]:
    """Of the brokers that all schedules are made for."""
    return {"nodes": 3, "heap_mb": 512, "properties": {"min.insync.replicas": "2"}}
