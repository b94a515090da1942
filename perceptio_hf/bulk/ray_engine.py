"""Workers of Ray Data: several GPUs of this machine, or the machines of a cluster."""

import logging
import os
import pickle
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from perceptio_hf.extras import missing

from .engines import Batch, Job, Result, work_through

DEVICES = ("cpu", "cuda", "mps")  # a worker sees one accelerator, whichever it is
_BATCHES, _ITEMS = 8, 64  # that a worker is sent at a time, at most: within them it reads ahead
_ROUNDS = 4  # each worker is sent that many parcels at least, so that all end at about the same time
_TRIES = 3  # to work on a parcel, or for each worker to open the job, while processes end over it
_PATIENCE = 60  # seconds without a result, after which somebody wants to know why
_QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RayEngine:
    """Workers that Ray Data starts, feeds, and starts again where one dies; results come in the order of the batches.

    Each worker has one GPU where there are any; else one processor of a cluster, or its share of one machine's.

    Args:
        address: of a running cluster, "auto" or HOST:PORT; by default what the variable RAY_ADDRESS says, or else Ray
            is started on this machine and stopped at the end. Pictures, the checkpoint and this package must be found
            on every machine under the same names.
        workers: how many; by default one for each GPU, without GPUs one.
        device: what each of them works on: "cpu" leaves the GPUs alone; by default the GPU where there is one.

    Raises:
        ValueError: for a number of workers or a device that cannot be.
        ImportError: where Ray is not installed.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, device: str | None = None):
        if workers is not None and workers < 1:
            raise ValueError(f"--workers is {workers}; it must be 1 or more.")
        if device not in (None, *DEVICES):
            raise ValueError(
                f"--device {device}: a worker of Ray sees its own GPU alone; name {', '.join(DEVICES)}, or none."
            )
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self.named = f"--address {address}" if address else f"RAY_ADDRESS={self.address}"
        self.workers, self.device = workers, device
        _quieten()
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise missing(error, "--engine ray") from error

    def run(self, job: Job, batches: Sequence[Batch]) -> Iterator[list[Result]]:
        """As the protocol says. Items that have a `file` need it where they are worked on.

        Raises:
            ValueError: for a cluster that is not there or too small, a worker's machine without a file that is here,
                and workers that end again and again.
        """
        if not batches:
            return
        import ray

        # Where a worker dies, Ray says so on standard output, some of it when it is shut down; that is for the
        # command's own document.
        with redirect_stdout(sys.stderr), self._cluster() as resources:
            machines = sum(node["Alive"] for node in ray.nodes())
            workers, needs = self._share(resources, machines, len(batches))
            parcels = [
                {"number": number, "parcel": _pack(parcel)} for number, parcel in enumerate(_parcels(batches, workers))
            ]
            tally = _open_tally(workers)
            done = ray.data.from_items(parcels, override_num_blocks=len(parcels)).map(
                _RayWorker,
                fn_constructor_args=(_pack(job), tally),
                compute=ray.data.ActorPoolStrategy(size=workers),
                **needs,
            )
            # Closed by hand: an error's traceback would keep the rows, and they the workers and their GPUs.
            with closing(iter(done.iter_rows())) as rows, _said_after(_PATIENCE, workers, needs) as said:
                for row in _rows(rows):
                    said.cancel()
                    outcome = pickle.loads(row["outcome"])
                    if isinstance(outcome, BaseException):
                        raise outcome
                    _check_there(outcome)
                    yield from outcome.results

    def _share(self, resources: dict[str, float], machines: int, most: int) -> tuple[int, dict[str, int]]:
        """How many workers, at most `most`, and what each takes of the resources that the machines have together."""
        gpus = 0 if self.device in ("cpu", "mps") else int(resources.get("GPU", 0))
        cpus = int(resources.get("CPU", 0))
        if self.device == "cuda" and not gpus:
            raise ValueError("--device cuda, but Ray has no GPU.")
        workers = min(self.workers or gpus or 1, most)
        if gpus and workers > gpus:
            raise ValueError(f"--workers {workers}, but Ray has {gpus} GPUs; each worker needs one.")
        if not gpus and workers > cpus:
            raise ValueError(f"--workers {workers}, but Ray has {cpus} processors.")
        if gpus:
            return workers, {"num_gpus": 1}
        # A worker gets as many threads. Which machine of several has how many processors is not known here.
        return workers, {"num_cpus": cpus // workers if machines == 1 else 1}

    @contextmanager
    def _cluster(self) -> Iterator[dict[str, float]]:
        """Ray, running: what it has of processors ("CPU") and accelerators ("GPU"). What we start, we stop."""
        import ray

        ours = not ray.is_initialized()
        if ours:
            self._check_address()
            options: dict[str, Any] = {"address": self.address or "local"}
            if not self.address:  # a worker more than there are processors would wait for ever
                options |= {"include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, self.workers or 1)}
            try:
                with _without_chatter():
                    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except Exception as error:  # also bare ones, where a busy machine lets its processes start too slowly
                reason = " ".join(str(error).split())[:200]
                if self.address:
                    raise ValueError(
                        f"{self.named}: no Ray cluster answers there ({reason}). Where it wants a token, set "
                        "RAY_AUTH_MODE=token, with the token in ~/.ray/auth_token."
                    ) from None
                raise ValueError(f"Ray could not be started on this machine ({reason}); try again.") from None
        context = ray.data.DataContext.get_current()
        before = context.execution_options.preserve_order, context.enable_progress_bars
        context.execution_options.preserve_order, context.enable_progress_bars = True, False
        try:
            yield ray.cluster_resources()
        finally:
            context.execution_options.preserve_order, context.enable_progress_bars = before
            if ours:
                ray.shutdown()

    def _check_address(self) -> None:
        """Raises ValueError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
        host, colon, port = (self.address or "").rpartition("://")[2].rpartition(":")
        if not colon:
            return
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.named}: no Ray cluster answers there ({error}).") from None


def _rows(rows: Iterator[dict[str, bytes]]) -> Iterator[dict[str, bytes]]:
    """The rows; what stops them is Ray's own, since errors of the job are rows."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _ended(error) from None
        yield row


def _ended(error: BaseException) -> ValueError:
    """An error of Ray's own in one line, the last of what it says: before it stands a traceback of other processes."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ValueError(
        f"Ray's workers ended ({type(error).__name__}: {lines[-1][:200] if lines else 'no reason'}). This package must "
        "be installed on every machine; where memory is short, a smaller --batch-size or fewer --workers help. The "
        "same command goes on from the results that are there."
    )


@contextmanager
def _said_after(seconds: float, workers: int, needs: dict[str, int]) -> Iterator[threading.Timer]:
    """Say what is waited for, unless the timer is cancelled before."""

    def say() -> None:
        import ray

        (kind, each), free, whole = next(iter(needs.items())), ray.available_resources(), ray.cluster_resources()
        kind = kind.removeprefix("num_").removesuffix("s").upper()
        print(
            f"perceptio: no result of Ray's for {seconds} seconds. Its workers load the model, or wait for a place: "
            f"{workers} of them ask for {each} {kind} each; {free.get(kind, 0):g} of {whole.get(kind, 0):g} are free.",
            file=sys.stderr,
        )

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


@dataclass(frozen=True)
class _Outcome:
    """What a worker made of a parcel.

    Args:
        results: of each batch.
        host: the worker's machine.
        absent: files of items that are not there.
    """

    results: list[list[Result]]
    host: str
    absent: list[str]


def _check_there(outcome: _Outcome) -> None:
    """Raises ValueError where a worker's machine lacks a file that is here: its item would count as one that cannot be
    read, for ever."""
    here = [path for path in outcome.absent if os.path.exists(path)]
    if here:
        raise ValueError(
            f"{here[0]} is not on the machine {outcome.host}, where a worker of Ray runs; pictures must be found on "
            "every machine under the same names."
        )


def _absent(batches: Sequence[Batch]) -> list[str]:
    files = {getattr(item, "file", None) for batch in batches for item in batch} - {None}
    return sorted(path for path in files if not os.path.exists(path))


class _Tally:
    """What was begun and not done: Ray starts workers again, and gives them what others died of, without end."""

    def __init__(self, workers: int):
        self.most, self.opened, self.begun = (1 + _TRIES) * workers, 0, Counter()

    def open(self) -> bool:
        """Whether one more worker may open the job."""
        self.opened += 1
        return self.opened <= self.most

    def begin(self, number: int) -> bool:
        """Whether a parcel may be worked on once more."""
        self.begun[number] += 1
        return self.begun[number] <= _TRIES

    def done(self) -> None:
        """A parcel is: workers that open the job from now on replace some that worked."""
        self.opened = 0


def _open_tally(workers: int) -> Any:
    """A tally that all workers ask.

    Raises:
        ValueError: where Ray cannot run it, as on a machine without this package.
    """
    import ray

    tally = ray.remote(_Tally).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote(workers)
    try:
        ray.get(tally.done.remote())
    except ray.exceptions.RayError as error:
        raise _ended(error) from None
    return tally


class _RayWorker:
    """What runs in a process of Ray's. Errors travel as values: Ray would try again and wrap them."""

    def __init__(self, job: bytes, tally: Any):
        import ray

        self.tally, self.error = tally, None
        try:
            if not ray.get(tally.open.remote()):
                raise ValueError(
                    f"The processes of Ray's workers ended {_TRIES} times each before they had done anything; where "
                    "memory is short, fewer --workers may help."
                )
            self.worker = pickle.loads(job)()
        except Exception as error:
            self.error = error

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        import ray

        if self.error is not None:
            return {"outcome": _pack_error(self.error)}
        try:
            batches = pickle.loads(row["parcel"])
            if not ray.get(self.tally.begin.remote(row["number"])):
                raise ValueError(
                    f"{_TRIES} processes of Ray's ended over {_named(batches)}. Where memory is short, a smaller "
                    "--batch-size may help; else leave out what ends them. The same command goes on."
                )
            results = list(work_through(self.worker, batches))
            self.tally.done.remote()
            return {"outcome": _pack(_Outcome(results, socket.gethostname(), _absent(batches)))}
        except Exception as error:
            return {"outcome": _pack_error(error)}


def _named(batches: Sequence[Batch]) -> str:
    """The items of batches, by their pictures where they have some."""
    names = [str(getattr(item, "picture", item)) for batch in batches for item in batch]
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"


def _parcels(batches: Sequence[Batch], workers: int) -> Iterator[Sequence[Batch]]:
    size = max(1, min(_BATCHES, _ITEMS // max(map(len, batches)), len(batches) // (workers * _ROUNDS)))
    for start in range(0, len(batches), size):
        yield batches[start : start + size]


def _pack(what: Any) -> bytes:
    """By cloudpickle, which comes with Ray and also sends functions that have no name."""
    from ray import cloudpickle

    return cloudpickle.dumps(what)


def _pack_error(error: Exception) -> bytes:
    """The error itself where it survives the way, else one that says the same."""
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
        return packed
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _quieten() -> None:
    """Keep Ray's own words out of the command's output, unless somebody debugs."""
    if not os.environ.get("PERCEPTIO_DEBUG"):
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)


@contextmanager
def _without_chatter() -> Iterator[None]:
    """Ray's own part in C++ writes to file 2, whatever its level of logging, while it starts."""
    if os.environ.get("PERCEPTIO_DEBUG"):
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
