"""Workers of Ray Data: several GPUs of this machine, or the machines of a cluster."""

import logging
import os
import pickle
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from typing import Any

from perceptio_hf.extras import missing

from .engines import Batch, Job, Result, work_through

_BATCHES = 8  # that a worker is sent at a time: within them it reads ahead
_ROUNDS = 4  # each worker is sent that many parcels at least, so that all end at about the same time
_QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "ERROR",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class RayEngine:
    """Workers that Ray Data starts, feeds, and starts again where one dies; results come in the order of the batches.

    Each worker has one GPU where the cluster has any, else one processor.

    Args:
        address: of a running cluster, "auto" or HOST:PORT; by default Ray is started on this machine and stopped at the
            end. Pictures, the checkpoint and this package must be found on every machine under the same names.
        workers: how many; by default one for each GPU, without GPUs one.

    Raises:
        ImportError: where Ray is not installed.
    """

    def __init__(self, address: str | None = None, workers: int | None = None):
        if workers is not None and workers < 1:
            raise ValueError(f"--workers is {workers}; it must be 1 or more.")
        self.address, self.workers = address, workers
        _quieten()
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise missing(error, "--engine ray") from error

    def run(self, job: Job, batches: Sequence[Batch]) -> Iterator[list[Result]]:
        if not batches:
            return
        import ray

        # Where a worker dies, Ray says so on standard output, some of it when it is shut down; that is for the
        # command's own document.
        with redirect_stdout(sys.stderr), self._cluster() as resources:
            gpus = int(resources.get("GPU", 0))
            workers = min(self.workers or gpus or 1, len(batches))
            if gpus and workers > gpus:
                raise ValueError(f"--workers {workers}, but Ray has {gpus} GPUs; each worker needs one.")
            if not gpus and workers > int(resources.get("CPU", 0)):
                raise ValueError(f"--workers {workers}, but Ray has {int(resources.get('CPU', 0))} processors.")
            parcels = [{"parcel": _pack(parcel)} for parcel in _parcels(batches, workers)]
            needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
            done = ray.data.from_items(parcels, override_num_blocks=len(parcels)).map(
                _RayWorker,
                fn_constructor_args=(_pack(job),),
                compute=ray.data.ActorPoolStrategy(size=workers),
                **needs,
            )
            # Closed by hand: an error's traceback would keep the rows, and they the workers and their GPUs.
            with closing(iter(done.iter_rows())) as rows:
                for row in rows:
                    outcome = pickle.loads(row["outcome"])
                    if isinstance(outcome, BaseException):
                        raise outcome
                    yield from outcome

    @contextmanager
    def _cluster(self) -> Iterator[dict[str, float]]:
        """Ray, running: what it has of processors ("CPU") and accelerators ("GPU"). What we start, we stop."""
        import ray

        ours = not ray.is_initialized()
        if ours:
            _check_address(self.address)
            options: dict[str, Any] = {"address": self.address} if self.address else {"include_dashboard": False}
            if not self.address:  # a worker more than there are processors would wait for ever
                options["num_cpus"] = max(os.cpu_count() or 1, self.workers or 1)
            try:
                with _without_chatter():
                    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            except Exception as error:  # also bare ones, where a busy machine lets its processes start too slowly
                reason = " ".join(str(error).split())[:200]
                if self.address:
                    raise ValueError(f"--address {self.address}: no Ray cluster answers there ({reason}).") from None
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


def _check_address(address: str | None) -> None:
    """Raises ValueError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise ValueError(f"--address {address}: no Ray cluster answers there ({error}).") from None


class _RayWorker:
    """What runs in a process of Ray's. Errors travel as values: Ray would try again and wrap them."""

    def __init__(self, job: bytes):
        self.error: BaseException | None = None
        try:
            self.worker = pickle.loads(job)()
        except Exception as error:
            self.error = error

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        if self.error is not None:
            return {"outcome": _pack_error(self.error)}
        try:
            return {"outcome": pickle.dumps(list(work_through(self.worker, pickle.loads(row["parcel"]))))}
        except Exception as error:
            return {"outcome": _pack_error(error)}


def _parcels(batches: Sequence[Batch], workers: int) -> Iterator[Sequence[Batch]]:
    size = max(1, min(_BATCHES, len(batches) // (workers * _ROUNDS)))
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
