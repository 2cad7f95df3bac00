"""The load generator: a process of its own, as light as it can be, since it shares two cores with the server.

One thread, one epoll, keep-alive connections, each with one request under way. Every request waits for its whole answer
and counts only if that is HTTP 200 with `code` 200 in its JSON. With a rate, requests are due at fixed times and a
request's time counts from when it was due, not from when a connection was free: waiting in line is not hidden.

Reads its orders as JSON from the command line, writes one JSON object: see `Result`.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from events import bodies, lines, templates

TIMEOUT_S = 60
PAUSE_S = 0.05  # after a 503
GIVE_UP_S = 20  # without a 200


@dataclass(frozen=True)
class Order:
    """What to send. rate: requests a second, 0 for as fast as answers come. stop: a file that ends it when it is there."""

    port: int
    cache: str
    path: str = "/batch"
    api_key: str = "bench-key"
    events_per_request: int = 1000
    requests: int = 1000
    connections: int = 4
    rate: float = 0
    stop: str = ""


@dataclass
class Result:
    """What came of it. Times in seconds, latencies in milliseconds; by_second: events acknowledged."""

    events: int = 0
    seconds: float = 0
    client_cpu_s: float = 0
    payload_bytes: int = 0
    p50_ms: float = 0
    p99_ms: float = 0
    max_ms: float = 0
    statuses: dict[str, int] = field(default_factory=dict)
    by_second: list[int] = field(default_factory=list)


class Connection:
    """One keep-alive connection with at most one request under way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(0)
        self.due = 0.0
        self.request = b""
        self._rest = memoryview(b"")
        self._answer = b""

    def send(self, request: bytes, due: float) -> bool:
        """Begin a request; true if all of it is out."""
        self.request, self.due = request, due
        self._rest, self._answer = memoryview(request), b""
        return self.push()

    def push(self) -> bool:
        """Send what is left; true if all of it is out."""
        while self._rest:
            try:
                self._rest = self._rest[self.socket.send(self._rest) :]
            except BlockingIOError:
                return False
        return True

    def pull(self) -> tuple[int, bytes] | None:
        """Read what came; the status and body once they are whole."""
        data = self.socket.recv(65_536)
        if not data:
            raise ConnectionError("The server closed a connection without an answer")
        self._answer += data
        head, found, body = self._answer.partition(b"\r\n\r\n")
        if not found:
            return None
        place = head.lower().index(b"content-length:")
        length = int(head[place + 15 :].split(b"\r\n", 1)[0])
        return (int(head[9:12]), body) if len(body) >= length else None


class Load:
    """One run of an order."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._poll = select.epoll()
        self._connections: dict[int, Connection] = {}
        self._idle: deque[Connection] = deque()
        self._latencies: list[float] = []
        self._seconds: Counter[int] = Counter()
        self._statuses: Counter[str] = Counter()
        self._bytes = 0

    def run(self) -> Result:
        """Send everything and wait for every answer."""
        order = self._order
        made = templates(
            lines(Path(order.cache)), events=order.events_per_request, api_key=order.api_key
        )
        for _ in range(order.connections):
            connection = Connection(order.port)
            self._connections[connection.socket.fileno()] = connection
            self._poll.register(connection.socket, select.EPOLLIN)
            self._idle.append(connection)
        cpu = time.process_time()
        self._started = self._heard = time.perf_counter()
        self._serve(self._requests(bodies(made, order.requests)))
        seconds = time.perf_counter() - self._started
        return self._result(seconds, time.process_time() - cpu)

    def _requests(self, made: Iterator[bytes]) -> Iterator[bytes]:
        head = (
            f"POST {self._order.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        stop = Path(self._order.stop) if self._order.stop else None
        for body in made:
            if stop is not None and stop.exists():
                return
            self._bytes += len(body)
            yield head + str(len(body)).encode() + b"\r\n\r\n" + body

    def _serve(self, requests: Iterator[bytes]) -> None:
        interval = 1 / self._order.rate if self._order.rate else 0.0
        due = self._started
        upcoming = next(requests, None)
        while upcoming is not None or len(self._idle) < len(self._connections):
            now = time.perf_counter()
            while upcoming is not None and self._idle and (not interval or due <= now):
                self._begin(self._idle.popleft(), upcoming, due if interval else now)
                due += interval
                upcoming = next(requests, None)
                now = time.perf_counter()
            wait = TIMEOUT_S
            if upcoming is not None and self._idle:
                wait = max(0.0, due - now)
            ready = self._poll.poll(wait)
            if not ready and wait == TIMEOUT_S:
                raise TimeoutError(f"No answer for {TIMEOUT_S} s")
            for number, event in ready:
                self._react(self._connections[number], event)

    def _begin(self, connection: Connection, request: bytes, due: float) -> None:
        if not connection.send(request, due):
            self._poll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)

    def _react(self, connection: Connection, event: int) -> None:
        if event & select.EPOLLOUT and connection.push():
            self._poll.modify(connection.socket, select.EPOLLIN)
        if event & ~select.EPOLLOUT:
            answer = connection.pull()
            if answer is not None:
                self._answered(connection, *answer)

    def _answered(self, connection: Connection, status: int, body: bytes) -> None:
        self._statuses[str(status)] += 1
        now = time.perf_counter()
        if status == 503 and now - self._heard < GIVE_UP_S:  # it asks for a moment: once more
            time.sleep(PAUSE_S)
            self._begin(connection, connection.request, connection.due)
            return
        if status != 200 or json.loads(body).get("code") != 200:
            raise RuntimeError(f"Answer {status}: {body[:500].decode(errors='replace')}")
        self._heard = now
        self._latencies.append(now - connection.due)
        self._seconds[int(now - self._started)] += self._order.events_per_request
        self._idle.append(connection)

    def _result(self, seconds: float, cpu_s: float) -> Result:
        ordered = sorted(self._latencies)
        return Result(
            events=len(ordered) * self._order.events_per_request,
            seconds=seconds,
            client_cpu_s=cpu_s,
            payload_bytes=self._bytes,
            p50_ms=ordered[len(ordered) // 2] * 1000,
            p99_ms=ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)] * 1000,
            max_ms=ordered[-1] * 1000,
            statuses=dict(self._statuses),
            by_second=[self._seconds[second] for second in range(int(seconds) + 1)],
        )


def main() -> None:
    """Carry out the order given as the one argument."""
    order = Order(**json.loads(sys.argv[1]))
    json.dump(asdict(Load(order).run()), sys.stdout)


if __name__ == "__main__":
    main()
