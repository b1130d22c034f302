"""One peer in one process: loads cases, checks them, times them. Driven by run.py over stdin/stdout (JSON lines).

    python worker.py PEER     PEER: NAMESPACE[+compile|+inductor] | plain | trick | ref | jax | jax_eager | mlx[+compile]
"""
import ctypes
import gc
import importlib
import json
import os
import re
import sys
import time
import traceback
import warnings

import numpy as np

import data

PEER, _, MODE = sys.argv[1].partition("+")
COMPILE = MODE in ("compile", "inductor")  # inductor: by that backend of torchlift.jit
LIBC = ctypes.CDLL(None)


def tree_map(f, t):
    if isinstance(t, dict):
        return {k: tree_map(f, v) for k, v in t.items()}
    if isinstance(t, (list, tuple)):
        return [tree_map(f, v) for v in t]
    return f(t)


def leaves(t):
    if isinstance(t, dict):
        return [x for k in sorted(t) for x in leaves(t[k])]
    if isinstance(t, (list, tuple)):
        return [x for v in t for x in leaves(v)]
    return [t]


# ---------------------------------------------------------------- peers: names, build, convert, compile, block

class MissingTransform(AttributeError):
    pass


class Namespace:
    """A module with torch.func's API, or with a part of it."""

    def __init__(self, name):
        self._name, self._module = name, importlib.import_module(name)

    def __getattr__(self, attribute):
        if not hasattr(self._module, attribute):
            raise MissingTransform(f"{self._name} has no {attribute}")
        return getattr(self._module, attribute)


class Torch:
    def __init__(self):
        import torch
        self.torch = torch
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        if PEER == "ref":
            torch.set_default_dtype(torch.float64)
        if PEER in ("plain", "trick", "ref"):
            import plain
            table = plain.TRICK if PEER == "trick" else plain.PLAIN
            self.cases = {n: (lambda d, f=f: f(d)) for n, f in table.items()}
        else:
            import cases
            T = Namespace(PEER)
            self.cases = {n: (lambda d, f=f: f(T, d)) for n, f in cases.CASES.items()}
            if COMPILE:
                self.cases = {n: f for n, f in self.cases.items() if not n.startswith("micro/")}
            self.own_compile = getattr(T, "jit", None)
            warm = lambda x: T.grad(lambda z: (z.sin() * z).sum())(x)
            (self.compile(warm)[0] if COMPILE else warm)(torch.ones(8))
        self.version = torch.__version__

    def array(self, a):
        t = self.torch.as_tensor(a)
        return t.to(self.torch.get_default_dtype()) if t.is_floating_point() else t

    def compile(self, f):
        """The compiled f, and what to try if that fails (torch.compile with graph breaks allowed)."""
        if self.own_compile:
            return self.own_compile(f, **({"backend": MODE} if MODE == "inductor" else {})), None
        self.torch._dynamo.reset()
        self.torch._dynamo.utils.counters.clear()
        return self.torch.compile(f, fullgraph=True), lambda: self.torch.compile(f)

    def compile_info(self):
        if self.own_compile:
            return {}
        c = self.torch._dynamo.utils.counters
        return dict(graphs=c["stats"].get("unique_graphs", 0), graph_breaks=dict(c["graph_break"]))

    block = staticmethod(lambda out: None)
    numpy = staticmethod(lambda t: t.detach().numpy())
    free = staticmethod(lambda: None)


class Jax:
    def __init__(self):
        import jax
        import jax_cases
        self.jax, self.version = jax, jax.__version__
        micro = PEER == "jax_eager"
        self.cases = {n: f for n, f in jax_cases.CASES.items() if n.startswith("micro/") == micro}
        jax.jit(jax.grad(lambda x: jax.numpy.sin(x).sum()))(jax.numpy.ones(8))

    def array(self, a):
        return self.jax.numpy.asarray(a, "int32" if a.dtype.kind == "i" else "float32")

    def compile(self, f):
        return self.jax.jit(f), None

    def block(self, out):
        self.jax.block_until_ready(out)

    compile_info = staticmethod(dict)
    numpy = staticmethod(np.asarray)
    free = staticmethod(lambda: None)


class Mlx:
    def __init__(self):
        import mlx.core as mx
        import mlx_cases
        self.mx, self.version = mx, mx.__version__
        mx.set_default_device(mx.cpu)
        self.cases = {n: f for n, f in mlx_cases.CASES.items() if not (COMPILE and n.startswith("micro/"))}
        warm = mx.grad(lambda x: (mx.sin(x) * x).sum())
        mx.eval((mx.compile(warm) if COMPILE else warm)(mx.ones(8)))

    def array(self, a):
        return self.mx.array(a.astype("int32" if a.dtype.kind == "i" else "float32"))

    def compile(self, f):
        return self.mx.compile(f), None

    def block(self, out):
        self.mx.eval(out)

    def free(self):
        self.mx.clear_cache()

    compile_info = staticmethod(dict)
    numpy = staticmethod(np.array)


# ---------------------------------------------------------------- measuring

def memory(key):
    return int(re.search(key + r":\s+(\d+)", open("/proc/self/status").read()).group(1)) / 1024


class Peak:
    """Peak resident memory above the level at entry, in MB."""

    def __init__(self, lib):
        self.lib = lib

    def __enter__(self):
        gc.collect()
        self.lib.free()
        LIBC.malloc_trim(0)
        open("/proc/self/clear_refs", "w").write("5")                 # resets VmHWM
        self.start = memory("VmRSS")
        return self

    def __exit__(self, *_):
        self.mb = max(0.0, memory("VmHWM") - self.start)


def timed(lib, run, args):
    t = time.perf_counter()
    lib.block(run(*args))
    return (time.perf_counter() - t) * 1e3


def describe(e):
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0][:300] if text else ''}"


def wants_compile(lib):
    return COMPILE or PEER == "jax"


def first(lib, name, path):
    """Build the case, run it the first time (this is where compilers compile), save its outputs."""
    d = tree_map(lib.array, data.load(name))
    run, args, *noise_free = lib.cases[name](d)
    info, eager, retry = {}, run, None
    if wants_compile(lib):
        run, retry = lib.compile(run)

    def call():
        with warnings.catch_warnings(record=True) as caught, Peak(lib) as p:
            warnings.simplefilter("always")
            ms = timed(lib, run, args)
        slow = {str(w.message).split("Please file")[0][:250] for w in caught if "performance drop" in str(w.message)}
        return ms, p.mb, sorted(slow)

    try:
        ms, mb, slow = call()
    except Exception as e:
        if retry is None:
            raise
        info["fullgraph_error"] = describe(e)
        run = retry()
        ms, mb, slow = call()
    info |= dict(first_ms=ms, first_mb=mb, slow_path_warnings=slow)
    if wants_compile(lib):
        info |= lib.compile_info()
    info["second_ms"] = timed(lib, run, args)
    with Peak(lib) as p:
        timed(lib, run, args)
    info["peak_mb"] = p.mb

    save = lambda f: [np.asarray(lib.numpy(x)) for x in leaves(f(*args))]
    out = save(noise_free[0] if noise_free else run)
    arrays = {f"out{i}": a for i, a in enumerate(out)}
    if noise_free:
        arrays["sample"] = save(run)[0]
    np.savez(path, **arrays)
    return (run, args), info


def repeat(lib, run, args, budget_s, max_reps):
    """(wall ms, CPU ms of this process) of each call."""
    gc.collect()
    gc.disable()
    calls, end = [], time.perf_counter() + budget_s
    while len(calls) < max_reps and (not calls or time.perf_counter() < end):
        cpu = time.process_time()
        ms = timed(lib, run, args)
        calls.append((ms, (time.process_time() - cpu) * 1e3))
    gc.enable()
    return calls


def main():
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                                     # library chatter goes to the log
    t = time.perf_counter()
    try:
        lib = {"jax": Jax, "jax_eager": Jax, "mlx": Mlx}.get(PEER, Torch)()
        hello = dict(cases=list(lib.cases), version=lib.version, startup_s=time.perf_counter() - t)
    except Exception as e:
        traceback.print_exc()
        hello = dict(error=describe(e))
    print(json.dumps(hello), file=reply, flush=True)
    current = None
    for line in sys.stdin:
        m = json.loads(line)
        try:
            if m["op"] == "first":
                current = None
                current, r = first(lib, m["case"], m["out"])
            else:
                r = dict(calls=repeat(lib, *current, m["budget_s"], m["max_reps"]))
        except MissingTransform as e:
            r = dict(skipped=str(e))
        except Exception as e:
            traceback.print_exc()
            r = dict(error=describe(e))
        print(json.dumps(r), file=reply, flush=True)


if __name__ == "__main__":
    main()
