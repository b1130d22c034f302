"""How much to do at a time: the options of all that runs in chunks."""

from typing import Any

from torchlift._errors import TransformError


def check_size(transform: str, name: str, value: Any, smallest: int = 1) -> None:
    if value is not None and (not isinstance(value, int) or value < smallest):
        raise TransformError(f"{transform}: {name} must be None or an int of at least {smallest}, got {value!r}.")


def check_chunks(transform: str, chunk_size: Any, memory_budget: Any) -> None:
    check_size(transform, "chunk_size", chunk_size)
    check_size(transform, "memory_budget", memory_budget)
    if chunk_size is not None and memory_budget is not None:
        raise TransformError(
            f"{transform}: both chunk_size ({chunk_size}) and memory_budget ({memory_budget}) were "
            "given, but a memory budget chooses the size of the chunks itself. Leave one of them out."
        )
