"""Out of memory: which errors mean it, and how the memory of a failed call is given back."""

from __future__ import annotations

import gc
import traceback

import torch

__all__ = ["free", "is_out_of_memory"]

# What libraries below torch say, as a RuntimeError: nothing else tells these from other failures.
_TEXTS = (
    "out of memory",  # of CUDA, HIP, MPS and XPU, where it is no torch.OutOfMemoryError
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # on Windows
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or the one from which it came, says that memory ran out.

    >>> import torch
    >>> from ftrain.tune.out_of_memory import is_out_of_memory
    >>> (
    ...     is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")),
    ...     is_out_of_memory(RuntimeError("a shape is wrong")),
    ... )
    (True, False)
    """
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(found, RuntimeError) and any(text in str(found) for text in _TEXTS):
            return True
        found = found.__cause__ or getattr(found, "inner_exception", None)  # dynamo's errors have the latter
    return False


def free(error: BaseException | None = None) -> None:
    """Give back the memory that a failed call holds: in the frames of its traceback, in cycles, and in the allocator's cache.

    >>> from ftrain.tune.out_of_memory import free
    >>> free()
    """
    found, seen = error, set[int]()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        traceback.clear_frames(found.__traceback__)
        found = found.__cause__ or found.__context__
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's
        torch.cuda.empty_cache()
