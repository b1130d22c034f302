"""Run the benchmark.

    python run.py                                       torchlift and torch.func, side by side
    python run.py --impl torchlift --compile            compiled: torchlift.jit if it has one, else torch.compile
    python run.py --impl torchlift,torch.func,jax       several, interleaved
    python run.py --all --json all.json                 every peer

Peers: any module with torch.func's API, with +compile to compile it (torchlift+inductor: by that backend
of torchlift.jit); plain, trick (plain.py); jax, jax_eager (micro only); mlx, mlx+compile. Each peer is one
process pinned to one core; only one of them works at a time. Every output is compared with plain.py in
float64. A case that asks for a transform which a peer does not have is skipped for that peer, with a line
that says so.
"""
import argparse
import json
import os
import platform
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
LOGS = os.path.join(HERE, *[os.pardir] * 3, "out", "peerbench")
ALL = ["torch.func", "torch.func+compile", "plain", "trick", "jax", "jax_eager", "mlx", "mlx+compile"]
TOLERANCE = 1e-3

# What torchlift's eager transforms are to reach, as a share of torch.func's time.
TARGETS = dict(
    jacrev_mlp=0.5, jacfwd_mlp=0.6, hessian_mlp=0.3, batched_hessian=0.4, laplacian=0.25, batched_jacobian=0.75,
    hvp=0.55, ntk=0.95, langevin=0.45, tiny_hessian=0.136, gru_per_sample=0.75, maml_sinusoid=0.5,
    ensemble_mlp_fwd=0.65, ensemble_mlp_grad=0.75, ensemble_cnn_fwd=0.6, ensemble_cnn_grad=0.8,
    per_sample_grad_mlp=0.6, per_sample_grad_cnn=0.85, per_sample_grad_transformer=0.65)
MEAN_TARGET = 0.5                                                     # of all cases, geometric

# glibc adapts these two thresholds to what a process has freed so far, which moves eager timings on 4 MB tensors
# by 3x with the order of the cases. Here they are fixed where a long-running process ends up. One arena, so that
# malloc_trim can return everything between memory measurements.
MALLOC = dict(MALLOC_MMAP_THRESHOLD_=str(32 << 20), MALLOC_TRIM_THRESHOLD_=str(64 << 20), MALLOC_ARENA_MAX="1")


class Worker:
    """A peer's process. call() is None-safe: a peer that hangs or dies answers with an error."""

    def __init__(self, peer, args, scratch):
        self.peer, self.args, self.scratch = peer, args, scratch
        self.start()

    def start(self):
        base = self.peer.partition("+")[0]
        python = self.args.jax_python if base in ("jax", "jax_eager", "mlx") else self.args.python
        tmp = tempfile.mkdtemp(dir=self.scratch)                      # cold compile caches for every process
        n = str(self.args.threads)
        env = dict(os.environ, TMPDIR=tmp, TORCHINDUCTOR_CACHE_DIR=tmp + "/inductor", TORCHINDUCTOR_COMPILE_THREADS="1",
                   OMP_NUM_THREADS=n, MKL_NUM_THREADS=n, OPENBLAS_NUM_THREADS=n, JAX_PLATFORMS="cpu",
                   CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1", **MALLOC)
        if self.args.threads == 1:
            env["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        pin = (lambda: os.sched_setaffinity(0, {self.args.cpu})) if self.args.threads == 1 else None
        os.makedirs(LOGS, exist_ok=True)
        self.p = subprocess.Popen([python, f"{HERE}/worker.py", self.peer], env=env, cwd=HERE, preexec_fn=pin,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=open(f"{LOGS}/{self.peer}.log", "a"))
        self.hello = self.read(180)

    def read(self, timeout):
        if not select.select([self.p.stdout], [], [], timeout)[0]:
            self.p.kill()
            self.p.wait()
            return dict(error=f"Timeout: over {timeout} s")
        line = self.p.stdout.readline()
        return json.loads(line) if line else dict(error=f"Died: exit {self.p.wait()}")

    def call(self, timeout, **m):
        if self.p.poll() is not None:
            self.start()
        self.p.stdin.write((json.dumps(m) + "\n").encode())
        self.p.stdin.flush()
        return self.read(timeout)

    def stop(self):
        if self.p.poll() is None:
            self.p.stdin.close()
            self.p.wait()


def error_of(out, ref):
    """Largest error of any output, relative to that output's largest magnitude. Noisy cases: also the sample's spread."""
    names = [n for n in ref.files if n != "sample"]
    if {*out.files} != {*ref.files}:
        raise ValueError(f"outputs {out.files} for {ref.files}")
    worst = 0.0
    for n in names:
        a, b = out[n].astype("float64"), ref[n]
        if a.shape != b.shape:
            raise ValueError(f"{n} has shape {a.shape}, not {b.shape}")
        worst = max(worst, float(abs(a - b).max() / (abs(b).max() + 1e-30)))
    if "sample" in names + ref.files:
        a, b = out["sample"] - ref["out0"], ref["sample"] - ref["out0"]
        sa, sb = a.std(0).mean(), b.std(0).mean()                     # across chains: catches shared randomness
        if abs(sa / sb - 1) > 0.1 or abs(a.mean() - b.mean()) > 0.15 * sb:
            raise ValueError(f"sample spread {sa:.4f} for {sb:.4f}, mean {a.mean():.4f} for {b.mean():.4f}")
    return worst


def quantile(xs, q):
    return sorted(xs)[min(len(xs) - 1, int(q * len(xs)))]


def run_case(name, workers, ref, args, scratch):
    results, paths = {}, {}
    r = ref.call(args.timeout, op="first", case=name, out=f"{scratch}/ref.npz")
    if "error" in r:
        sys.exit(f"{name}: reference failed: {r['error']}")
    expect = np.load(f"{scratch}/ref.npz")
    live = []
    for w in workers:
        if name not in w.hello["cases"]:
            continue
        path = f"{scratch}/{w.peer}.npz"
        res = results[w.peer] = w.call(args.timeout, op="first", case=name, out=path)
        if "error" in res or "skipped" in res:
            continue
        try:
            res["rel_err"] = error_of(np.load(path), expect)
            res["agrees"] = res["rel_err"] <= TOLERANCE
        except ValueError as e:
            res.update(agrees=False, mismatch=str(e))
        res["calls"] = []
        live.append(w)
    for i in range(args.rounds):
        for w in live[i % max(1, len(live)):] + live[:i % max(1, len(live))]:
            t = w.call(args.timeout, op="time", budget_s=args.budget, max_reps=200)
            if "error" in t:
                results[w.peer]["error"] = t["error"]
                live = [x for x in live if x is not w]
            else:
                results[w.peer]["calls"] += t["calls"]
    for res in results.values():
        calls = res.pop("calls", None)
        if calls:
            ms, cpu = zip(*calls)
            res.update(median_ms=statistics.median(ms), min_ms=min(ms), p90_ms=quantile(ms, 0.9), reps=len(ms),
                       cpu_ms=statistics.median(cpu))                 # below the wall time: the core was shared
    return results


def show(name, results):
    cells = []
    for peer, r in results.items():
        if "error" in r:
            cells.append(f"{peer} {r['error'].split(':')[0]}")
        elif "skipped" in r:
            cells.append(f"{peer} skipped: {r['skipped']}")
        else:
            cells.append(f"{peer} {r['median_ms']:.3f}" + ("" if r["agrees"] else " DISAGREES"))
    print(f"{name:34s} " + "  ".join(cells), flush=True)


def shares(cases):
    """(case, torchlift's ms, torch.func's ms) of the cases that both have run and agree on."""
    for name, r in cases.items():
        ours, theirs = r.get("torchlift", {}), r.get("torch.func", {})
        if ours.get("agrees") and "median_ms" in ours and "median_ms" in theirs:
            yield name, ours["median_ms"], theirs["median_ms"]


def show_targets(cases):
    """A Markdown table of the shares of torch.func's time, with the targets."""
    rows = list(shares(cases))
    if not rows:
        return
    number = lambda x: f"{x:.3g}"
    met = lambda share, target: "met" if share <= target else "not met"
    print("\n| case | torch.func, ms | torchlift, ms | share | to reach | |\n|---|---:|---:|---:|---:|---|")
    for name, ours, theirs in rows:
        if name.startswith("micro/"):
            continue
        share, target = ours / theirs, TARGETS.get(name)
        ends = [number(target), met(share, target)] if target else ["-", ""]
        print("| " + " | ".join([name, number(theirs), number(ours), f"{share:.2f}", *ends]) + " |")
    mean = statistics.geometric_mean(ours / theirs for _, ours, theirs in rows)
    print(f"| geometric mean of {len(rows)} cases | | | {mean:.2f} | {MEAN_TARGET} | {met(mean, MEAN_TARGET)} |")


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--impl", default="torchlift,torch.func", help="comma-separated peers")
    a.add_argument("--compile", action="store_true", help="compile the implementations named by --impl")
    a.add_argument("--all", action="store_true", help="every peer, after those of --impl")
    a.add_argument("--cases", default="", help="regex searched in case names")
    a.add_argument("--json", help="write results here; cases already in the file are kept or replaced")
    a.add_argument("--rounds", type=int, default=5, help="timing rounds; the peers alternate within each")
    a.add_argument("--budget", type=float, default=0.12, help="seconds per peer per round")
    a.add_argument("--timeout", type=float, default=240, help="seconds before a peer's call counts as hung")
    a.add_argument("--threads", type=int, default=1)
    a.add_argument("--cpu", type=int, default=max(os.sched_getaffinity(0)), help="core to pin to when single-threaded")
    a.add_argument("--python", default=sys.executable, help="interpreter with torch")
    a.add_argument("--jax-python", default=os.environ.get("PEERBENCH_JAX_PYTHON", "python3"))
    args = a.parse_args()

    peers = [p + "+compile" if args.compile and "+" not in p else p for p in args.impl.split(",")]
    peers = list(dict.fromkeys(peers + (ALL if args.all else [])))
    with tempfile.TemporaryDirectory(prefix="peerbench-", ignore_cleanup_errors=True) as scratch:
        run_all(peers, args, scratch)


def run_all(peers, args, scratch):
    started = time.time()
    ref = Worker("ref", args, scratch)
    workers = []
    for p in peers:
        w = Worker(p, args, scratch)
        print(f"# {p}: " + (w.hello.get("error") or f"{w.hello['version']}, start {w.hello['startup_s']:.1f} s"), flush=True)
        if "error" not in w.hello:
            workers.append(w)
    if not workers:
        sys.exit("no peer started; see the logs in out/peerbench")

    old = json.load(open(args.json))["cases"] if args.json and os.path.exists(args.json) else {}
    out = dict(meta=dict(machine=platform.processor() or platform.machine(), cpu=args.cpu, threads=args.threads,
                         rounds=args.rounds, budget_s=args.budget, peers={w.peer: w.hello for w in workers}), cases=old)
    for w in workers:
        out["meta"]["peers"][w.peer] = {k: v for k, v in w.hello.items() if k != "cases"}
    for name in ref.hello["cases"]:
        if not re.search(args.cases, name):
            continue
        before = os.getloadavg()[0]
        results = run_case(name, workers, ref, args, scratch)
        show(name, results)
        when = dict(time=time.strftime("%F %T"), load=[before, os.getloadavg()[0]])
        out["cases"].setdefault(name, {}).update({p: {**r, **when} for p, r in results.items()})
        if args.json:
            out["meta"]["wall_s"] = time.time() - started
            json.dump(out, open(args.json, "w"), indent=1)
    for w in workers + [ref]:
        w.stop()
    show_targets(out["cases"])


if __name__ == "__main__":
    main()
