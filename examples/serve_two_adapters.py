"""A server with adapters as a process of its own, and a client that asks all of them at once.

python examples/serve_two_adapters.py smollm2-135m support=adapters/support pirate=adapters/pirate
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from loramux import Client

# The server reads this variable too.
ADDRESS = os.environ.setdefault("LORAMUX_GRPC_ADDRESS", "127.0.0.1:50051")
QUESTION = [{"role": "user", "content": "My order is late. What can I do?"}]


def main(base: str, *adapters: str) -> None:
    flags = [f"--adapter={adapter}" for adapter in adapters]
    command = [sys.executable, "-m", "loramux", "--base", base, *flags]
    server = subprocess.Popen(command)
    try:
        with Client(ADDRESS) as client, ThreadPoolExecutor() as threads:
            client.wait_ready(timeout_s=300)

            def ask(name: str | None) -> str:
                answer = client.generate(
                    messages=QUESTION, adapter=name, max_tokens=40, temperature=0.0
                )
                return f"{name or 'the base'}: {answer.text()}"

            names = [*(adapter.split("=", 1)[0] for adapter in adapters), None]
            print(*threads.map(ask, names), sep="\n")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(*sys.argv[1:] or ["smollm2-135m"])
