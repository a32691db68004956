"""Load test of the demo: many clients at once, each with its own picture and question, over the loopback.

Starts a server of its own, asks every question once alone, then lets all clients ask at the same time and compares:
every client must get exactly the answers that it got alone, and none may be lost. Prints latencies and the server's
memory; ends with exit code 1 where an answer was lost or is another's.

    python scripts/load_demo.py --clients 20 --seconds 60
"""

from __future__ import annotations

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from gradio_client import Client, handle_file

from mllm.drawn import scene_samples

TECHNIQUES = "techniques: [{technique: DyVTE, exit_layer: 0.5}]"


def memory(pid: int) -> dict[str, float]:
    """MB that a process has in memory, now and at most; empty where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    found = re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", text, re.MULTILINE)
    return {{"VmRSS": "now", "VmHWM": "most"}[name]: int(size) / 1e3 for name, size in found}


def start(model: str) -> tuple[subprocess.Popen, str]:
    """A demo of its own and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mllm.cli", "demo", "--model", model, "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in server.stdout:
        if "http://" in line:
            return server, re.search(r"http://\S+", line).group()
    raise SystemExit(f"The demo did not start (exit code {server.wait()}).")


class Visitor:
    """One client with its picture and its question."""

    def __init__(self, number: int, address: str, folder: Path, new_tokens: int) -> None:
        sample = next(iter(scene_samples("test", 1000 + number, 1)))
        self.file = folder / f"{number}.png"
        sample.images[0].save(self.file)
        self.question = f"{'So, ' * (number % 7)}{sample.turns[0].question} Say it in {number + 3} words."
        self.new_tokens = new_tokens
        self.client = Client(address, verbose=False)
        self.alone: Any = None
        self.asked = self.wrong = 0
        self.latencies: list[float] = []
        self.errors: list[str] = []

    def ask(self) -> tuple[Any, ...]:
        """Both answers, by what makes them this visitor's."""
        result = self.client.predict(
            self.question, [handle_file(str(self.file))], TECHNIQUES, self.new_tokens, api_name="/ask"
        )
        found = [result["full"], result["techniques"]]
        if any(answer["state"] != "done" for answer in found):
            raise RuntimeError(str([(answer["state"], answer["error"]) for answer in found]))
        return tuple((answer["text"], answer["prompt_tokens"], answer["new_tokens"]) for answer in found)

    def run(self, until: float) -> None:
        """Ask until the time is over; what is asked by then is waited for."""
        while time.monotonic() < until:
            self.asked += 1
            began = time.monotonic()
            try:
                self.wrong += self.ask() != self.alone
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
            else:
                self.latencies.append(time.monotonic() - began)


def main() -> None:
    """Run the test and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=60, help="as long as clients begin new questions")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens of each answer")
    parser.add_argument("--model", default="default")
    given = parser.parse_args()
    server, address = start(given.model)
    try:
        with tempfile.TemporaryDirectory() as folder:
            visitors = [Visitor(n, address, Path(folder), given.new_tokens) for n in range(given.clients)]
            alone = time.monotonic()
            for visitor in visitors:
                visitor.alone = visitor.ask()
            alone = (time.monotonic() - alone) / len(visitors)
            before, seen, done = memory(server.pid), [], threading.Event()

            def watch() -> None:
                while not done.wait(0.25):
                    seen.append(memory(server.pid).get("now", 0.0))

            threading.Thread(target=watch, daemon=True).start()
            began = time.monotonic()
            threads = [threading.Thread(target=visitor.run, args=(began + given.seconds,)) for visitor in visitors]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            took = time.monotonic() - began
            done.set()
            for visitor in visitors:
                visitor.client.close()
            time.sleep(5)  # the server forgets clients that went away
            after = memory(server.pid)
    finally:
        server.terminate()
        server.wait(30)
    latencies = sorted(latency for visitor in visitors for latency in visitor.latencies)
    asked = sum(visitor.asked for visitor in visitors)
    wrong = sum(visitor.wrong for visitor in visitors)
    errors = [error for visitor in visitors for error in visitor.errors]
    cuts = quantiles(latencies, n=10, method="inclusive") if len(latencies) > 1 else [float("nan")] * 9
    print(
        json.dumps(
            {
                "clients": given.clients,
                "questions": asked,
                "answered": len(latencies),
                "lost": asked - len(latencies),
                "another's": wrong,
                "different answers": len({visitor.alone for visitor in visitors}),
                "seconds": round(took, 1),
                "latency alone, mean s": round(alone, 2),
                "latency p50 s": round(cuts[4], 2),
                "latency p90 s": round(cuts[8], 2),
                "latency max s": round(latencies[-1], 2) if latencies else None,
                "server MB before": round(before.get("now", 0)),
                "server MB at most": round(max(seen, default=0)),
                "server MB every 20 s": [round(size) for size in seen[::80]],
                "server MB after": round(after.get("now", 0)),
                "errors": errors[:5],
            },
            indent=2,
        )
    )
    sys.exit(1 if wrong or len(latencies) < asked else 0)


if __name__ == "__main__":
    main()
