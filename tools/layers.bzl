"""The order of the layers. A package may depend on earlier ones only, and visibility enforces it.

A target of layer L that later layers may use has `visibility = ["//:from_L"]`.
"""

LAYERS = ["core", "batching", "autodiff", "nn_functional", "compile", "bindings"]

# They may use every layer; no layer may use them (that is, //:from_examples does not exist).
BESIDE = ["docs", "examples", "tools"]

def layer_package_groups():
    """Declares //:from_<layer>: the layer itself, those above it, and the folders beside."""
    for i, layer in enumerate(LAYERS):
        native.package_group(
            name = "from_" + layer,
            packages = ["//" + name + "/..." for name in LAYERS[i:] + BESIDE] + ["//"],
        )
