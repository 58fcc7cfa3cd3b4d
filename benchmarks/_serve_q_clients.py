"""Many clients of one HTTP service in one process, each with a connection that it keeps: the load of serve_q.py.

    python benchmarks/_serve_q_clients.py PORT PATH NUM_CLIENTS BODIES

BODIES has a request's body a line. For each line on standard input, `START END`, those from START to END are sent: client c of
C sends every C-th of them from the c-th, the next when the last is answered. One JSON object is printed: seconds, and the
answers in the order of the bodies. Standard library only, and as little of it as will do: the clients run on the server's cores.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def request(connection: Connection, message: bytes) -> bytes:
    """One request; anything but a 200 ends the measurement."""
    reader, writer = connection
    writer.write(message)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
    body = await reader.readexactly(length)
    if not head.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"{head.splitlines()[0].decode()}: {body.decode()}")
    return body


async def client(connection: Connection, messages: list[bytes], places: range, answers: dict[int, bytes]) -> None:
    """Sends its share, one after the other."""
    for place in places:
        answers[place] = await request(connection, messages[place])


async def main(port: int, path: str, num_clients: int, bodies: list[bytes]) -> None:
    """Connects, and sends what it is told."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: "
    messages = [head.encode() + str(len(body)).encode() + b"\r\n\r\n" + body for body in bodies]
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(num_clients)]
    while told := await asyncio.to_thread(sys.stdin.readline):
        start, end = map(int, told.split())
        answers: dict[int, bytes] = {}
        started = time.perf_counter()
        await asyncio.gather(
            *(
                client(connection, messages, range(start + c, end, num_clients), answers)
                for c, connection in enumerate(connections)
            )
        )
        seconds = time.perf_counter() - started
        in_order = [json.loads(answers[place]) for place in range(start, end)]
        print(json.dumps({"seconds": seconds, "answers": in_order}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]).read_bytes().splitlines()))
