"""Times several functions side by side: blocks of calls that take turns, medians over the blocks."""

import gc
import statistics
import time
import warnings

CLOCK = time.perf_counter  # or time.process_time, where other processes use the core too
BLOCK_SECONDS = 1e-3  # long against the clock, short against what else the machine does


def seconds_of(function, calls):
    start = CLOCK()
    for _ in range(calls):
        function()
    return CLOCK() - start


def calls_per_block(function):
    """How many calls of the function take about BLOCK_SECONDS."""
    for _ in range(3):
        function()
    once = min(seconds_of(function, 1) for _ in range(5))
    return max(1, min(1000, round(BLOCK_SECONDS / max(once, 1e-7))))


def interleave(functions, rounds):
    """{name: median seconds of one call} of {name: function}.

    In each round every function runs one block; the order rotates, so that none always follows the same one.
    """
    names = list(functions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = {name: calls_per_block(functions[name]) for name in names}
        blocks = {name: [] for name in names}
        gc.collect()
        gc.disable()
        try:
            for i in range(rounds):
                start = i % len(names)
                for name in names[start:] + names[:start]:
                    blocks[name].append(seconds_of(functions[name], calls[name]) / calls[name])
        finally:
            gc.enable()
    return {name: statistics.median(times) for name, times in blocks.items()}
