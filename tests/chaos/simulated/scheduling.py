"""Time and threads of a simulated world: one runs at a time, and a seed says which.

Each simulated thread is a thread of the interpreter that holds or waits for a baton. It hands the
baton on where it would wait (a lock, a sleep, a socket, an event loop's select) and at `point`s,
where others may see what it did. Then the scheduler draws who goes on, or, where nobody can, moves
the clock to what is due next. So a run is a function of its seed, and hours of it take no time.

A simulated process can be killed (each of its threads ends where it stands) or frozen (none of
them runs until it is thawed, and the clock goes on). It does not know Kafka, Redis or profiles.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import heapq
import itertools
import random
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

# A turn takes time, or a loop that polls without waiting would never see a deadline pass.
_TURN_S = 1e-6
# How often a thread is put off where it takes a lock that is free.
_PUT_OFF = 0.1
# A run of so many turns is a livelock.
_MOST_TURNS = 400_000


class Killed(BaseException):
    """Unwinds the threads of a process that was killed; nobody outside sees what they do then."""


class Stuck(Exception):
    """Nobody can go on, or somebody goes on for ever."""


class Process:
    """What is killed, or frozen, at once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.frozen = False
        self.held: list[Task] = []  # would go on if it were not frozen
        self.tasks: list[Task] = []
        self.clock_error_s = 0.0  # of its wall clock
        self.on_death: list[Callable[[], None]] = []


class Task:
    """A simulated thread."""

    def __init__(self, number: int, name: str, process: Process) -> None:
        self.number = number
        self.name = name
        self.process = process
        self.baton = threading.Lock()
        self.baton.acquire()
        self.waits = 0  # counts its waits, so that an alarm of an earlier one is known as such
        self.blocked = False
        self.woken = False
        self.over = False
        self.joining: list[Task] = []


class Scheduler:
    """Owns the clock and the baton."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.now_s = 10_000.0  # monotonic
        self.trace: list[tuple[float, str, str]] = []
        self.on_point: Callable[[Task, str], None] = lambda task, what: None
        self.turns = 0
        self.error: BaseException | None = None
        self._numbers = itertools.count()
        self._ready: list[Task] = []
        self._alarms: list[tuple[float, int, Task | Callable[[], None], int]] = []
        self._over = False
        self._picking = False
        self._main = Task(next(self._numbers), "world", Process("world"))
        self.current = self._main

    # --- for the world

    def run(self) -> None:
        """Until `finish`, or an error of the world itself, which is raised."""
        self._switch(self._pick())
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """`run` returns."""
        self._over = True

    def close(self, processes: Iterable[Process]) -> None:
        """Unwind all threads."""
        self._over = True  # whoever ends hands the baton back to here
        for process in processes:
            self.kill(process)
        while self._ready:
            self._switch(self._ready.pop())

    def spawn(self, process: Process, name: str, work: Callable[[], None]) -> Task:
        """A thread of a process, that has not begun yet."""
        task = Task(next(self._numbers), name, process)
        thread = threading.Thread(target=self._live, args=(task, work), daemon=True)
        process.tasks.append(task)
        self._make_ready(task)
        thread.start()
        return task

    def at(self, when_s: float, what: Callable[[], None]) -> None:
        """Call something, between two turns."""
        heapq.heappush(self._alarms, (when_s, next(self._numbers), what, 0))

    def after(self, wait_s: float, what: Callable[[], None]) -> None:
        """`at`, from now on."""
        self.at(self.now_s + wait_s, what)

    def kill(self, process: Process) -> None:
        """All threads end where they stand."""
        if process.dead:
            return
        process.dead = True
        process.frozen = False
        self._ready = [task for task in self._ready if task.process is not process]
        process.held = []
        for task in process.tasks:
            task.blocked = False
            if task is not self.current or self._picking:
                self._ready.append(task)
        for what in process.on_death:
            what()

    def freeze(self, process: Process) -> None:
        """None of its threads goes on until `thaw`."""
        process.frozen = True
        process.held += [task for task in self._ready if task.process is process]
        self._ready = [task for task in self._ready if task.process is not process]

    def thaw(self, process: Process) -> None:
        """It goes on, and does not know that time has passed."""
        process.frozen = False
        held, process.held = process.held, []
        self._ready += held

    # --- for threads

    def point(self, what: str) -> None:
        """Others may see what comes; before that anything may happen."""
        task = self.current
        if task.process.dead:
            raise Killed
        self.trace.append((self.now_s, task.name, what))
        self.on_point(task, what)
        self.pause()

    def pause(self) -> None:
        """Whoever can, may go on."""
        task = self.current
        if task.process.dead:
            raise Killed
        self._make_ready(task)
        self._wait_for_baton(task)

    def block(self, timeout_s: float | None = None) -> bool:
        """Until `wake`; False where the time is up before."""
        task = self.current
        if task.process.dead:
            raise Killed
        task.waits += 1
        task.blocked, task.woken = True, False
        if timeout_s is not None:
            when_s = self.now_s + max(0.0, timeout_s)
            heapq.heappush(self._alarms, (when_s, next(self._numbers), task, task.waits))
        self._wait_for_baton(task)
        return task.woken

    def wake(self, task: Task) -> None:
        """Let a blocked thread go on; nothing for any other."""
        if task.blocked:
            task.blocked, task.woken = False, True
            self._make_ready(task)

    def sleep(self, seconds: float) -> None:
        """Block without being woken."""
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.block(until_s - self.now_s)

    def dead(self) -> bool:
        """Whether the current thread is only unwinding."""
        return self.current.process.dead

    # --- the baton

    def _live(self, task: Task, work: Callable[[], None]) -> None:
        task.baton.acquire()
        try:
            if not task.process.dead:
                work()
        except Killed:
            pass
        except BaseException as error:
            self.error, self._over = self.error or error, True
        task.over = True
        task.process.tasks.remove(task)
        for other in task.joining:
            self.wake(other)
        chosen = self._pick()
        self.current = chosen
        chosen.baton.release()

    def _wait_for_baton(self, task: Task) -> None:
        self._switch(self._pick())
        if task.process.dead:
            raise Killed

    def _switch(self, chosen: Task) -> None:
        task = self.current
        if chosen is task:
            return
        self.current = chosen
        chosen.baton.release()
        task.baton.acquire()

    def _make_ready(self, task: Task) -> None:
        (task.process.held if task.process.frozen else self._ready).append(task)

    def _pick(self) -> Task:
        """Who goes on; the world's own thread at the end."""
        self._picking = True
        try:
            return self._picked()
        finally:
            self._picking = False

    def _picked(self) -> Task:
        self.turns += 1
        self.now_s += _TURN_S
        if self.turns > _MOST_TURNS and not self._over:
            self.error, self._over = Stuck(f"not over after {_MOST_TURNS} turns"), True
        while not self._over:
            if self._alarms and self._alarms[0][0] <= self.now_s:
                self._ring()
                continue
            if self._ready:
                return self._ready.pop(int(self.chance.random() * len(self._ready)))
            if not self._alarms:
                self.error, self._over = Stuck("every thread waits for another"), True
                break
            self.now_s = max(self.now_s, self._alarms[0][0])
        return self._main

    def _ring(self) -> None:
        """What is due."""
        alarms = self._alarms
        while alarms and alarms[0][0] <= self.now_s:
            _, _, what, waits = heapq.heappop(alarms)
            if not isinstance(what, Task):
                try:
                    what()
                except Exception as error:
                    self.error, self._over = self.error or error, True
            elif what.blocked and what.waits == waits:
                what.blocked = False
                self._make_ready(what)


# --- what programs use in place of `threading`, `concurrent.futures` and `asyncio`'s loop


class Lock:
    """`threading.Lock`, and `RLock` where `again` is set."""

    def __init__(self, scheduler: Scheduler, again: bool = False) -> None:
        self._scheduler = scheduler
        self._again = again
        self._owner: Task | None = None
        self._depth = 0
        self._waiting: deque[Task] = deque()

    def acquire(self) -> bool:
        scheduler = self._scheduler
        me = scheduler.current
        if me.process.dead:
            return True
        if self._again and self._owner is me:
            self._depth += 1
            return True
        if scheduler.chance.random() < _PUT_OFF:
            scheduler.pause()
        while self._owner is not None:
            self._waiting.append(me)
            scheduler.block()
        self._owner, self._depth = me, 1
        return True

    def release(self) -> None:
        scheduler = self._scheduler
        if scheduler.current.process.dead:
            return
        assert self._owner is scheduler.current, "released by somebody else"
        self._depth -= 1
        if not self._depth:
            self._owner = None
            if self._waiting:
                scheduler.wake(self._waiting.popleft())

    def give_up(self) -> int:
        """Release it altogether; for `Condition`."""
        depth, self._depth = self._depth, 1
        self.release()
        return depth

    def take_back(self, depth: int) -> None:
        self.acquire()
        self._depth = depth

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Condition:
    """`threading.Condition` with a lock of its own."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._lock = Lock(scheduler, again=True)
        self._waiting: list[Task] = []

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        scheduler = self._scheduler
        me = scheduler.current
        self._waiting.append(me)
        depth = self._lock.give_up()
        woken = scheduler.block(timeout)
        if not woken and me in self._waiting:
            self._waiting.remove(me)
        self._lock.take_back(depth)
        return woken

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        scheduler = self._scheduler
        end_s = None if timeout is None else scheduler.now_s + timeout
        while not (result := predicate()):
            left_s = None if end_s is None else end_s - scheduler.now_s
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
        return result

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiting))):
            self._scheduler.wake(self._waiting.pop(0))

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class Event:
    """`threading.Event`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._changed = Condition(scheduler)
        self._set = False

    def set(self) -> None:
        with self._changed:
            self._set = True
            self._changed.notify_all()

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._set, timeout))


class Thread:
    """`threading.Thread`, of the process that makes it."""

    def __init__(
        self,
        scheduler: Scheduler,
        target: Callable[..., None],
        args: Sequence[Any] = (),
        name: str = "thread",
    ) -> None:
        self._scheduler = scheduler
        self._work = lambda: target(*args)
        self._name = name
        self._task: Task | None = None

    def start(self) -> None:
        process = self._scheduler.current.process
        self._task = self._scheduler.spawn(process, f"{process.name}.{self._name}", self._work)

    def join(self, timeout: float | None = None) -> None:
        task = self._task
        if task is not None and not task.over:
            task.joining.append(self._scheduler.current)
            self._scheduler.block(timeout)


class Executor:
    """`concurrent.futures.ThreadPoolExecutor`."""

    def __init__(self, scheduler: Scheduler, threads: int, name: str = "pool") -> None:
        self._scheduler = scheduler
        self._most = threads
        self._name = name
        self._process = scheduler.current.process
        self._work: deque[tuple[concurrent.futures.Future[Any], Callable[[], Any]]] = deque()
        self._idle: list[Task] = []
        self._count = 0

    def submit(
        self, work: Callable[..., Any], *args: Any, **named: Any
    ) -> concurrent.futures.Future[Any]:
        if self._scheduler.dead():
            raise Killed
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._work.append((future, lambda: work(*args, **named)))
        if self._idle:
            self._scheduler.wake(self._idle.pop())
        elif self._count < self._most:
            name = f"{self._process.name}.{self._name}-{self._count}"
            self._count += 1
            self._scheduler.spawn(self._process, name, self._serve)
        return future

    def shutdown(self, wait: bool = True) -> None:
        pass

    def _serve(self) -> None:
        while True:
            while not self._work:
                self._idle.append(self._scheduler.current)
                self._scheduler.block()
            future, work = self._work.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except Killed:
                raise
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del future, work


def wait(
    scheduler: Scheduler,
    futures: Sequence[concurrent.futures.Future[Any]],
    timeout: float | None = None,
) -> concurrent.futures._base.DoneAndNotDoneFutures[Any]:
    """`concurrent.futures.wait`."""
    me = scheduler.current
    end_s = None if timeout is None else scheduler.now_s + timeout
    for future in futures:
        future.add_done_callback(lambda _: scheduler.wake(me))
    while not all(future.done() for future in futures):
        left_s = None if end_s is None else end_s - scheduler.now_s
        if left_s is not None and left_s <= 0:
            break
        scheduler.block(left_s)
    done = {future for future in futures if future.done()}
    return concurrent.futures._base.DoneAndNotDoneFutures(done, set(futures) - done)


class _Selector:
    """What an event loop waits at."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._told = False
        self._waiting: Task | None = None

    def select(self, timeout: float | None) -> list[Any]:
        if not self._told and (timeout is None or timeout > 0):
            self._waiting = self._scheduler.current
            self._scheduler.block(timeout)
            self._waiting = None
        else:
            self._scheduler.pause()
        self._told = False
        return []

    def tell(self) -> None:
        self._told = True
        if self._waiting is not None:
            self._scheduler.wake(self._waiting)


class Loop(asyncio.BaseEventLoop):
    """asyncio's own loop, over the simulated clock."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._selector = _Selector(scheduler)
        self._pool: Executor | None = None
        self.set_exception_handler(lambda loop, context: None)  # of what was killed

    def time(self) -> float:
        return self._scheduler.now_s

    def run_in_executor(self, executor: Any, work: Callable[..., Any], *args: Any) -> Any:
        if self._pool is None:
            self._pool = Executor(self._scheduler, 4, "to-thread")
        return asyncio.wrap_future(self._pool.submit(work, *args), loop=self)

    def _process_events(self, events: Any) -> None:
        pass

    def _write_to_self(self) -> None:
        self._selector.tell()
