"""Contexts measured one after another in this process, or by several that each hold the backbone."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch

from kveraser.errors import InputError
from kveraser.measure.case import TokenizedCase, TokenizedContext
from kveraser.measure.quality import measure_contexts
from kveraser.measure.results import CaseResult
from kveraser.measure.together import Memory
from kveraser.methods import Method
from kveraser.model.backbone import Backbone
from kveraser.model.linear import give_back, lay_out_weights

Loader: TypeAlias = Callable[[], Backbone]
"""Loads the backbone in a worker; it can be pickled."""


MOST_WORKERS = 4
"""Each holds the backbone and the caches that are asked together."""


def processors() -> int:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def most_workers(device: str | None) -> int:
    """As many processes as pay: one where a GPU does the work."""
    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return min(processors(), MOST_WORKERS) if on_cpu else 1


def threads_of(workers: int) -> int:
    """Threads of each of several workers."""
    return max(1, processors() // workers)


@dataclass(frozen=True)
class Work:
    """Contexts that are measured together, each with its cases; the reference of some is held against a prefill."""

    contexts: tuple[tuple[TokenizedContext, tuple[TokenizedCase, ...]], ...]
    checked: tuple[TokenizedCase, ...] = ()


def measure_all(
    backbone: Backbone, methods: Sequence[Method], work: Sequence[Work], workers: int = 1, load: Loader | None = None
) -> Iterator[tuple[Work, list[CaseResult]]]:
    """Measure all contexts; results come as they are done, in no order where there are several workers.

    The numbers of a case depend on the threads of one process, not on which process measured it.

    Raises:
        InputError: fewer than one worker, or several and no way to load the backbone in them.
    """
    if workers < 1 or (workers > 1 and load is None):
        raise InputError(f"workers is {workers}: give at least 1, and a way to load the backbone for more")
    if workers == 1:
        memory, laid_out = Memory(), lay_out_weights(backbone.model)
        try:
            for one in work:
                yield one, measure_contexts(backbone, one.contexts, methods, one.checked, memory)
        finally:
            give_back(laid_out)
        return
    threads = threads_of(workers)
    start = partial(_start, load, tuple(methods), threads)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start)
    try:
        waiting: dict[Future[list[CaseResult]], Work] = {pool.submit(_measure, one): one for one in work}
        while waiting:
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise InputError(
            f"one of {workers} processes ended before its time, most likely for want of memory: take fewer workers, "
            "then run again to go on"
        ) from error
    finally:
        # What is stopped half-way stops at once: what is done has been handed over.
        pool.shutdown(wait=False, cancel_futures=True)


_worker: list[tuple[Backbone, tuple[Method, ...], Memory]] = []
"""What this process measures with, if it is a worker."""


def _start(load: Loader | None, methods: tuple[Method, ...], threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    assert load is not None
    backbone = load()
    lay_out_weights(backbone.model)
    _worker.append((backbone, methods, Memory()))


def _end_with_parent() -> None:
    """A run that is killed leaves no process behind that measures on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _measure(work: Work) -> list[CaseResult]:
    backbone, methods, memory = _worker[0]
    return measure_contexts(backbone, work.contexts, methods, work.checked, memory)
