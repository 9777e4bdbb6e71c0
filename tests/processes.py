"""Processes for tests, forked off one that has imported everything.

Importing torch and transformers costs a process 7 s, and its first capture one more; a process that
is forked off a fresh one pays nothing of that, and is as fresh.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
COMMAND = "import sys; sys.path[:0] = ['tests', '.']; from processes import serve; serve()"
LIMIT = 600  # seconds for one script


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run(code: str, folder: Path, *arguments: list[str], env: Sequence[dict] = ()) -> list[str]:
    """Run code in a process for each list of arguments, all at a time; return what each prints.

    env: variables of each, in addition. Raises AssertionError with what was said if one fails.
    """
    files = [str(folder / f"process{i}") for i in range(len(arguments))]
    task = {"code": textwrap.dedent(code), "arguments": arguments, "files": files, "env": env}
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(task) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    out, err = ([Path(f"{file}.{end}").read_text() for file in files] for end in ("out", "err"))
    assert not any(codes), "\n".join([str(codes), *out, *err])
    return out


def module(name: str) -> str:
    """Return code that does what `python -m name` does."""
    return f"import runpy; runpy.run_module({name!r}, run_name='__main__', alter_sys=True)"


@lru_cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", COMMAND],
        cwd=ROOT,
        # One thread, said before torch makes a pool of them: builds for CUDA lose theirs in a fork.
        env=os.environ | {"COLUMNS": "120", "KINETO_LOG_LEVEL": "99", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.communicate)  # ends its input, and so the process
    return server


def serve() -> None:
    """Fork what each line of the input asks for, and print how it ended."""
    import ranks  # noqa: F401 - and with it everything else
    import torch

    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))  # imports as it goes
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        task = json.loads(line)
        env = task["env"] or [{}] * len(task["files"])
        children = []
        for each in zip(task["arguments"], task["files"], env, strict=True):
            sys.stdout.flush()
            child = os.fork()
            if not child:
                _child(task["code"], *each)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def _child(code: str, arguments: list[str], file: str, env: dict[str, str]) -> NoReturn:
    signal.alarm(LIMIT)
    for number, name in ((1, "out"), (2, "err")):
        made = os.open(f"{file}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(made, number)
    sys.argv = ["-c", *arguments]
    os.environ.update(env)
    ended: Any = 1
    try:
        exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
        ended = 0
    except SystemExit as error:
        ended = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(ended or 0))
