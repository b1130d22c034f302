"""torchlift.compile: aot_function, partitions, compilers; against eager, and torch's own namespaces."""

import contextlib
import copy
import os

import functorch
import functorch.compile
import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import torchlift
import torchlift.compile as tlc
from torchlift import UnsupportedError, TransformError, make_fx, vjp

PARTITIONS = [tlc.default_partition, tlc.min_cut_rematerialization_partition]
COMPILERS = [tlc.nop, tlc.ts_compile]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tensors_of(tree):
    return [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def twin(args):
    return [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a
        for a in args
    ]


def check(f, *args, **options):
    """Values, gradients, what is written into arguments: as of f itself. Gives (output, args)."""
    options.setdefault("fw_compiler", tlc.nop)
    compiled = tlc.aot_function(f, **options)
    ours, theirs = twin(args), twin(args)
    for _ in range(2):  # The second call finds it compiled.
        torch.manual_seed(3)
        expected = f(*theirs)
        torch.manual_seed(3)
        output = compiled(*ours)
        for a, b in zip(tensors_of(output), tensors_of(expected), strict=True):
            assert_close(a, b)
            assert a.requires_grad == b.requires_grad
        losses = [
            sum((t * t).sum() for t in tensors_of(tree) if t.requires_grad)
            for tree in (output, expected)
        ]
        if isinstance(losses[0], torch.Tensor):
            losses[0].backward()
            losses[1].backward()
        for a, b in zip(ours, theirs):
            if isinstance(a, torch.Tensor):
                assert_close(a, b)
                assert_close(a.grad, b.grad)
    return output, ours


def operators(module):
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


class Collector:
    """A compiler that keeps the modules it is given."""

    def __init__(self):
        self.modules, self.inputs = [], []

    def __call__(self, module, inputs):
        self.modules.append(module)
        self.inputs.append(inputs)
        return module


# --- the names -------------------------------------------------------------------------------------


class TestNames:
    @pytest.mark.parametrize(
        "theirs, ours",
        [(torch.func, torchlift), (functorch, torchlift), (functorch.compile, tlc)],
        ids=["torch.func", "functorch", "functorch.compile"],
    )
    def test_every_public_name_of_theirs_exists(self, theirs, ours):
        names = {n for n in dir(theirs) if not n.startswith("_")} - {"torch"}
        assert len(names) > 10
        missing = sorted(name for name in names if not hasattr(ours, name))
        assert missing == []

    def test_all_lists_what_is_there(self):
        assert all(hasattr(tlc, name) for name in tlc.__all__)
        assert tlc.simple_ts_compile is not None

    def test_parameters_have_their_names(self):
        import inspect

        for name in ("aot_function", "default_partition", "draw_graph", "minifier", "ts_compile"):
            theirs = inspect.signature(getattr(functorch.compile, name)).parameters
            ours = inspect.signature(getattr(tlc, name)).parameters
            public = [p for p in theirs if not p.startswith("_disable")]
            assert [p for p in public if p not in ours] == [], name

    def test_nothing_of_torchs_aot_does_the_work(self, monkeypatch):
        import torch._functorch.aot_autograd as theirs

        def refuse(*args, **kwargs):
            raise AssertionError("torch's own AOT Autograd was called")

        monkeypatch.setattr(theirs, "create_aot_dispatcher_function", refuse, raising=False)
        check(lambda x: x.sin(), leaf(3), partition_fn=tlc.min_cut_rematerialization_partition)


# --- aot_function ----------------------------------------------------------------------------------


def write_into_buffer(x, b):
    b.add_(1)
    return x * b, b


def write_through_view(x, b):
    row = b[0]
    row.mul_(2)
    b.add_(x.detach()[0].sum())
    return (x * b).sum(), b[1]


def views_of_one(x):
    y = x.exp()
    return y, y.view(-1), y, y.t()


@pytest.mark.parametrize("partition_fn", PARTITIONS, ids=["default", "min_cut"])
@pytest.mark.parametrize("compiler", COMPILERS, ids=["nop", "ts"])
class TestAotFunction:
    def test_values_and_gradients(self, compiler, partition_fn):
        options = dict(fw_compiler=compiler, partition_fn=partition_fn)
        check(lambda x, w: torch.tanh(x @ w), leaf(3, 4), leaf(4, 5), **options)
        check(lambda x, w: (torch.tanh(x @ w), x * 2), leaf(3, 4), data(4, 5), **options)
        check(lambda x: (x.exp(), x.exp().sum()), data(3, 4), **options)
        check(lambda x, s: {"a": [x * s, 3]}, leaf(4), 2.5, **options)
        check(lambda x: torch.var_mean(x, 1), leaf(4, 3), **options)

    def test_outputs_that_are_inputs_or_views(self, compiler, partition_fn):
        options = dict(fw_compiler=compiler, partition_fn=partition_fn)
        check(lambda x, w: (torch.tanh(x @ w), w.t(), x), leaf(3, 4), leaf(4, 5), **options)
        check(views_of_one, leaf(3, 4), **options)
        check(lambda x: torch.split(x.exp(), 2), leaf(4, 3), **options)
        check(lambda x: torch.split(x.exp(), 2), data(4, 3), **options)

    def test_writes_into_arguments(self, compiler, partition_fn):
        options = dict(fw_compiler=compiler, partition_fn=partition_fn)
        check(write_into_buffer, leaf(3, 4), data(3, 4), **options)
        check(write_into_buffer, data(3, 4), data(3, 4), **options)
        check(write_through_view, leaf(3, 4), data(3, 4), **options)
        check(lambda x, b: (x * b.exp(), b.add_(1)), leaf(3), data(3), **options)

    def test_random_operators(self, compiler, partition_fn):
        options = dict(fw_compiler=compiler, partition_fn=partition_fn)
        check(lambda x: nn.functional.dropout(x, 0.3).exp(), leaf(30, 4), **options)
        check(lambda x: x * torch.rand_like(x), leaf(30), **options)

    def test_a_module_that_trains(self, compiler, partition_fn):
        eager = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2)
        ).double()
        mine = copy.deepcopy(eager)
        compiled = tlc.aot_module(mine, compiler, partition_fn=partition_fn)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (eager, compiled)]
        for seed in range(3):
            outputs = []
            for model, optimizer in zip((eager, compiled), optimizers):
                optimizer.zero_grad()
                torch.manual_seed(seed)
                x = data(6, 4)
                outputs.append(model(x))
                outputs[-1].square().sum().backward()
                optimizer.step()
            assert_close(*outputs)
        for a, b in zip(eager.state_dict().values(), mine.state_dict().values(), strict=True):
            assert_close(a, b)
        eager.eval(), compiled.eval()
        x = data(6, 4)
        assert_close(compiled(x), eager(x))
        with torch.no_grad():
            assert_close(compiled(x), eager(x))

    def test_a_transformer_block(self, compiler, partition_fn):
        eager = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True).double()
        mine = copy.deepcopy(eager)
        compiled = tlc.aot_module(mine, compiler, partition_fn=partition_fn)
        x = data(2, 5, 16)
        out, expected = compiled(x), eager(x)
        assert_close(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        for a, b in zip(mine.parameters(), eager.parameters(), strict=True):
            assert_close(a.grad, b.grad)


class TestAotFunctionBehaviour:
    def test_transforms_inside(self):
        def f(x, w):
            return torchlift.vmap(torchlift.grad(lambda r: (r @ w).sin().sum()))(x)

        check(f, leaf(5, 3), leaf(3, 2))

    def test_a_custom_vjp_inside_is_used(self):
        @torchlift.custom_vjp
        def f(x):
            return x.sin()

        f.defvjp(lambda x: (x.sin(), None), lambda _, g: (7 * g,))
        x = leaf(3)
        tlc.aot_function(f, tlc.nop)(x).sum().backward()
        assert_close(x.grad, torch.full_like(x, 7))

    def test_an_autograd_function_inside_is_used(self):
        class Seven(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.sin()

            @staticmethod
            def backward(ctx, g):
                return 7 * g

        x = leaf(3)
        tlc.aot_function(Seven.apply, tlc.nop)(x).sum().backward()
        assert_close(x.grad, torch.full_like(x, 7))

    def test_compilers_get_graphs_and_examples(self):
        forward, backward, inference = Collector(), Collector(), Collector()
        f = tlc.aot_function(
            lambda x, y: x.sin() * y, forward, backward, inference_compiler=inference
        )
        x, y = leaf(3), data(3)
        f(x, y).sum().backward()
        assert operators(forward.modules[0]) == ["aten.sin.default", "aten.mul.Tensor"]
        assert "aten.cos.default" in operators(backward.modules[0])
        assert [t.shape for t in forward.inputs[0]] == [x.shape, y.shape]
        names = [n.name for n in forward.modules[0].graph.nodes if n.op == "placeholder"]
        assert names == ["primals_1", "primals_2"]
        given = forward.modules[0](*forward.inputs[0])
        assert len(backward.inputs[0]) == len(given) - 1 + 1  # saved, and one tangent
        backward.modules[0](*backward.inputs[0])
        assert inference.modules == []
        with torch.no_grad():
            f(x, y)
        assert operators(inference.modules[0]) == ["aten.sin.default", "aten.mul.Tensor"]

    def test_one_compilation_a_signature(self):
        forward = Collector()
        f = tlc.aot_function(lambda x, s=1: x * s, forward)
        for args in [(data(3),), (data(3),), (data(4),), (leaf(3),), (data(3), 2), (data(3), 2)]:
            f(*args)
        f(data(3).float())
        # (3), (4), tracked (two graphs), s=2, float32
        assert len(forward.modules) == 6
        f(data(3, 3))
        f(data(3, 3).t())
        assert len(forward.modules) == 8

    def test_the_first_call_draws_the_numbers_of_eager(self):
        torch.manual_seed(0)
        expected = nn.functional.dropout(torch.ones(20))
        torch.manual_seed(0)
        assert_close(tlc.aot_function(nn.functional.dropout, tlc.nop)(torch.ones(20)), expected)

    def test_gradients_of_unused_inputs_are_none(self):
        x, y = leaf(3), leaf(3)
        tlc.aot_function(lambda x, y: x.sin(), tlc.nop)(x, y).sum().backward()
        assert y.grad is None

    def test_one_output_of_two_has_a_cotangent(self):
        x = leaf(3)
        a, _ = tlc.aot_function(lambda x: (x.sin(), x.cos()), tlc.nop)(x)
        a.sum().backward()
        assert_close(x.grad, x.detach().cos())

    def test_cotangents_with_other_strides(self):
        x = leaf(3, 4)
        y = tlc.aot_function(lambda x: x.view(12).sin().view(3, 4), tlc.nop)(x)
        y.t().contiguous().sum().backward()
        assert_close(x.grad, x.detach().cos())
        x.grad = None
        y = tlc.aot_function(lambda x: x.view(12).sin().view(3, 4), tlc.nop)(x)
        y.backward(data(4, 3).t())

    def test_the_inputs_that_are_returned_are_the_same_tensors(self):
        x, b = leaf(3), data(3)
        out = tlc.aot_function(lambda x, b: (x, b.add_(1), b[1:]), tlc.nop)(x, b)
        assert out[0] is x and out[1] is b
        out[2].zero_()
        assert_close(b[1:], torch.zeros(2, dtype=b.dtype))

    def test_decompositions(self):
        forward = Collector()
        table = {torch.ops.aten.silu.default: lambda x: x * torch.sigmoid(x)}
        f = tlc.aot_function(nn.functional.silu, forward, decompositions=table)
        x = leaf(3)
        assert_close(f(x), nn.functional.silu(x))
        assert "aten.sigmoid.default" in operators(forward.modules[0])
        assert "aten.silu.default" not in operators(forward.modules[0])

    def test_default_decompositions(self):
        collected = Collector()
        f = tlc.aot_function(
            lambda x: nn.functional.gelu(x).tanh(),
            collected,
            decompositions=tlc.default_decompositions,
        )
        x = leaf(5)
        f(x).sum().backward()
        y = x.detach().clone().requires_grad_()
        nn.functional.gelu(y).tanh().sum().backward()
        assert_close(x.grad, y.grad)
        assert not any("gelu_backward" in o for m in collected.modules for o in operators(m))

    def test_a_decomposition_that_gives_itself_is_an_error(self):
        table = {torch.ops.aten.sin.default: lambda x: torch.sin(x)}
        with pytest.raises(UnsupportedError, match="gives that operator again"):
            tlc.aot_function(torch.sin, tlc.nop, decompositions=table)(data(3))

    def test_keep_inference_input_mutations(self):
        forward = Collector()
        f = tlc.aot_function(write_into_buffer, forward, keep_inference_input_mutations=True)
        b = torch.zeros(3)
        f(torch.ones(3), b)
        assert_close(b, torch.ones(3))
        assert "aten.copy_.default" in operators(forward.modules[0])

    def test_under_transforms_it_is_the_function(self):
        f = tlc.aot_function(torch.sin, tlc.nop)
        x = data(4)
        assert_close(torchlift.vmap(torchlift.grad(f))(x), x.cos())

    def test_autocast(self):
        f = tlc.aot_function(lambda x, w: (x @ w).float().softmax(0), tlc.nop)
        x, w = torch.randn(3, 4, requires_grad=True), torch.randn(4, 4)
        plain = f(x, w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            halved = f(x, w)
            expected = (x @ w).float().softmax(0)
        assert_close(halved, expected)
        assert not torch.equal(plain, halved)
        halved.sum().backward()

    def test_context_names_the_graph(self):
        names = []

        def compiler(module, inputs):
            names.append(tlc.get_aot_graph_name())
            return module

        tlc.aot_function(torch.sin, compiler)(leaf(2))
        assert "forward" in names[0] and "backward" in names[1]
        assert tlc.get_aot_compilation_context()[0] == []

    def test_aot_module_simplified(self):
        model = nn.Linear(3, 2).double()
        forward = Collector()
        f = tlc.aot_module_simplified(model, [data(5, 3)], forward)
        assert len(forward.modules) == 2
        x = data(5, 3)
        assert_close(f(x), model(x))
        assert len(forward.modules) == 2

    def test_memory_efficient_fusion(self):
        x = leaf(10)
        tlc.memory_efficient_fusion(lambda x: nn.functional.gelu(x).sin())(x).sum().backward()
        y = x.detach().requires_grad_()
        nn.functional.gelu(y).sin().sum().backward()
        assert_close(x.grad, y.grad)
        assert isinstance(tlc.memory_efficient_fusion(nn.Linear(2, 2)), nn.Module)


class TestAotErrors:
    def test_a_write_into_an_argument_that_requires_a_gradient(self):
        f = tlc.aot_function(lambda x: x.mul_(2).sin(), tlc.nop)
        with pytest.raises((UnsupportedError, RuntimeError), match="in-place|writes into tensor 0"):
            f(leaf(3))

    def test_a_tracked_value_written_into_a_buffer(self):
        def f(x, b):
            b.add_(x)
            return b * 2

        with pytest.raises(UnsupportedError, match="depends on arguments which require gradients"):
            tlc.aot_function(f, tlc.nop)(leaf(3), data(3))

    def test_a_captured_parameter(self):
        w = leaf(3)
        f = tlc.aot_function(lambda x: x * w, tlc.nop)
        with pytest.raises(UnsupportedError, match="its gradient would be lost"):
            f(data(3))
        with torch.no_grad():
            assert_close(f(torch.ones(3, dtype=w.dtype)), w.detach())

    def test_second_derivatives(self):
        x = leaf(3)
        y = tlc.aot_function(torch.sin, tlc.nop)(x).sum()
        with pytest.raises(UnsupportedError, match="Differentiate inside"):
            torch.autograd.grad(y, x, create_graph=True)
        inside = tlc.aot_function(torchlift.grad(lambda x: x.sin().sum()), tlc.nop)
        assert_close(torch.autograd.grad(inside(x).sum(), x)[0], -x.detach().sin())

    def test_arguments_that_share_memory(self):
        b = data(4)
        f = tlc.aot_function(lambda x, b: (x * 1, b.add_(1)), tlc.nop)
        f(data(3), data(4))
        with pytest.raises(UnsupportedError, match="shares its memory"):
            f(b[:3], b)

    def test_wrong_use(self):
        with pytest.raises(TransformError, match="fw_compiler must be a function, got None"):
            tlc.aot_function(torch.sin, None)
        with pytest.raises(TransformError, match="Use aot_module"):
            tlc.aot_function(nn.Linear(2, 2), tlc.nop)
        with pytest.raises(TransformError, match="Use aot_function"):
            tlc.aot_module(torch.sin, tlc.nop)
        with pytest.raises(UnsupportedError, match="dynamic=True"):
            tlc.aot_function(torch.sin, tlc.nop, dynamic=True)
        with pytest.raises(TransformError, match="cannot be hashed"):
            tlc.aot_function(lambda x, s: x, tlc.nop)(data(2), {1, 2})


# --- partitions ------------------------------------------------------------------------------------


def joint_of(f, *primals):
    def joint(primals, tangents):
        out, pull = vjp(f, *primals)
        return [*out, *pull(tuple(tangents))]

    tangents = [torch.ones_like(t) for t in f(*primals)]
    inputs = (list(primals), tangents)
    return make_fx(joint)(*inputs), inputs


def chain(x):
    return (x.sin().cos().exp().tanh(),)


def attention(x, w):
    h = (x @ w).softmax(-1)
    return (nn.functional.dropout(h, 0.5) @ h.mT,)


class TestPartition:
    @pytest.mark.parametrize("partition", PARTITIONS)
    @pytest.mark.parametrize("f, shapes", [(chain, [(5,)]), (attention, [(4, 4), (4, 4)])])
    def test_the_parts_make_the_whole(self, partition, f, shapes):
        module, inputs = joint_of(torchlift.functionalize(f), *(data(*s) for s in shapes))
        forward, backward = partition(module, inputs, num_fwd_outputs=1)
        torch.manual_seed(0)
        whole = module(*inputs)
        torch.manual_seed(0)
        out, *saved = forward(*inputs[0])
        grads = backward(*saved, *inputs[1])
        for a, b in zip([out, *grads], whole, strict=True):
            assert_close(a, b)

    def test_a_joint_graph_of_torchs_own_make_fx(self):
        from torch.fx.experimental.proxy_tensor import make_fx as theirs

        def joint(primals, tangents):
            out, pull = torch.func.vjp(lambda x: (x.sin().exp(),), *primals)
            return [*out, *pull(tuple(tangents))]

        inputs = ([data(5)], [data(5)])
        module = theirs(joint)(*inputs)
        for partition in PARTITIONS:
            forward, backward = partition(module, inputs, num_fwd_outputs=1)
            out, *saved = forward(*inputs[0])
            assert_close(backward(*saved, *inputs[1])[0], module(*inputs)[1])

    def test_a_chain_saves_its_input_only(self):
        module, inputs = joint_of(chain, data(1000))
        reports = [
            tlc.partition_report(p(module, inputs, num_fwd_outputs=1)[0]) for p in PARTITIONS
        ]
        assert reports[1].saved_bytes == 8000 and reports[1].saved_activation_bytes == 0
        assert [row[2] for row in reports[1].saved] == [True]
        assert reports[0].saved_bytes > 3 * 8000
        assert reports[0].recomputed == () and len(reports[1].recomputed) >= 3
        assert reports[1].recomputed_elements == 1000 * len(reports[1].recomputed)
        assert "computes" in str(reports[1])

    def test_the_cut_is_minimal(self):
        """Against all ways to save the values of a small graph."""
        import itertools

        module, inputs = joint_of(
            lambda x, w: ((x.exp() * w).sum(0).sin() @ w.cos().mT,), data(8, 3), data(8, 3)
        )
        forward, _ = tlc.min_cut_rematerialization_partition(module, inputs, num_fwd_outputs=1)
        from torchlift.compile._partition import _Joint, _may_recompute
        from torchlift.compile._shapes import bytes_of, value_of

        joint = _Joint("test", module, 1)
        values = [n for n in joint.nodes if n in joint.forward | set(joint.primals)]
        values = [n for n in values if n.op != "get_attr"]

        def enough(saved):
            todo, seen = list(joint.backward_outputs), set()
            while todo:
                node = todo.pop()
                if node in saved or node in seen or node in joint.tangents:
                    continue
                banned = node in joint.forward and not _may_recompute(node)
                if node.op == "placeholder" or banned:
                    return False
                seen.add(node)
                todo.extend(node.all_input_nodes)
            return True

        best = min(
            sum(bytes_of(value_of(n)) for n in saved)
            for count in range(len(values) + 1)
            for saved in itertools.combinations(values, count)
            if enough(set(saved))
        )
        assert tlc.partition_report(forward).saved_bytes == best

    def test_bytes_count_not_tensors(self):
        module, inputs = joint_of(lambda p, q: ((p + q).sin(),), data(9, 1), data(1, 9))
        forward, _ = tlc.min_cut_rematerialization_partition(module, inputs, num_fwd_outputs=1)
        assert tlc.partition_report(forward).saved_bytes == 2 * 9 * 8  # p and q, not their sum

    def test_random_operators_and_products_never_run_twice(self):
        module, inputs = joint_of(torchlift.functionalize(attention), data(4, 4), data(4, 4))
        _, backward = tlc.min_cut_rematerialization_partition(module, inputs, num_fwd_outputs=1)
        names = tlc.partition_report(backward).recomputed
        assert not any("mm" in name or "bernoulli" in name for name in names)
        with tlc.config.patch(aggressive_recomputation=True):
            _, backward = tlc.min_cut_rematerialization_partition(
                module, inputs, num_fwd_outputs=1
            )
        names = tlc.partition_report(backward).recomputed
        assert any("mm" in name for name in names)
        assert not any("bernoulli" in name for name in names)

    def test_views_are_not_saved_beside_their_base(self):
        def f(x):
            y = x @ x
            return (y[0] * y[1] * y,)

        module, inputs = joint_of(f, data(6, 6))
        forward, _ = tlc.min_cut_rematerialization_partition(module, inputs, num_fwd_outputs=1)
        report = tlc.partition_report(forward)
        assert not any("select" in name for name, *_ in report.saved)

    def test_parameters_are_free(self):
        def f(w, x):
            return ((w.exp() @ x).sin(),)

        module, inputs = joint_of(f, data(9, 9), data(9, 9))
        free, _ = tlc.min_cut_rematerialization_partition(
            module, inputs, num_fwd_outputs=1, static_lifetime_input_indices=[0]
        )
        assert any(row[0].startswith("primals_1") for row in tlc.partition_report(free).saved)

    def test_a_transformer_block_saves_less(self):
        model = nn.TransformerEncoderLayer(
            64, 4, 256, 0.1, activation="gelu", batch_first=True, norm_first=True
        )
        reports = {}
        for partition in PARTITIONS:
            collected = Collector()
            tlc.aot_module(model, collected, partition_fn=partition)(torch.randn(8, 32, 64))
            reports[partition] = tlc.partition_report(collected.modules[0])
        default, least = (reports[partition] for partition in PARTITIONS)
        assert least.saved_bytes <= 0.7 * default.saved_bytes
        assert least.recomputed_elements > 0 and default.recomputed_elements == 0

    def test_errors(self):
        module, inputs = joint_of(chain, data(3))
        with pytest.raises(TransformError, match="has 2 outputs"):
            tlc.default_partition(module, inputs, num_fwd_outputs=5)
        with pytest.raises(TransformError, match="depends on a tangent"):
            tlc.default_partition(module, inputs, num_fwd_outputs=2)

        def writes(x):
            y = x * 2
            y.add_(1)
            return (y.exp(),)

        module, inputs = joint_of(writes, data(3))
        with pytest.raises(TransformError, match="writes into a tensor"):
            tlc.default_partition(module, inputs, num_fwd_outputs=1)
        with pytest.raises(TransformError, match="was not made by a partition"):
            tlc.partition_report(module)
        with pytest.raises(AttributeError, match="no option 'nonsense'"):
            with tlc.config.patch(nonsense=1):
                pass


# --- compilers and tools ---------------------------------------------------------------------------


class TestCompilers:
    def test_print_compile(self, capsys):
        tlc.aot_function(torch.sin, tlc.print_compile)(data(3))
        assert "torch.ops.aten.sin.default(primals_1)" in capsys.readouterr().out

    @pytest.mark.parametrize("compiler", [tlc.ts_compile, tlc.simple_ts_compile])
    def test_torchscript(self, compiler):
        module = make_fx(lambda x: torch.zeros(3, dtype=x.dtype) + x.to(torch.float32))(data(3))
        compiled = compiler(module, [data(3)])
        x = data(3)
        out = compiled([x])
        assert_close(out if isinstance(out, torch.Tensor) else out[0], x.float().double())

    def test_nnc_jit(self):
        x = leaf(3)
        tlc.nnc_jit(lambda x: x.sin().exp())(x).sum().backward()
        assert_close(x.grad, (x.cos() * x.sin().exp()).detach())

    def test_draw_graph(self, tmp_path, monkeypatch):
        module = make_fx(lambda x: x.sin() + 1)(data(3))
        monkeypatch.setenv("PATH", "")
        for name, marker in [("a.svg", "<svg"), ("b.dot", "digraph"), ("c", "<svg")]:
            tlc.draw_graph(module, str(tmp_path / name))
            text = (tmp_path / (name if "." in name else name + ".svg")).read_text()
            assert marker in text and "sin_default" in text
        with pytest.warns(UserWarning, match="Graphviz .dot. was not found"):
            tlc.draw_graph(module, str(tmp_path / "d.png"))
        assert (tmp_path / "d.dot").exists()
        with pytest.raises(TransformError, match="in place of a torch.fx.GraphModule"):
            tlc.draw_graph(torch.sin, "x.svg")

    def test_debug_compile(self, tmp_path, capsys):
        with contextlib.chdir(tmp_path):
            tlc.aot_function(torch.sin, tlc.debug_compile)(data(3))
            assert os.path.exists("foo/module.py")
        assert "minifier(" in capsys.readouterr().out

    def test_pythonkey_decompose(self):
        table = {torch.ops.aten.silu.default: lambda x: x * torch.sigmoid(x)}
        with tlc.pythonkey_decompose(table) as entered:
            assert entered == table
            module = make_fx(nn.functional.silu)(data(3))
        assert operators(module) == ["aten.sigmoid.default", "aten.mul.Tensor"]
        assert operators(make_fx(nn.functional.silu)(data(3))) == ["aten.silu.default"]

    def test_boxed(self):
        boxed = tlc.make_boxed_func(lambda a, b: a - b)
        assert boxed._boxed_call and boxed([3, 1]) == 2

    def test_minifier(self):
        def f(x, y):
            a = x.sin().exp() * y
            b = torch.relu(a).cos().sum()
            return b + 1, y.tanh()

        module = make_fx(f)(data(3), data(3))

        def fails(module, inputs):
            module(*inputs)
            return "aten.relu.default" in operators(module)

        small, inputs = tlc.minifier(module, [data(3), data(3)], fails, lambda *_: None)
        assert operators(small) == ["aten.relu.default"] and len(inputs) == 1
        with pytest.raises(TransformError, match="does not fail"):
            tlc.minifier(module, [data(3), data(3)], lambda *_: False)
        with pytest.raises(TransformError, match="power of two, got 3"):
            tlc.minifier(module, [data(3), data(3)], fails, max_granularity=3)


# --- torch.export and TorchScript ------------------------------------------------------------------


class TestExport:
    def test_export_saves_and_loads(self, tmp_path):
        f = torchlift.vmap(torchlift.grad(lambda x: x.sin().sum()))
        x = data(5, 3)
        program = tlc.export(f)(x)
        assert isinstance(program, torch.export.ExportedProgram)
        torch.export.save(program, tmp_path / "f.pt2")
        assert_close(torch.export.load(tmp_path / "f.pt2").module()(x), x.cos())
        assert_close(tlc.from_exported(tmp_path / "f.pt2")(x), x.cos())

    def test_an_exported_program_is_transformed(self):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        f = tlc.from_exported(torch.export.export(model, (data(3),)))
        x = data(5, 3)
        loss = lambda g: lambda x: g(x).square().sum()  # noqa: E731
        expected = torchlift.vmap(torchlift.grad(loss(model)))(x)
        assert_close(torchlift.vmap(torchlift.grad(loss(f)))(x), expected)
        assert_close(torchlift.jacrev(f)(x[0]), torchlift.jacrev(model)(x[0]))

    def test_a_torchscript_file_is_transformed(self, tmp_path):
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        torch.jit.script(model).save(tmp_path / "m.pt")
        f = tlc.from_torchscript(tmp_path / "m.pt")
        x = data(5, 3)
        loss = lambda g: lambda x: g(x).square().sum()  # noqa: E731
        for _ in range(3):
            expected = torchlift.vmap(torchlift.grad(loss(model)))(x)
            assert_close(torchlift.vmap(torchlift.grad(loss(f)))(x), expected)

    def test_errors(self):
        with pytest.raises(TransformError, match="in place of a torch.export.ExportedProgram"):
            tlc.from_exported(nn.Linear(2, 2))
        with pytest.raises(TransformError, match="in place of a torch.jit.ScriptModule"):
            tlc.from_torchscript(nn.Linear(2, 2))


# --- functionalize, and what else torch.func has ---------------------------------------------------


class TestFunctionalize:
    @staticmethod
    def writes(x):
        y = x.clone()
        y[0].mul_(2)
        y.add_(x.sum())
        return y, y[1]

    @pytest.mark.parametrize("remove", ["mutations", "mutations_and_views"])
    def test_same_values_without_writes(self, remove):
        f = torchlift.functionalize(self.writes, remove=remove)
        x = data(3, 4)
        for a, b in zip(f(x), self.writes(x), strict=True):
            assert_close(a, b)
        module = make_fx(f)(x)
        schemas = [n.target._schema for n in module.graph.nodes if n.op == "call_function"]
        assert not any(schema.is_mutable for schema in schemas)
        copies = operators(module).count("aten.clone.default")
        assert copies == (1 if remove == "mutations" else 3)  # a trace shows select_copy as two
        for a, b in zip(module(x), self.writes(x), strict=True):
            assert_close(a, b)

    def test_writes_into_arguments_are_copied_back(self):
        def f(x):
            x.mul_(2)
            return x, x[0]

        x = data(3)
        y = x.clone()
        out = torchlift.functionalize(f)(y)
        assert_close(y, 2 * x)
        assert out[0] is y
        module = make_fx(torchlift.functionalize(f))(x.clone())
        assert operators(module)[0] == "aten.mul.Tensor"
        assert "aten.copy_.default" in operators(module)

    def test_under_transforms(self):
        f = torchlift.functionalize(lambda x: self.writes(x)[0].sum())
        x = data(5, 3, 4)
        plain = lambda x: self.writes(x)[0].sum()  # noqa: E731
        assert_close(torchlift.vmap(f)(x), torchlift.vmap(plain)(x))
        assert_close(
            torchlift.vmap(torchlift.grad(f))(x), torchlift.vmap(torchlift.grad(plain))(x)
        )
        assert_close(
            make_fx(torchlift.vmap(torchlift.grad(f)))(x)(x), torchlift.vmap(torchlift.grad(plain))(x)
        )

    def test_as_torch_func(self):
        x = data(3, 4)
        theirs = torch.func.functionalize(self.writes)(x)
        for a, b in zip(torchlift.functionalize(self.writes)(x), theirs, strict=True):
            assert_close(a, b)

    def test_wrong_use(self):
        with pytest.raises(TransformError, match="remove must be one of"):
            torchlift.functionalize(torch.sin, remove="views")


class TestRearrange:
    @pytest.mark.parametrize(
        "shape, pattern, sizes",
        [
            ((2, 12, 3), "b (h w) c -> b c h w", {"h": 3}),
            ((4, 6, 8, 3), "b h w c -> (b h) w c", {}),
            ((4, 6, 8, 3), "b (h h1) (w w1) c -> b h w (c h1 w1)", {"h1": 2, "w1": 2}),
            ((4, 6, 8, 3), "b ... c -> c b ...", {}),
            ((4, 6, 8, 3), "b ... c -> b (... c)", {}),
            ((4, 3), "b c -> b () c", {}),
            ((), "->", {}),
        ],
    )
    def test_as_torch_func(self, shape, pattern, sizes):
        x = torch.randn(shape)
        assert torch.equal(
            torchlift.rearrange(x, pattern, **sizes), torch.func.rearrange(x, pattern, **sizes)
        )

    def test_dims_of_size_one(self):
        x = torch.randn(4, 1, 3)
        assert torch.equal(torchlift.rearrange(x, "b 1 c -> c b 1"), x.permute(2, 0, 1))

    def test_a_list_is_stacked(self):
        xs = [torch.randn(2, 3) for _ in range(4)]
        assert_close(torchlift.rearrange(xs, "n a b -> a (n b)"), torch.cat(xs, 1))

    def test_under_transforms(self):
        x = data(5, 6, 2)
        f = lambda x: torchlift.rearrange(x, "(a b) c -> b (a c)", a=2)  # noqa: E731
        assert_close(torchlift.vmap(f)(x), torch.stack([f(row) for row in x]))

    @pytest.mark.parametrize(
        "pattern, sizes, message",
        [
            ("a b", {}, "one '->'"),
            ("a b -> a", {}, "'b' stands on one side only"),
            ("a a -> a a", {}, "'a' stands twice"),
            ("(a b -> a b", {}, "is not closed"),
            ("a b c -> c b a", {}, "has 3 dims, the tensor 2"),
            ("(a x) b -> a x b", {}, "sizes of all but one"),
            ("(a x) b -> a x b", {"x": 4}, "no multiple of 4"),
            ("a b -> b a", {"q": 4}, "size is given for 'q'"),
            ("a 2 -> a 2", {}, "only number allowed is 1"),
            ("a - b -> a b", {}, "'-' is not part"),
        ],
    )
    def test_errors(self, pattern, sizes, message):
        with pytest.raises(TransformError, match=message):
            torchlift.rearrange(torch.zeros(6, 2), pattern, **sizes)


def test_debug_unwrap():
    seen = []

    def f(x):
        seen.extend([torchlift.debug_unwrap(x), torchlift.debug_unwrap(x, recurse=False)])
        return x

    x = data(5, 4, 3)
    torchlift.vmap(torchlift.vmap(f))(x)
    assert seen[0].shape == x.shape and not torchlift._C.is_lifted(seen[0])
    assert torchlift._C.is_lifted(seen[1])
    assert torchlift.debug_unwrap(x) is x
    with pytest.raises(TransformError, match="takes a tensor"):
        torchlift.debug_unwrap(3)
