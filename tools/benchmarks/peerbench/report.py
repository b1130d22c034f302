"""Markdown tables from a results file: python report.py all.json"""
import json
import sys

import data

PEERS = ["torchlift", "torchlift+compile", "torch.func", "torch.func+compile", "plain", "trick", "jax", "mlx", "mlx+compile"]


def num(x):
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 1 else f"{x:.3f}"


def cell(r, *keys, dash="-"):
    """First key, then the rest in brackets."""
    if r is None:
        return dash
    if "error" in r:
        return "fails"
    if "skipped" in r:
        return dash
    a, *b = [num(r[k]) for k in keys]
    return (a + (f" ({', '.join(b)})" if b else "")) + ("" if r["agrees"] else " WRONG")


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" + "---:|" * (len(head) - 1))
    for r in rows:
        print("| " + " | ".join(r) + " |")
    print()


def main():
    results = json.load(open(sys.argv[1]))["cases"]
    big = {c: r for c, r in results.items() if not c.startswith("micro/")}
    peers = [p for p in PEERS if any(p in r for r in big.values())]
    first = [p for p in peers if p not in ("plain", "trick")]
    head = ["case", *(f"{p} ms" for p in peers), *(f"{p} first, ms" for p in first), *(f"{p} peak, MB" for p in peers)]
    table(head, [[c, *(cell(r.get(p), "median_ms", "min_ms") for p in peers), *(cell(r.get(p), "first_ms") for p in first),
                  *(cell(r.get(p), "peak_mb") for p in peers)] for c, r in big.items()])

    micro = {c: r for c, r in results.items() if c.startswith("micro/")}
    impl = [p for p in ("torchlift", "torch.func") if any(p in r for r in micro.values())]
    others = [p for p in ("jax_eager", "mlx") if any(p in r for r in micro.values())]
    rows = []
    for c, r in micro.items():
        _, op, mode = c.split("/")
        if any("median_ms" not in r.get(p, {}) for p in ("plain", *impl)):
            continue
        us = lambda p, r=r: r[p]["median_ms"] * 1e3 / (data.MICRO_STEPS * data.MICRO_OPS[op])
        eager = us("plain", micro[f"micro/{op}/eager"])
        counterpart = {"grad": "autograd", "vmap_grad": "autograd", "jvp": "forward_ad"}.get(mode, "eager")
        row = [f"{op} / {mode}", f"{us('plain'):.2f} ({counterpart})"]
        for p in impl:
            row += [f"{us(p):.2f}", f"{us(p) / eager:.1f}x", f"{us(p) / us('plain'):.2f}x"]
        rows.append(row + [f"{us(p):.2f}" if p in r and "error" not in r[p] else "-" for p in others])
    head = ["op / mode", "plain torch us/op"]
    for p in impl:
        head += [f"{p} us/op", "over eager forward", "over plain counterpart"]
    table(head + [f"{p} us/op" for p in others], rows)

    for c, r in results.items():
        for p, x in r.items():
            for k in ("error", "skipped", "mismatch", "fullgraph_error", "slow_path_warnings", "graph_breaks"):
                if x.get(k):
                    print(f"- {c}, {p}: {k}: {x[k]}")


if __name__ == "__main__":
    main()
