"""Serves the page: its files, and a race as lines of JSON."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles

from ..errors import EXPECTED, UsageError
from ..terminal import standard_output
from .race import MAX_CHARS, Order, Race

HOST, PORT = "127.0.0.1", 8765
PAGE = Path(__file__).parent / "page"
MAX_BYTES = 8 * MAX_CHARS  # of a request; a character takes six bytes of JSON at most, in places
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; object-src 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}

log = logging.getLogger(__name__)


def _refused(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


class Guard:
    """Lets through what comes from this page in a browser of this machine.

    A page of another site could otherwise have a browser send requests here, under a name that it
    has made point to this machine (DNS rebinding), or simply across origins.

    Args:
        app: what is guarded.
        host: that the server listens on.
    """

    def __init__(self, app, host: str):
        self.app, self.host = app, host

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        app = self._refusal(Request(scope)) or self.app
        await app(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> JSONResponse | None:
        host = request.headers.get("host", "")
        if not self._knows(host):
            return _refused(403, f"The name {host!r} is not one of this server.")
        if request.method != "POST":
            return None
        if request.headers.get("origin") != f"{request.url.scheme}://{host}":
            return _refused(403, "Requests are taken from this server's own page only.")
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            return _refused(411, "The request does not say how long it is.")
        if int(length) > MAX_BYTES:
            return _refused(413, f"The text is too long: at most {MAX_CHARS:,} characters.")
        return None

    def _knows(self, host: str) -> bool:
        """Tell whether a page of this name can be ours; addresses cannot be made to point here."""
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        if name in ("localhost", "127.0.0.1", "::1", self.host):
            return True
        if is_loopback(self.host) or name is None:
            return False
        return name == socket.gethostname().lower() or _address(name) is not None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Tell whether an address is this machine's alone."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


class RaceRunner:
    """Runs one race at a time, in a thread of its own.

    Args:
        race: the models.
    """

    def __init__(self, race: Race):
        self.race = race
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._worker = ThreadPoolExecutor(1, "race")

    def start(self, order: Order) -> tuple[asyncio.Queue, Callable[[], None]] | None:
        """Return a queue of the events to come, None behind the last one, and what ends it early;
        None if a race is under way."""
        if not self._busy.acquire(blocking=False):
            return None
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._stop = stop = threading.Event()

        def put(event: dict | None) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def work() -> None:
            try:
                last = self.race.run(order, put, stop)
            except EXPECTED as error:
                last = {"event": "error", "message": str(error)}
            except Exception:
                log.exception("a generation failed")
                last = {"event": "error", "message": "An internal error; the terminal shows it."}
            self._busy.release()  # before a page hears of the end, and may send the next order
            put(last)
            put(None)

        self._worker.submit(work)
        return events, stop.set

    def stop(self) -> None:
        """Have the race under way end soon."""
        self._stop.set()

    def close(self) -> None:
        """Stop the race under way, and wait until its thread has ended."""
        self.stop()
        self._worker.shutdown()


class EventStream(StreamingResponse):
    """Streams events as lines; calls ``left`` when it ends, also where its reader goes away."""

    def __init__(self, first: dict, events: asyncio.Queue, left: Callable[[], None]):
        super().__init__(self._lines(first, events), media_type="application/x-ndjson")
        self._left = left

    @staticmethod
    async def _lines(event: dict | None, events: asyncio.Queue) -> AsyncIterator[str]:
        while event is not None:
            yield json.dumps(event) + "\n"
            event = await events.get()

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left()


def make_app(race: Race, host: str) -> FastAPI:
    """Make the application: ``/`` the page, ``/api/offer``, ``/api/run`` and ``/api/stop``."""
    runner = RaceRunner(race)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        runner.close()

    # Without the pages about its interface, which come from other servers.
    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, host=host)

    @app.exception_handler(RequestValidationError)
    async def wrong_order(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = str(first["loc"][-1]).replace("_", " ")
        return _refused(422, f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}")

    @app.get("/api/offer")
    async def offer() -> dict:
        return race.offer()

    @app.post("/api/run")
    async def run(order: Order):
        started = runner.start(order)
        if started is None:
            return _refused(409, "Busy with another generation; stop it, or wait for its end.")
        events, left = started
        first = await events.get()
        if first["event"] == "error":
            return _refused(400, first["message"])
        return EventStream(first, events, left)

    @app.post("/api/stop")
    async def stop() -> dict:
        runner.stop()
        return {}

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Raises:
        OSError: the port is taken, or the address not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python adds the address
        raise OSError(f"cannot listen on {host}, port {port}: {reason}; try --port") from error


def serve(make_race: Callable[[], Race], host: str | None, port: int | None) -> None:
    """Serve the page until it is interrupted.

    Args:
        make_race: loads the models, once the port is known to be free.
        host, port: None: this machine alone, and the usual port.
    """
    host = HOST if host is None else host
    port = PORT if port is None else port
    if not 0 <= port < 1 << 16:
        raise UsageError(f"--port must be in [0, 65536), got {port}")
    with listen(host, port) as listener:
        app = make_app(make_race(), host)
        config = uvicorn.Config(
            app, log_level="warning", lifespan="on", timeout_graceful_shutdown=1,
        )  # fmt: skip
        out = standard_output()
        name = f"[{host}]" if ":" in host else host
        out.line(f"http://{name}:{listener.getsockname()[1]}/ shows the page; Ctrl-C ends it")
        if not is_loopback(host):
            out.line("whoever reaches this address can use it: there is no password")
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # how it is meant to end
            pass
