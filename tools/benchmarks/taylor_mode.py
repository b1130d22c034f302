"""Derivatives of order 1 to 4 of an MLP along a line: jet against nested jvps. Prints a table.

Run with the package installed: OMP_NUM_THREADS=1 python tools/benchmarks/taylor_mode.py
"""

import statistics
import time

import torch

import torchlift

ORDERS = (1, 2, 3, 4)
WIDTH, BATCH = 64, 32


def mlp(weights):
    def run(x):
        for w in weights[:-1]:
            x = torch.tanh(x @ w)
        return x @ weights[-1]

    return run


def nested(f, x, v, order):
    """f's value and its derivatives at x along v."""

    def push(g):
        return lambda t: torchlift.jvp(g, (t,), (torch.ones_like(t),), has_aux=True)

    # Each jvp hands on what the ones inside have found.
    def level(g):
        def run(t):
            value, tangent, found = push(g)(t)
            return tangent, (*found, value)

        return run

    along = lambda t: (f(x + t * v), ())  # noqa: E731
    for _ in range(order):
        along = level(along)
    last, found = along(torch.zeros(()))
    return [*found, last]


def by_jet(f, x, v, order):
    series = torch.zeros(order, *x.shape)
    series[0] = v
    value, derivatives = torchlift.jet(f, (x,), (series,))
    return [value, *derivatives]


def milliseconds(run, budget=2.0):
    run()
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < budget:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return 1e3 * statistics.median(times)


def main():
    torch.manual_seed(0)
    weights = [torch.randn(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(4)]
    x, v = torch.randn(BATCH, WIDTH), torch.randn(BATCH, WIDTH)
    f = mlp(weights)
    plain = milliseconds(lambda: f(x))
    print(f"f alone: {plain:.3f} ms")
    print("| order | nested jvps, ms | jet, ms |")
    print("|---:|---:|---:|")
    for order in ORDERS:
        for a, b in zip(nested(f, x, v, order), by_jet(f, x, v, order)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        nest = milliseconds(lambda: nested(f, x, v, order))
        jet = milliseconds(lambda: by_jet(f, x, v, order))
        print(f"| {order} | {nest:.2f} | {jet:.2f} |")


if __name__ == "__main__":
    main()
