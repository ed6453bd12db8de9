"""Compiles what the later phases will run, in a pool of processes: each runs its cases once, over a few steps, and what
Triton and Inductor make of them stays in their caches on disk."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from multiprocessing import get_context

from benchmarks.gpu.log import Log, reason

# A process has a CUDA context of its own, of about half a GiB, and a core.
MOST_PROCESSES = 16
STEPS = 3


def jobs(dry: bool) -> list[tuple[str, int]]:
    """Phase and place in its list, the first ones first."""
    from benchmarks.gpu import correct, norms, recurrent

    sizes = {
        "correct": len(correct.proofs(dry)),
        "recurrent": len(recurrent.timed(dry)),
        "norms": len(norms.timed(dry)),
    }
    every = [(phase, n) for phase, size in sizes.items() for n in range(size)]
    return every[:1] if dry else every


def make(job: tuple[str, int], dry: bool) -> str:
    """Run a case once. What it raises is not this phase's business: the one that measures it will say so."""
    import torch

    from benchmarks.gpu import correct, norms, recurrent
    from benchmarks.gpu.clock import Device, products
    from benchmarks.gpu.norm_cases import Built as Norm
    from benchmarks.gpu.recurrent_cases import Built as Recurrent

    torch.set_num_threads(1)
    device, (phase, n) = Device(dry), job
    try:
        if phase == "correct":
            proof = correct.proofs(dry)[n]
            with products(proof.dtype) as dtype:
                correct._prepared(proof, device, dtype)[0]()
        elif phase == "norms":
            norm = norms.timed(dry)[n]
            with products(norm.dtype) as dtype:
                built = Norm(norm.case, device.type, dtype, small=False)
                for call in norms.ways(built, norm.mode, device).values():
                    call()
        else:
            layer = recurrent.timed(dry)[n]
            case = layer.case._replace(shape=(STEPS, *layer.case.shape[1:]))
            with products(case.dtype) as dtype:
                few = Recurrent(case, device.type, dtype)
                for name, way in recurrent.ways(few, layer.mode, device).items():
                    if name != recurrent.BASELINE and not name.endswith("replayed"):
                        way()()
        device.wait()
    except Exception as error:
        return f"{phase} {n}: {reason(error)}"
    return ""


def run(device: object, log: Log) -> None:
    dry = bool(getattr(device, "dry", False))
    start, every = time.monotonic(), jobs(dry)
    processes = 1 if dry else min(MOST_PROCESSES, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(processes, get_context("spawn"))
    waiting = [pool.submit(make, job, dry) for job in every]
    done, told = 0, []
    try:
        for future in as_completed(waiting, timeout=max(log.seconds_left, 1.0)):
            done += 1
            if said := future.result():
                told.append(said)
    except OutOfTime:
        pass
    took = time.monotonic() - start
    log.write(figures=[{"case": "compiled", "done": done, "of": len(every), "processes": processes, "seconds": took}])
    log.write(not_measured=[f"{len(every) - done} cases were not compiled ahead"] if done < len(every) else [])
    print(f"{done} of {len(every)} cases in {processes} processes, {took:.0f} s", flush=True)
    for said in told:
        print(f"  {said}", flush=True)
    running = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in running:  # which would finish what they have begun
        process.kill()
