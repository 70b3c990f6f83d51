"""Redis in memory, as far as `profiles/` uses it: commands, Lua scripts, RESP, and a past.

`Keyspace` answers commands; the project's own scripts run in a Lua 5.1, as they do in Redis.
`Session` is one connection: bytes of RESP in, bytes of RESP out. Neither waits for anything: when
what is sent arrives, and whether the answer does, is the business of `wires.py`. What both do is
held against a real Redis in `test_contracts.py`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hiredis
import lupa.lua51

Reply = Any  # None, int, bytes, Status, Failure, list or dict of these


class Status(str):
    """+OK"""

    __slots__ = ()


class Failure(Exception):
    """An error reply."""


OK = Status("OK")
_WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"


class Stream:
    """Entries by id."""

    def __init__(self) -> None:
        self.entries: list[tuple[tuple[int, int], list[bytes]]] = []
        self.last = (0, 0)

    def copy(self) -> Stream:
        made = Stream()
        made.entries, made.last = list(self.entries), self.last
        return made


class Keyspace:
    """One database. Every change can be taken back, the newest first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: unix seconds."""
        self._clock = clock
        self._values: dict[bytes, Any] = {}
        self._expires_s: dict[bytes, float] = {}
        self._scripts: dict[bytes, str] = {}
        self._past: list[dict[bytes, tuple[Any, float | None]]] = []
        self._changing: dict[bytes, tuple[Any, float | None]] = {}
        self.on_change: Callable[[Iterable[bytes]], None] = lambda keys: None

    def answer(self, command: Sequence[bytes]) -> Reply:
        """Carry out one command, as a whole; a Failure is returned, not raised."""
        self._changing = {}
        try:
            reply = self._do(list(command))
        except Failure as failure:
            reply = failure
        if self._changing:
            self._past.append(self._changing)
            self.on_change(self._changing)
        return reply

    # --- the past

    @property
    def age(self) -> int:
        """Commands that changed something, since the beginning."""
        return len(self._past)

    def go_back(self, age: int) -> None:
        """Lose the newest changes, as a replica that was behind does; scripts are gone as well."""
        while len(self._past) > age:
            for key, (value, expires_s) in self._past.pop().items():
                self._values.pop(key, None)
                self._expires_s.pop(key, None)
                if value is not None:
                    self._values[key] = value
                if expires_s is not None:
                    self._expires_s[key] = expires_s
        self._scripts.clear()

    def hash(self, key: str) -> dict[bytes, bytes]:
        """The fields of a hash; for onlookers."""
        return self._peek(key.encode()) or {}

    def names(self) -> list[bytes]:
        """All that there are; for onlookers."""
        return [key for key in self._values if self._peek(key) is not None]

    # --- values

    def _peek(self, key: bytes) -> Any:
        expires_s = self._expires_s.get(key)
        if expires_s is not None and expires_s <= self._clock():
            return None
        return self._values.get(key)

    def _get(self, key: bytes, kind: type) -> Any:
        value = self._peek(key)
        if value is not None and not isinstance(value, kind):
            raise Failure(_WRONG_TYPE)
        return value

    def _touch(self, key: bytes) -> None:
        """Call it before a change."""
        if key not in self._changing:
            value = self._values.get(key)
            old = value if value is None or isinstance(value, bytes) else value.copy()
            self._changing[key] = (old, self._expires_s.get(key))
        if self._peek(key) is None:
            self._values.pop(key, None)
            self._expires_s.pop(key, None)

    def _mine(self, key: bytes, kind: type) -> Any:
        """To be changed; made where there is none."""
        self._get(key, kind)
        self._touch(key)
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = kind()
        return value

    def _drop_empty(self, key: bytes) -> None:
        if not self._values.get(key):
            self._values.pop(key, None)
            self._expires_s.pop(key, None)

    # --- commands

    def _do(self, command: list[bytes]) -> Reply:
        name = command[0].upper().decode()
        method = getattr(self, "_" + name.lower().replace(" ", "_") + "_command", None)
        if method is None:
            raise Failure(f"ERR unknown command '{name}', with args beginning with: ")
        return method(*command[1:])

    def _ping_command(self) -> Reply:
        return Status("PONG")

    def _get_command(self, key: bytes) -> Reply:
        return self._get(key, bytes)

    def _set_command(self, key: bytes, value: bytes) -> Reply:
        self._touch(key)
        self._expires_s.pop(key, None)
        self._values[key] = value
        return OK

    def _unlink_command(self, *keys: bytes) -> Reply:
        there = [key for key in keys if self._peek(key) is not None]
        for key in there:
            self._touch(key)
            self._values.pop(key, None)
            self._expires_s.pop(key, None)
        return len(there)

    def _flushall_command(self) -> Reply:
        self._unlink_command(*list(self._values))
        return OK

    def _hget_command(self, key: bytes, name: bytes) -> Reply:
        return (self._get(key, dict) or {}).get(name)

    def _hmget_command(self, key: bytes, *names: bytes) -> Reply:
        fields = self._get(key, dict) or {}
        return [fields.get(name) for name in names]

    def _hgetall_command(self, key: bytes) -> Reply:
        return dict(self._get(key, dict) or {})

    def _hset_command(self, key: bytes, *pairs: bytes) -> Reply:
        if not pairs or len(pairs) % 2:
            raise Failure("ERR wrong number of arguments for 'hset' command")
        fields = self._mine(key, dict)
        before = len(fields)
        fields.update(zip(pairs[::2], pairs[1::2], strict=True))
        return len(fields) - before

    def _hsetnx_command(self, key: bytes, name: bytes, value: bytes) -> Reply:
        fields = self._mine(key, dict)
        if name in fields:
            return 0
        fields[name] = value
        return 1

    def _hdel_command(self, key: bytes, *names: bytes) -> Reply:
        fields = self._get(key, dict) or {}
        there = [name for name in names if name in fields]
        if there:
            self._touch(key)
            for name in there:
                del self._values[key][name]
            self._drop_empty(key)
        return len(there)

    def _expire_command(self, key: bytes, seconds: bytes) -> Reply:
        return self._expireat_command(key, b"%r" % (self._clock() + int(seconds)))

    def _expireat_command(self, key: bytes, when_s: bytes) -> Reply:
        if self._peek(key) is None:
            return 0
        self._touch(key)
        self._expires_s[key] = float(when_s)
        return 1

    def _ttl_command(self, key: bytes) -> Reply:
        if self._peek(key) is None:
            return -2
        expires_s = self._expires_s.get(key)
        return -1 if expires_s is None else round(expires_s - self._clock())

    def _sadd_command(self, key: bytes, *members: bytes) -> Reply:
        held = self._mine(key, dict)  # a dict, so that it has an order
        before = len(held)
        held.update(dict.fromkeys(members, b""))
        return len(held) - before

    def _srem_command(self, key: bytes, *members: bytes) -> Reply:
        return self._hdel_command(key, *members)

    def _smembers_command(self, key: bytes) -> Reply:
        return list(self._get(key, dict) or {})

    def _srandmember_command(self, key: bytes, count: bytes | None = None) -> Reply:
        members = list(self._get(key, dict) or {})
        if count is None:
            return members[0] if members else None
        return members[: int(count)]

    def _xadd_command(self, key: bytes, *rest: bytes) -> Reply:
        at = rest.index(b"*")
        stream = self._mine(key, Stream)
        now_ms = int(self._clock() * 1000)
        last = stream.last
        stream.last = (now_ms, 0) if now_ms > last[0] else (last[0], last[1] + 1)
        stream.entries.append((stream.last, list(rest[at + 1 :])))
        return _stream_id(stream.last)

    def _xrevrange_command(self, key: bytes, high: bytes, low: bytes, *count: bytes) -> Reply:
        assert (high, low) == (b"+", b"-")
        stream = self._get(key, Stream) or Stream()
        newest = [[_stream_id(at), fields] for at, fields in reversed(stream.entries)]
        return newest[: int(count[1])] if count else newest

    def _xread_command(self, *rest: bytes) -> Reply:
        most = int(rest[rest.index(b"COUNT") + 1]) if b"COUNT" in rest else None
        key, after = rest[rest.index(b"STREAMS") + 1 :]
        parts = after.split(b"-")
        begin = (int(parts[0]), int(parts[1]) if len(parts) > 1 else 0)
        stream = self._get(key, Stream) or Stream()
        found = [[_stream_id(at), fields] for at, fields in stream.entries if at > begin]
        return {key: found[:most]} if found else None

    def _scan_command(self, cursor: bytes, *rest: bytes) -> Reply:
        options = dict(zip((o.upper() for o in rest[::2]), rest[1::2], strict=True))
        pattern = options.get(b"MATCH", b"*").decode("latin-1")
        matches = re.compile(fnmatch.translate(pattern)).match
        return [b"0", [key for key in self.names() if matches(key.decode("latin-1"))]]

    def _info_command(self, section: bytes = b"") -> Reply:
        return b"# Cluster\r\ncluster_enabled:0\r\n"

    def _command_command(self, *rest: bytes) -> Reply:
        assert rest[0].upper() == b"INFO"
        names = {n.removeprefix("_").removesuffix("_command") for n in dir(self)}
        return [[name] if name.decode().lower() in names else None for name in rest[1:]]

    def _script_command(self, what: bytes, script: bytes = b"") -> Reply:
        if what.upper() == b"FLUSH":
            self._scripts.clear()
            return OK
        assert what.upper() == b"LOAD"
        sha = hashlib.sha1(script).hexdigest().encode()
        self._scripts[sha] = script.decode()
        return sha

    def _evalsha_command(self, sha: bytes, count: bytes, *rest: bytes) -> Reply:
        script = self._scripts.get(sha)
        if script is None:
            raise Failure("NOSCRIPT No matching script. Please use EVAL.")
        keys, arguments = rest[: int(count)], rest[int(count) :]
        return _LUA.run(script, keys, arguments, self._do)


def _stream_id(at: tuple[int, int]) -> bytes:
    return b"%d-%d" % at


class _Lua:
    """One interpreter, in which each script is compiled once."""

    def __init__(self) -> None:
        self._lua = lupa.lua51.LuaRuntime(encoding=None, unpack_returned_tuples=False)
        self._table = self._lua.table_from
        self._compiled: dict[str, Any] = {}
        self._do: Callable[[list[bytes]], Reply] = lambda command: None
        self._failed: Failure | None = None
        self._redis = self._lua.eval(
            b"function(call) return {"
            b" call = function(...) return call({...}) end,"
            b" error_reply = function(words) return { err = words } end,"
            b" status_reply = function(words) return { ok = words } end } end"
        )(self._call)

    def run(
        self,
        script: str,
        keys: Sequence[bytes],
        arguments: Sequence[bytes],
        do: Callable[[list[bytes]], Reply],
    ) -> Reply:
        compiled = self._compiled.get(script)
        if compiled is None:
            source = f"return function(KEYS, ARGV, redis) {script}\nend"
            compiled = self._compiled[script] = self._lua.execute(source.encode())
        self._do, self._failed = do, None
        try:
            result = compiled(self._table(keys), self._table(arguments), self._redis)
        except lupa.lua51.LuaError as error:
            raise self._failed or Failure(f"ERR {error}") from error
        return self._out(result)

    def _call(self, command: Any) -> Any:
        try:
            return self._into(self._do([_argument(part) for part in command.values()]))
        except Failure as failure:
            self._failed = failure
            raise

    def _into(self, reply: Reply) -> Any:
        """A reply, as a script sees it (Redis' manual, "Data type conversion")."""
        if reply is None:
            return False
        if isinstance(reply, Status):
            return self._table({b"ok": reply.encode()})
        if isinstance(reply, dict):
            reply = [part for pair in reply.items() for part in pair]
        if isinstance(reply, list):
            return self._table([self._into(part) for part in reply])
        return reply

    def _out(self, value: Any) -> Reply:
        """What a script returned, as a reply."""
        if value is None or value is False:
            return None
        if value is True:
            return 1
        if isinstance(value, float | int):
            return int(value)
        if isinstance(value, bytes):
            return value
        if value[b"err"] is not None:
            raise Failure(value[b"err"].decode())
        if value[b"ok"] is not None:
            return Status(value[b"ok"].decode())
        out: list[Reply] = []
        while (part := value[len(out) + 1]) is not None:
            out.append(self._out(part))
        return out


def _argument(part: Any) -> bytes:
    """Numbers go to a command as text."""
    if isinstance(part, bytes):
        return part
    return b"%d" % part if part == int(part) else b"%.17g" % part


_LUA = _Lua()


class Session:
    """The server's end of one connection."""

    def __init__(self, keyspace: Keyspace) -> None:
        self._keyspace = keyspace
        self._reader = hiredis.Reader()
        self._resp3 = False

    def commands(self, data: bytes) -> list[list[bytes]]:
        """What a client asks for with these bytes, once all of it is there."""
        self._reader.feed(data)
        found = []
        while (command := self._reader.gets()) is not False:
            found.append(command)
        return found

    def answer(self, command: Sequence[bytes]) -> bytes:
        """Carry a command out; the bytes to send back."""
        name = command[0].upper()
        reply: Reply
        if name == b"HELLO":
            self._resp3 = command[1:2] == [b"3"]
            reply = {b"server": b"redis", b"version": b"7.4.0", b"proto": 3, b"modules": []}
        elif name in (b"CLIENT", b"SELECT", b"AUTH"):
            reply = OK
        else:
            reply = self._keyspace.answer(command)
        out = bytearray()
        self._write(out, reply)
        return bytes(out)

    def _write(self, out: bytearray, reply: Reply) -> None:
        if reply is None:
            out += b"_\r\n" if self._resp3 else b"$-1\r\n"
        elif isinstance(reply, Status):
            out += b"+%s\r\n" % reply.encode()
        elif isinstance(reply, Failure):
            out += b"-%s\r\n" % str(reply).encode()
        elif isinstance(reply, int):
            out += b":%d\r\n" % reply
        elif isinstance(reply, bytes):
            out += b"$%d\r\n%s\r\n" % (len(reply), reply)
        elif isinstance(reply, dict):
            self._write_dict(out, reply)
        else:
            out += b"*%d\r\n" % len(reply)
            for part in reply:
                self._write(out, part)

    def _write_dict(self, out: bytearray, reply: dict[Any, Any]) -> None:
        out += b"%%%d\r\n" % len(reply) if self._resp3 else b"*%d\r\n" % (2 * len(reply))
        for key, value in reply.items():
            self._write(out, key)
            self._write(out, value)
