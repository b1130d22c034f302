"""No dependency points from a layer to a later one, in the graph that Bazel knows."""

import re

import bazel

LAYERS = re.search(r"^LAYERS = \[(.*)\]$", (bazel.ROOT / "tools/layers.bzl").read_text(), re.M)
LAYERS = [name.strip().strip('"') for name in LAYERS.group(1).split(",")]
EDGE = re.compile(r'^\s*"(?P<source>//[^"]*)" -> "(?P<target>//[^"]*)"')


def layer(label):
    """The number of a label's layer; None for folders beside them."""
    top = label[2:].split("/")[0].split(":")[0]
    return LAYERS.index(top) if top in LAYERS else None


def backward(lines):
    """The edges of a dot graph that point to a later layer, or from a layer to a folder beside."""
    found = []
    for line in lines:
        edge = EDGE.match(line)
        if not edge:
            continue
        source, target = layer(edge["source"]), layer(edge["target"])
        beside = target is None and re.match(r"//(examples|docs|:torchlift)", edge["target"])
        if source is not None and (beside or (target is not None and target > source)):
            found.append((edge["source"], edge["target"]))
    return found


def test_no_arrow_points_back():
    # Rules only: a package group lists its packages, which is no dependency.
    lines = bazel.query('kind("rule", //...)', "--output=graph", "--nograph:factored", "--noimplicit_deps")
    edges = [(layer(e["source"]), layer(e["target"])) for e in map(EDGE.match, lines) if e]
    # The graph is read rightly: it has the arrows that must be there.
    assert (LAYERS.index("batching"), LAYERS.index("core")) in edges
    assert (LAYERS.index("autodiff"), LAYERS.index("core")) in edges
    assert backward(lines) == []


def test_a_planted_arrow_is_seen():
    assert backward(['  "//core:level" -> "//batching:vmap"']) == [("//core:level", "//batching:vmap")]
    assert backward(['  "//core:level" -> "//:torchlift"'])
    assert backward(['  "//batching/rules:conv" -> "//core:level"']) == []
    assert backward(['  "//batching/rules:conv" -> "//batching:vmap"']) == []


def seen_by(viewer, layer_name):
    """The rules of a layer that `viewer` may depend on, apart from those open to all the world."""
    inside = f"//{layer_name}/..."
    expression = f'visible({viewer}, {inside}) except attr("visibility", "//visibility:public", {inside})'
    return bazel.query(expression)


def test_visibility_enforces_the_order():
    assert seen_by("//batching", "core")
    assert seen_by("//autodiff", "core") and seen_by("//autodiff", "batching")
    assert seen_by("//core", "batching") == []
    assert seen_by("//core", "autodiff") == []
    assert seen_by("//batching", "autodiff") == []
