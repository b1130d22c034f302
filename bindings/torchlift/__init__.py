"""torchlift: composable function transforms for PyTorch.

    vmap              maps a function over a dimension of its arguments; random_rows is its loop
    grad, vjp         differentiate it; value_and_grad, grad_and_value return its value too
    jvp, linearize    differentiate it along a direction; jet to any order (Taylor mode)
    jacrev, jacfwd    compute its Jacobian; jacobian chooses, hessian differentiates twice
    sparsity          and coloring, sparse_jacobian, sparse_hessian: those that are mostly zero
    hvp, laplacian    and vhp, ggn_vp, hessian_diag: second derivatives without a Hessian
    cond, while_loop  branches and loops on values, and scan, fori_loop; nonzero(size=) and its kin
    checkpoint        computes a function again in the backward pass: memory for time
    check_nan         names the operator that made a NaN; check_grads compares with differences
    custom_root       solves equations, and differentiates the solution; fixed_point, gmres, cg
    functional_call   calls a module with parameters that are arguments
    trace, make_fx    write down what a function does, transforms and all; jit replays it, save and
                      load keep it in a file; compile has compilers of such graphs; ShapeDtype
                      stands for an argument that is not there yet
    Ensemble          several models as one; per_sample_grad and its kin; optim; maml; empirical_ntk

They nest in each other to any depth, and with torch's own autograd.

>>> import torch, torchlift
>>> torchlift.vmap(torchlift.grad(torch.sin))(torch.zeros(3))
tensor([1., 1., 1.])
"""

import os as _os

import torch as _torch

from torchlift import _load

_extension = _load.extension_path(_os.path.dirname(__file__))
_load.check_torch(_load.built_for_torch(_extension), _torch.__version__)

from torchlift import _C  # noqa: E402
from torchlift._errors import AssumptionError, TransformError, UnsupportedError  # noqa: E402
from torchlift import _autograd, _autograd_function, _printing, _value_checks  # noqa: E402
from torchlift._batch_norm import (  # noqa: E402
    patch_batch_norm_with,
    replace_all_batch_norm_modules_,
)
from torchlift._ensemble import Ensemble  # noqa: E402
from torchlift._functional import functional_call, stack_module_state  # noqa: E402
from torchlift._grad import grad, grad_and_value, value_and_grad, vjp  # noqa: E402
from torchlift._linearized import empirical_ntk, fisher_diagonal, ggn_diagonal  # noqa: E402
from torchlift._make_functional import (  # noqa: E402
    FunctionalModule,
    FunctionalModuleWithBuffers,
    combine_state_for_ensemble,
    extract_state,
    load_state,
    make_functional,
    make_functional_with_buffers,
)
from torchlift._meta import adapt, implicit_maml_grad, maml  # noqa: E402
from torchlift._padded import masked_select, nonzero, unique  # noqa: E402
from torchlift._per_sample import (  # noqa: E402
    clip_and_sum,
    dp_gradients,
    dp_sgd_step,
    per_sample_grad,
    per_sample_grad_norms,
)
from torchlift._check_grads import check_grads  # noqa: E402
from torchlift._check_nan import NanError, check_nan  # noqa: E402
from torchlift._checkpoint import checkpoint, checkpoint_name, save_names  # noqa: E402
from torchlift._curvature import (  # noqa: E402
    ggn_vp,
    hessian_diag,
    hvp,
    laplacian,
    linearize,
    vhp,
)
from torchlift._control_flow import cond, fori_loop, scan, while_loop  # noqa: E402
from torchlift._custom import custom_jvp, custom_vjp, stop_gradient  # noqa: E402
from torchlift._custom_batching import custom_batching  # noqa: E402
from torchlift._forward import jvp  # noqa: E402
from torchlift._jet import jet  # noqa: E402
from torchlift._implicit import custom_root, fixed_point  # noqa: E402
from torchlift._jacobian import hessian, jacfwd, jacobian, jacrev  # noqa: E402
from torchlift._linear_solvers import cg, gmres  # noqa: E402
from torchlift._printing import dump_tensor  # noqa: E402
from torchlift._random import random_rows  # noqa: E402
from torchlift._rearrange import rearrange  # noqa: E402
from torchlift._report import (  # noqa: E402
    FallbackRecord,
    MemoryReport,
    _set_vmap_fallback_warning_enabled,
    fallback_report,
    has_rule,
    memory_report,
    reset_fallback_report,
    strict,
)
from torchlift._sparse import (  # noqa: E402
    Coloring,
    coloring,
    dense_operators,
    hessian_sparsity,
    sparse_hessian,
    sparse_jacobian,
    sparsity,
)
from torchlift._unwrap import debug_unwrap  # noqa: E402
from torchlift._vmap import vmap  # noqa: E402
from torchlift._functionalize import functionalize  # noqa: E402
from torchlift._fx import make_fx  # noqa: E402
from torchlift._jit import CacheInfo, jit  # noqa: E402
from torchlift._save import Loaded, load, save  # noqa: E402
from torchlift._shapes import ShapeDtype  # noqa: E402
from torchlift._trace import Traced, trace  # noqa: E402
from torchlift import compile, optim  # noqa: E402

__version__: str = _C.build_info()["version"]

__all__ = [
    "CacheInfo",
    "Loaded",
    "Traced",
    "load",
    "save",
    "jit",
    "make_fx",
    "trace",
    "AssumptionError",
    "Coloring",
    "Ensemble",
    "FallbackRecord",
    "FunctionalModule",
    "FunctionalModuleWithBuffers",
    "NanError",
    "ShapeDtype",
    "TransformError",
    "UnsupportedError",
    "__version__",
    "adapt",
    "cg",
    "check_grads",
    "check_nan",
    "checkpoint",
    "checkpoint_name",
    "clip_and_sum",
    "coloring",
    "combine_state_for_ensemble",
    "compile",
    "cond",
    "custom_batching",
    "custom_jvp",
    "custom_root",
    "custom_vjp",
    "debug_unwrap",
    "dense_operators",
    "dp_gradients",
    "dp_sgd_step",
    "dump_tensor",
    "empirical_ntk",
    "extract_state",
    "fallback_report",
    "fisher_diagonal",
    "fixed_point",
    "fori_loop",
    "functional_call",
    "functionalize",
    "ggn_diagonal",
    "ggn_vp",
    "gmres",
    "grad",
    "grad_and_value",
    "has_rule",
    "hessian",
    "hessian_diag",
    "hessian_sparsity",
    "hvp",
    "implicit_maml_grad",
    "jacfwd",
    "jacobian",
    "jacrev",
    "jet",
    "jvp",
    "laplacian",
    "linearize",
    "load_state",
    "make_functional",
    "make_functional_with_buffers",
    "maml",
    "masked_select",
    "memory_report",
    "nonzero",
    "optim",
    "patch_batch_norm_with",
    "per_sample_grad",
    "per_sample_grad_norms",
    "random_rows",
    "rearrange",
    "replace_all_batch_norm_modules_",
    "reset_fallback_report",
    "save_names",
    "scan",
    "sparse_hessian",
    "sparse_jacobian",
    "sparsity",
    "stack_module_state",
    "stop_gradient",
    "strict",
    "unique",
    "value_and_grad",
    "vhp",
    "vjp",
    "vmap",
    "while_loop",
]

# Where functorch has it. (_C.dump_tensor is there, too.)
_C._set_vmap_fallback_warning_enabled = _set_vmap_fallback_warning_enabled

_printing.install()
_autograd.install()
_autograd_function.install()
