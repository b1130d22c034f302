"""Writes the models that the tests of this folder load, and the numbers that torch computes with them.

    .venv/bin/python compile/import/testdata/write_testdata.py

MODEL.pt2 is the model by torch.export, MODEL.pt by torch.jit.script; MODEL.safetensors has the inputs, the outputs
and the buffers after a call. Both are written without the lines of source they come from, which are most of such
files and name folders of this machine. With torch 2.11 it writes the one model that shows how that version's files are.
"""

import io
import json
import pathlib
import struct

import torch
import torch.nn.functional as F
from torch import nn

HERE = pathlib.Path(__file__).parent
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}


# --- models ---------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Writes running statistics, in training mode."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(12, 2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return F.log_softmax(self.head(x.flatten(1)), -1)


class Attention(nn.Module):
    """One block of a transformer: weights that are tied, a mask in a buffer, minus infinity."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 4)
        self.again = self.out
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril())

    def forward(self, x):
        n = x.shape[1]
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(-2, -1) / k.shape[-1] ** 0.5
        scores = scores.masked_fill(~self.mask[:n, :n], float("-inf"))
        x = x + self.out(scores.softmax(-1) @ v)
        return x + self.again(F.gelu(x))


class Structured(nn.Module):
    """Trees of inputs and outputs, numbers that depend on sizes, constants."""

    def __init__(self):
        super().__init__()
        self.scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor):
        x, y = pair
        n = x.shape[0]
        wide = torch.cat([x, x]).view(2 * n, -1) * self.scale
        return {"wide": wide, "rest": (y * n + bias, n)}, (x.sum() / n, None)


class Flow(nn.Module):
    """A branch, loops, a block without gradients."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(3, 3)

    def forward(self, x, xs, n):
        with torch.no_grad():
            still = self.line(x)
        branch = torch.cond(x.sum() > 0, lambda a: self.line(a).sin(), lambda a: a.cos(), (x,))
        _, power = torch.while_loop(
            lambda i, a: i < n, lambda i, a: (i + 1, a * 2), (torch.zeros((), dtype=torch.int64), x)
        )
        last, sums = torch._higher_order_ops.scan(lambda c, a: (c + a, c * a), x, xs)
        return branch * still, power, last, sums


class Strided(nn.Module):
    """Sizes that are no polynomials of the image's, and a branch beside them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2)

    def forward(self, x):
        x = self.conv(x)
        x = torch.cond(x.sum() > 0, lambda a: a.sin(), lambda a: a - 1, (x,))
        return x.view(x.shape[0], -1) / (x.shape[2] // 2)


class Recurrent(nn.Module):
    """Its weights are also in a list, which is what is read."""

    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x):
        return self.cells(x)[0]


class Cast(nn.Module):
    """Cannot be run operator by operator."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.mm(x, x)


@torch.jit.interface
class Layer(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pass


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class Through(nn.Module):
    """Neither can this: which method it calls is known only when it runs."""

    layer: Layer

    def __init__(self):
        super().__init__()
        self.layer = Double()

    def forward(self, x: torch.Tensor):
        return self.layer.forward(x)


class Multihead(nn.Module):
    """Exported by torch 2.11, it has views that fit the layout of one kernel's result."""

    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.heads(x, x, x, need_weights=False)[0]


class Average(nn.Module):
    """Keeps an average in a buffer, in a block without gradients."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.ones(3))

    def forward(self, x):
        with torch.no_grad():
            self.average.mul_(0.5).add_(x.mean(0))
        return x * self.average


class Script(nn.Module):
    """What TorchScript has beyond operators: loops, lists, dicts, optional arguments, other methods."""

    def __init__(self):
        super().__init__()
        self.cells = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.repeats = 2

    def step(self, x: torch.Tensor) -> torch.Tensor:
        for i, cell in enumerate(self.cells):
            x = torch.sin(cell(x)) if i % 2 == 0 else cell(x)
        return x

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], scale: float = 2.0, bias: torch.Tensor | None = None):
        x, y = pair
        seen: list[torch.Tensor] = []
        found: dict[str, torch.Tensor] = {}
        for i in range(self.repeats):
            x = self.step(x) * scale
            seen.append(x)
            found["x" + str(i)] = x + y
        with torch.no_grad():
            self.calls += 1
        if bias is not None:
            x = x + bias
        wait = torch.jit.fork(self.step, x)
        return torch.stack(seen), found, (torch.jit.wait(wait), len(seen), None)


# --- files ----------------------------------------------------------------------------------------


def write_safetensors(path, tensors):
    header, place, data = {}, 0, b""
    for name, t in tensors.items():
        raw = t.detach().contiguous().numpy().tobytes()
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [place, place + len(raw)]}
        place += len(raw)
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def leaves(tree):
    """Tensors in order; numbers as tensors, None left out."""
    found = []
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif leaf is not None:
            found.append(torch.tensor(leaf))
    return found


def record(name, module, args):
    tensors = {f"input.{i}": t.clone() for i, t in enumerate(leaves(args))}
    own = {key: t.detach().clone() for key, t in module.state_dict().items()}
    outputs = leaves(module(*args))
    tensors |= {f"output.{i}": t for i, t in enumerate(outputs)}
    tensors |= {f"buffer.{key}": t.clone() for key, t in module.named_buffers()}
    module.load_state_dict(own)
    write_safetensors(HERE / f"{name}.safetensors", tensors)


def export(name, module, args, dynamic=None, decompose=False):
    program = torch.export.export(module, args, dynamic_shapes=dynamic)
    if decompose:
        program = program.run_decompositions()
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, torch.fx.GraphModule) else []:
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                node.meta.pop(key, None)
    torch.export.save(program, HERE / f"{name}.pt2")


def script(name, module):
    """Without *.debug_pkl."""
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(module), saved)
    saved.seek(0)
    reader = torch._C.PyTorchFileReader(saved)
    writer = torch._C.PyTorchFileWriter(str(HERE / f"{name}.pt"))
    for key in reader.get_all_records():
        if not key.endswith(".debug_pkl") and key not in ("version", ".data/serialization_id", ".data/version"):
            data = reader.get_record(key)
            writer.write_record(key, data, len(data))
    writer.write_end_of_file()


def main():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    if torch.__version__.startswith("2.11."):
        multihead, x = Multihead(), torch.randn(2, 5, 8)
        record("multihead_torch_2_11", multihead, (x,))
        export("multihead_torch_2_11", multihead, (x,))
        return
    batch = torch.export.Dim("batch", min=2, max=64)

    mlp, x = Mlp(), torch.randn(4, 3)
    record("mlp", mlp, (x,))
    export("mlp", mlp, (x,))
    export("mlp_functional", mlp, (x,), decompose=True)
    script("mlp", mlp)

    conv, x = Conv().eval(), torch.randn(5, 1, 4, 4)
    conv.norm.running_mean.normal_()
    record("conv", conv, (x,))
    export("conv", conv, (x,), dynamic={"x": {0: batch}})
    script("conv", conv)

    attention, x = Attention().eval(), torch.randn(2, 5, 4)
    record("attention", attention, (x,))
    export("attention", attention, (x,))
    script("attention", attention)

    args = ((torch.randn(4, 3), torch.randn(2)), torch.randn(2))
    record("structured", Structured(), args)
    export("structured", Structured(), args, dynamic=(({0: batch}, None), None))

    args = (torch.rand(3), torch.randn(4, 3), torch.tensor(3))
    flow = Flow()
    record("flow", flow, args)
    export("flow", flow, args)

    args = ((torch.randn(2, 3), torch.randn(3)),)
    module = Script()
    record("script", module, args)
    script("script", module)

    auto = torch.export.Dim.AUTO
    strided, x = Strided(), torch.randn(3, 1, 7, 9)
    record("strided", strided, (x,))
    export("strided", strided, (x,), dynamic={"x": {0: auto, 2: auto, 3: auto}})

    script("autocast", Cast())
    script("interface", Through())

    recurrent, x = Recurrent(), torch.randn(2, 5, 3)
    record("recurrent", recurrent, (x,))
    export("recurrent", recurrent, (x,))
    script("recurrent", recurrent)

    average, x = Average(), torch.randn(4, 3)
    record("average", average, (x,))
    export("average", average, (x,))
    export("average_functional", average, (x,), decompose=True)
    script("average", average)


if __name__ == "__main__":
    main()
