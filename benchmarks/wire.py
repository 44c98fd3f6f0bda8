"""A slow wire: a TCP relay with a rate and a delay, and an S3 server behind it.

    python benchmarks/wire.py 5e6 20e6 [--delay SECONDS] [--host HOST]

starts moto's server and a wire of each rate in front of it, prints their ports as JSON, and ends
with its standard input. What goes to the server is only delayed; what comes back shares the rate
among all connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

CHUNK_BYTES = 1 << 14


class Wire:
    """A relay to a server on this machine, on a thread of its own.

    Args:
        port: of the server.
        bytes_per_s: that come back, of all connections together; None for as many as can.
        delay_s: of each direction.

    Attributes:
        port: to connect to.
        is_cut: nothing comes back any more, and no connection ends.
        asked: the paths of GET requests that began in a piece of their own.
    """

    def __init__(
        self,
        port: int,
        bytes_per_s: float | None = None,
        delay_s: float = 0.0,
        host: str = "127.0.0.1",
    ) -> None:
        self.bytes_per_s = bytes_per_s
        self.delay_s = delay_s
        self.is_cut = False
        self.asked: list[str] = []
        self._server_port = port
        self._free_at = 0.0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._connected, host, 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """End all connections. Closing twice does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def _run(self, job: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(job, self._loop).result(60)

    async def _stop(self) -> None:
        self._server.close()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            its_reader, its_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
            try:
                await asyncio.gather(
                    self._pass_on(reader, its_writer, is_back=False),
                    self._pass_on(its_reader, writer, is_back=True),
                )
            finally:
                its_writer.close()
                writer.close()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_back: bool
    ) -> None:
        on_the_wire: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        now = self._loop.time

        async def deliver() -> None:
            while True:
                due, data = await on_the_wire.get()
                await asyncio.sleep(max(0.0, due - now()))
                while is_back and self.is_cut:
                    await asyncio.sleep(0.01)
                with suppress(OSError):
                    if not data:
                        writer.write_eof()
                        return
                    writer.write(data)
                    await writer.drain()

        delivering = asyncio.ensure_future(deliver())
        try:
            data = b"?"
            while data:
                data = await reader.read(CHUNK_BYTES)
                if is_back and self.bytes_per_s is not None:
                    self._free_at = max(self._free_at, now()) + len(data) / self.bytes_per_s
                    await asyncio.sleep(max(0.0, self._free_at - now()))
                if data.startswith(b"GET ") and not is_back:
                    self.asked.append(data.split()[1].decode())
                on_the_wire.put_nowait((now() + self.delay_s, data))
            await delivering
        finally:
            delivering.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rates", nargs="*", type=float, help="bytes a second")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds, of each direction")
    parser.add_argument("--host", default="127.0.0.1", help="that the wires can be reached at")
    options = parser.parse_args()
    from moto.server import ThreadedMotoServer

    logging.disable()
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    wires = [Wire(port, rate, options.delay, options.host) for rate in (*options.rates, None)]
    print(json.dumps([wire.port for wire in wires]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
