"""Pictures of fx graphs, by Graphviz where it is there, and by a plain layout where it is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import warnings
from typing import Any

import torch

from torchlift._errors import TransformError

_COLORS = {"placeholder": "#dbe9ff", "output": "#ffe3d1", "get_attr": "#fff5c2"}
_WIDTH, _HEIGHT, _GAP = 190, 44, 28


def _label(node: "torch.fx.Node") -> "tuple[str, str]":
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    kind = "" if shape is None else f"{str(dtype).rpartition('.')[2]}{list(shape)}"
    target = "" if node.op in ("placeholder", "output") else str(node.target)
    return node.name, " ".join(part for part in (target, kind) if part)


def dot_text(module: "torch.fx.GraphModule", name: str = "fx_graph") -> str:
    """The graph in Graphviz's language."""
    lines = [f'digraph "{name}" {{', '  node [shape=box style="rounded,filled" fontname=sans];']
    for node in module.graph.nodes:
        first, second = _label(node)
        text = f"{first}\\n{second}" if second else first
        text = text.replace('"', "'")
        color = _COLORS.get(node.op, "#eeeeee")
        lines.append(f'  "{node.name}" [label="{text}" fillcolor="{color}"];')
        lines += [f'  "{source.name}" -> "{node.name}";' for source in node.all_input_nodes]
    return "\n".join([*lines, "}"]) + "\n"


def svg_text(module: "torch.fx.GraphModule") -> str:
    """The graph as a picture: each node one row below the last of what it reads."""
    places: "dict[torch.fx.Node, tuple[int, int]]" = {}
    filled: "list[int]" = []
    for node in module.graph.nodes:
        row = 1 + max((places[source][0] for source in node.all_input_nodes), default=-1)
        while len(filled) <= row:
            filled.append(0)
        places[node] = (row, filled[row])
        filled[row] += 1
    wide, high = max(filled, default=1) * (_WIDTH + _GAP), len(filled) * (_HEIGHT + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide + _GAP}" height="{high + _GAP}" '
        f'font-family="sans-serif" font-size="11">'
    ]
    for node, (row, column) in places.items():
        for source in node.all_input_nodes:
            (x1, y1), (x2, y2) = _corner(*places[source]), _corner(row, column)
            parts.append(
                f'<line x1="{x1 + _WIDTH // 2}" y1="{y1 + _HEIGHT}" x2="{x2 + _WIDTH // 2}" '
                f'y2="{y2}" stroke="#888888"/>'
            )
    parts += [_box(node, *_corner(*place)) for node, place in places.items()]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _corner(row: int, column: int) -> "tuple[int, int]":
    return _GAP + column * (_WIDTH + _GAP), _GAP + row * (_HEIGHT + _GAP)


def _box(node: "torch.fx.Node", x: int, y: int) -> str:
    import html

    first, second = (html.escape(text) for text in _label(node))
    color = _COLORS.get(node.op, "#eeeeee")
    return (
        f'<rect x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="{color}" '
        f'stroke="#666666"/><text x="{x + 8}" y="{y + 18}">{first}</text>'
        f'<text x="{x + 8}" y="{y + 34}" fill="#555555">{second}</text>'
    )


def draw_graph(
    traced: "torch.fx.GraphModule",
    fname: str,
    figname: str = "fx_graph",
    clear_meta: bool = True,
    prog: "str | None" = None,
    parse_stack_trace: bool = False,
    dot_graph_shape: "str | None" = None,
) -> None:
    """Draws an fx graph into a file, of the kind that its name says; without an ending, an svg.

    With Graphviz's `dot` any of its formats will do. Without it, .dot and .svg are written by our
    own means, and for other endings a .dot file beside, with a warning.

    Args:
        traced: the module.
        fname: the file.
        figname: the graph's name.
        clear_meta: leaves shapes and dtypes out.
        prog: the program of Graphviz, in place of `dot`.
        parse_stack_trace, dot_graph_shape: for functorch's signature; without meaning.

    >>> import os, tempfile, torch, torchlift
    >>> path = os.path.join(tempfile.mkdtemp(), "graph.svg")
    >>> torchlift.compile.draw_graph(torchlift.make_fx(torch.sin)(torch.zeros(3)), path)
    >>> "sin_default" in open(path).read()
    True
    """
    if not isinstance(traced, torch.fx.GraphModule):
        raise TransformError(
            f"[draw_graph] got a {type(traced).__name__} in place of a torch.fx.GraphModule."
        )
    module = _without_meta(traced) if clear_meta else traced
    base, ending = os.path.splitext(fname)
    ending = ending[1:] or "svg"
    path = f"{base}.{ending}"
    program = shutil.which(prog or "dot")
    if ending == "dot":
        _write(path, dot_text(module, figname))
    elif program is not None:
        text = dot_text(module, figname).encode()
        subprocess.run([program, f"-T{ending}", "-o", path], input=text, check=True)
    elif ending == "svg":
        _write(path, svg_text(module))
    else:
        _write(f"{base}.dot", dot_text(module, figname))
        warnings.warn(
            f"[draw_graph] Graphviz ({prog or 'dot'}) was not found, so {base}.dot was written in "
            f"place of {path}. Install graphviz, or give a name that ends in .svg.",
            stacklevel=2,
        )


def _without_meta(module: "torch.fx.GraphModule") -> "torch.fx.GraphModule":
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        node.meta = {}
    return torch.fx.GraphModule(module, graph)


def _write(path: str, text: "Any") -> None:
    with open(path, "w") as file:
        file.write(text)
