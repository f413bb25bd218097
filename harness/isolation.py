"""Run a function on many items in a process that may hang or crash."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any


def run_isolated(
    function: Callable[[Any, str], Any],
    items: Sequence[Any],
    setting: str,
    timeout_s: float,
    start_s: float = 120.0,
) -> Iterator[tuple[Any, Any]]:
    """Results of ``function(item, setting)`` in order, each with its item.

    One child process works through the items; it is replaced after an item that took too long, ended the
    process or raised (which may have broken the process's GPU context).

    Args:
        function (Callable): importable by the child.
        items (Sequence): the work.
        setting (str): second argument of every call.
        timeout_s (float): for one item.
        start_s (float): for starting a process, importing torch and touching the GPU. Default: 120

    Yields:
        tuple: the item, and its result or a text that says how it failed.
    """
    context = multiprocessing.get_context("spawn")
    done = 0
    while done < len(items):
        ours, theirs = context.Pipe()
        child = context.Process(target=_work, args=(theirs, function, items[done:], setting), daemon=True)
        child.start()
        theirs.close()
        try:
            for outcome in _outcomes(ours, child, timeout_s, start_s):
                yield items[done], outcome
                done += 1
                if isinstance(outcome, str) or done == len(items):
                    break
        finally:
            child.kill()
            child.join()


def _outcomes(connection: Connection, child: BaseProcess, timeout_s: float, start_s: float) -> Iterator[Any]:
    limit = start_s + timeout_s
    while True:
        try:
            if not connection.poll(limit):
                yield f"no answer within {limit:g} s: it hangs"
                return
            yield connection.recv()
        except EOFError:
            child.join()
            yield f"the process ended with exit code {child.exitcode}"
            return
        limit = timeout_s


def _work(connection: Connection, function: Callable, items: Sequence[Any], setting: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    for item in items:
        try:
            connection.send(function(item, setting))
        except Exception as error:  # told to the parent, which starts another process
            connection.send(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
            return
