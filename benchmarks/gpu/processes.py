"""One forked process for each row: a fresh allocator, and an error that ends one row only."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from typing import Any

from torch._inductor import config as inductor

from benchmarks.gpu.rows import ROWS, Setting


def in_a_process(work: Callable[..., Any], *args: Any, seconds: float) -> Any:
    """Return the result of a function in a forked process, or {"error": ...}."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def run() -> None:
        try:
            result = work(*args)
        except ImportError as error:
            result = {"error": f"not installed: {error.name}"}
        except Exception as error:  # of a row: the others go on
            where = traceback.extract_tb(error.__traceback__)[-6:]
            places = [f"{f.filename.rpartition('site-packages/')[2]}:{f.lineno}" for f in where]
            told = f"{type(error).__name__}: {str(error)[:400]}"
            result = {"error": told, "where": places}
        theirs.send(result)

    process = context.Process(target=run)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(max(1.0, seconds)) else {"error": "timed out"}
    except EOFError:
        return {"error": "the process died"}
    finally:
        process.kill()
        process.join()


def warmed(names: list[str], setting: Setting, at_once: int, seconds: float) -> float:
    """Compile for rows, each in a process of its own, with two blocks; return the seconds taken.

    Blocks are alike, so what is compiled for two serves sixteen.
    """
    context = multiprocessing.get_context("fork")
    small = Setting(setting.device, setting.tiny, 2)
    began = time.time()

    def run(name: str) -> None:
        inductor.compile_threads = 1
        step = ROWS[name](small)
        step()
        step()

    waiting, running = list(names), []
    while (waiting or running) and time.time() - began < seconds:
        running = [process for process in running if process.is_alive()]
        while waiting and len(running) < at_once:
            process = context.Process(target=run, args=(waiting.pop(0),))
            process.start()
            running.append(process)
        time.sleep(0.1)
    for process in running:
        process.kill()
        process.join()
    return time.time() - began
