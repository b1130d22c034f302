"""opcov: how much of PyTorch's operator database do a library's function transforms cover?

The library under test is any importable module that offers ``vmap``, ``vjp``, ``jvp`` and
``grad`` with ``torch.func``'s signatures.  For every ``OpInfo`` of PyTorch's ``op_db`` and
every transform below, opcov takes a few sample inputs, applies the library's transform to
the operator and compares the result with a reference that uses none of the library's code
(python loops, ``torch.autograd.grad``, ``torch.autograd.forward_ad``).

    transform     under test                           reference
    vmap          vmap(op)                             python loop + torch.stack
    vmap_inplace  vmap(op_)                            python loop, including the mutated argument
    grad          vjp(op), grad(scalar loss of op)     autograd.grad
    jvp           jvp(op)                              forward_ad, else rows of the Jacobian
    vmapvjp       vmap(vjp(op))                        loop of autograd.grad
    vmapjvp       vmap(jvp(op))                        loop of the jvp reference
    vjpvjp        vjp(vjp(op))                         double backward
    jvpvjp        jvp(vjp(op))   forward over reverse  double backward (the Hessian is symmetric)
    jvpjvp        jvp(jvp(op))   nested forward        double backward, on random projections
    vmapvmap      vmap(vmap(op))                       two nested python loops
    vjpvmap       vjp(vmap(op))                        autograd.grad through the python loop

Every (op, transform) becomes one JSON line whose ``status`` is one of

    pass      every check that has a reference agreed with it
    wrong     some check returned another value, shape or dtype than the reference
    error     no wrong value, but some check raised (``error_type`` and ``message``: the first one)
    timeout   not finished after --timeout seconds
    crash     the process died (segfault, abort, ...)
    skip      nothing to check; ``reason`` says why

A row in error may still have checks that passed; see its ``checks`` counts ("partial" in the
table).  ``fallback`` is true when vmap took its slow per-example loop: torch.func says so by a
warning, a library that has ``fallback_report`` and ``reset_fallback_report`` by these.

How the inputs are made.  A batch holds *different* examples: OpInfo's own generator is run
under several seeds, so that index ranges, positive definiteness and the like hold for each of
them.  Where the reference rejects such a batch (say, two arguments that must agree, or outputs
of different shapes), copies of one example are used instead; where it rejects these too, the
check is dropped (``noref``).  Checks run in float32, and a (op, transform) that looks wrong
there is run again in float64 before it is called wrong.  An op that consumes random numbers
gets randomness='different' under vmap, and only shapes and dtypes are compared.

Which reference to believe.  PyTorch's own derivative formulas have faults, so finite differences
(float64) are consulted where two opinions differ: a result that contradicts autograd but agrees
with finite differences passes (``second_opinion``), and where forward and reverse mode contradict
each other, the one that finite differences confirm is the reference for a jvp.  A derivative
that is NaN in the reference alone counts as undefined (``noref``).

What the numbers do not show.  A few samples per op, at one dtype, on CPU.  Ops whose output does
not depend on the values (zeros, empty, isnan of finite numbers, ...) cannot show a mixed-up batch.
Where eager reverse mode itself is wrong (max_unpool with repeated indices, as_strided_scatter),
vjpvjp still compares with it.

--extended runs other rows instead: each transform at further dtypes (a result in bfloat16 has to be
as near to the one in float32 as the reference is), and vmap on batches that are not contiguous, that
repeat one example in the memory of one, of one example and of none. A row's ``variation`` names it.

Each op runs in a forked child, so that a crash or a hang costs one row.

Examples (with this folder's parent on PYTHONPATH; tools/coverage runs the first):
    python -m opcov --out mine.jsonl --jobs 2
    python -m opcov --impl torch.func --transforms vmap,grad --ops '^linalg'
    python -m opcov --out mine.jsonl --page docs/coverage.md
    python -m opcov --report mine.jsonl           # table, error classes and op lists again
    python -m opcov --report torch_func.jsonl.gz --against mine.jsonl
"""
