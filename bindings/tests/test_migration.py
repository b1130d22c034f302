"""Programs written for functorch and torch.func, after changing the import alone.

The programs are the calls of functorch's README and whirlwind tour and of torch.func's tour. Each runs twice,
with the library it was written for and with torchlift in its place, from the same seed, and must leave the
same variables.
"""

import warnings

import pytest
import torch

import torchlift

GRAD = """
from {library} import grad
x = torch.randn([])
cos_x = grad(lambda x: torch.sin(x))(x)
assert torch.allclose(cos_x, x.cos())
neg_sin_x = grad(grad(lambda x: torch.sin(x)))(x)
assert torch.allclose(neg_sin_x, -x.sin())
"""

VMAP = """
from {library} import vmap
batch_size, feature_size = 3, 5
weights = torch.randn(feature_size, requires_grad=True)
def model(feature_vec):
    # Very simple linear model with activation
    assert feature_vec.dim() == 1
    return feature_vec.dot(weights).relu()
examples = torch.randn(batch_size, feature_size)
result = vmap(model)(examples)
result.sum().backward()
weights_grad = weights.grad
"""

SANITY_CHECK = """
from {library} import vmap
x = torch.randn(3)
y = vmap(torch.sin)(x)
assert torch.allclose(y, x.sin())
"""

PER_SAMPLE = """
from {library} import vmap, grad
batch_size, feature_size = 3, 5
def model(weights,feature_vec):
    # Very simple linear model with activation
    assert feature_vec.dim() == 1
    return feature_vec.dot(weights).relu()
def compute_loss(weights, example, target):
    y = model(weights, example)
    return ((y - target) ** 2).mean() # MSELoss
weights = torch.randn(feature_size, requires_grad=True)
examples = torch.randn(batch_size, feature_size)
targets = torch.randn(batch_size)
inputs = (weights,examples, targets)
grad_weight_per_example = vmap(grad(compute_loss), in_dims=(None, 0, 0))(*inputs)
"""

VJP = """
from {library} import vjp
inputs = torch.randn(3)
func = torch.sin
cotangents = (torch.randn(3),)
outputs, vjp_fn = vjp(func, inputs); vjps = vjp_fn(*cotangents)
"""

MAKE_FUNCTIONAL = """
from {library} import make_functional, vmap, grad
model = torch.nn.Linear(3, 3)
data = torch.randn(64, 3)
targets = torch.randn(64, 3)
func_model, params = make_functional(model)
def compute_loss(params, data, targets):
    preds = func_model(params, data)
    return torch.mean((preds - targets) ** 2)
per_sample_grads = vmap(grad(compute_loss), (None, 0, 0))(params, data, targets)
"""

MAKE_FUNCTIONAL_WITH_BUFFERS = """
from {library} import make_functional_with_buffers, grad
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).eval()
func_model, params, buffers = make_functional_with_buffers(model)
data = torch.randn(8, 3)
grads = grad(lambda p: func_model(p, buffers, data).pow(3).sum())(params)
"""

COMBINE_STATE = """
from {library} import combine_state_for_ensemble, vmap
models = [torch.nn.Linear(3, 3) for i in range(5)]
data = torch.randn(64, 3)
fmodel, params, buffers = combine_state_for_ensemble(models)
output = vmap(fmodel, (0, 0, None))(params, buffers, data)
assert output.shape == (5, 64, 3)
"""

FUNCTIONAL_CALL = """
from {library} import functional_call, stack_module_state, vmap, grad
models = [torch.nn.Linear(3, 3) for i in range(5)]
data = torch.randn(64, 3)
params, buffers = stack_module_state(models)
output = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), in_dims=(0, 0, None))(params, buffers, data)
own = dict(models[0].named_parameters())
grads = grad(lambda p: functional_call(models[0], p, (data,)).square().sum())(own)
"""

BATCH_NORM = """
from {library} import replace_all_batch_norm_modules_, vmap
net = torch.nn.BatchNorm1d(3)
replace_all_batch_norm_modules_(net)
out = vmap(net)(torch.randn(4, 8, 3))
"""

JVP = """
from {library} import jvp
x = torch.randn(5)
y = torch.randn(5)
f = lambda x, y: (x * y)
_, output = jvp(f, (x, y), (torch.ones(5), torch.ones(5)))
assert torch.allclose(output, x + y)
"""

JACREV = """
from {library} import jacrev, vmap
x = torch.randn(5)
jacobian = jacrev(torch.sin)(x)
expected = torch.diag(torch.cos(x))
assert torch.allclose(jacobian, expected)
x = torch.randn(64, 5)
jacobian = vmap(jacrev(torch.sin))(x)
assert jacobian.shape == (64, 5, 5)
"""

JACFWD = """
from {library} import jacfwd
x = torch.randn(5)
jacobian = jacfwd(torch.sin)(x)
expected = torch.diag(torch.cos(x))
assert torch.allclose(jacobian, expected)
"""

HESSIAN = """
from {library} import hessian, jacfwd, jacrev
def f(x):
    return x.sin().sum()
x = torch.randn(5)
hessian0 = jacrev(jacrev(f))(x)
hessian1 = jacfwd(jacrev(f))(x)
hess = hessian(f)(x)
"""

DISABLE_TRACKING = """
from {library} import make_functional, make_functional_with_buffers
model = torch.nn.Linear(3, 3)
func_model, params = make_functional(model, disable_autograd_tracking=True)
assert not any(p.requires_grad for p in params)
func_model2, params2, buffers2 = make_functional_with_buffers(model, disable_autograd_tracking=False)
assert all(p.requires_grad for p in params2)
data = torch.randn(2, 3)
out, out2 = func_model(params, data), func_model2(params2, buffers2, data)
"""

BY_MODULE = """
import {library} as functorch
functorch._C._set_vmap_fallback_warning_enabled(False)
x = torch.randn(4, 5)
def f(x):
    return x.sin().sum()
grads, value = functorch.grad_and_value(f)(x)
per_row = functorch.vmap(functorch.grad(f))(x)
hess = functorch.hessian(f)(x[0])
_, vjp_fn = functorch.vjp(torch.sin, x)
(pulled,) = vjp_fn(torch.ones(4, 5))
_, pushed = functorch.jvp(torch.sin, (x,), (torch.ones(4, 5),))
jac = functorch.jacfwd(torch.sin)(x[0]) + functorch.jacrev(torch.sin)(x[0])
functorch._C.dump_tensor(x)
"""

EXPERIMENTAL = """
from {library}.experimental import hessian, jacfwd, jvp, replace_all_batch_norm_modules_
from {library} import vmap
net = replace_all_batch_norm_modules_(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
out = vmap(net)(torch.randn(4, 8, 3))
hess = hessian(lambda x: x.pow(3).sum())(torch.randn(3))
"""

README_MODEL = """
from {library} import vmap
batch_size, feature_size = 3, 5
weights = torch.randn(feature_size, requires_grad=True)
def model(feature_vec):
    # Very simple linear model with activation
    assert feature_vec.dim() == 1
    return feature_vec.dot(weights).relu()
examples = torch.randn(batch_size, feature_size)
result = vmap(model)(examples)
moved = vmap(model, in_dims=1)(examples.t())
"""

BOTH = [GRAD, VMAP, SANITY_CHECK, PER_SAMPLE, VJP, JVP, JACREV, JACFWD, HESSIAN, README_MODEL]
FUNCTORCH = [
    *[*BOTH, MAKE_FUNCTIONAL, MAKE_FUNCTIONAL_WITH_BUFFERS, COMBINE_STATE],
    *[DISABLE_TRACKING, EXPERIMENTAL],
]
TORCH_FUNC = [*BOTH, FUNCTIONAL_CALL, BATCH_NORM]
CASES = [("functorch", p) for p in FUNCTORCH] + [("torch.func", p) for p in TORCH_FUNC]


def run(program, library):
    torch.manual_seed(0)
    space = {"torch": torch}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # functorch's functions are deprecated.
        exec(program.format(library=library), space)
    return {k: v for k, v in space.items() if _is_data(v)}


def _is_data(value):
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(_is_data, value))
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("library, program", CASES)
def test_program(library, program):
    want, got = run(program, library), run(program, "torchlift")
    assert want.keys() == got.keys() and want
    for name in want:
        assert type(want[name]) is type(got[name]), name
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_names_by_module():
    """functorch._C is not part of torch any more; the rest must be as in torch.func."""
    got = run(BY_MODULE, "torchlift")
    plain = "\n".join(line for line in BY_MODULE.splitlines() if "_C" not in line)
    want = run(plain, "torch.func")
    assert want.keys() == got.keys() and len(want) > 6
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)


def test_debugging_helpers():
    previous = torchlift._set_vmap_fallback_warning_enabled(False)
    torchlift._set_vmap_fallback_warning_enabled(previous)
    assert "plain tensor" in torchlift.dump_tensor(torch.ones(2))
