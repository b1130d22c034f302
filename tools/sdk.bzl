"""Lists what a torchlift SDK is made of: our headers and archives below some targets, nobody else's."""

load("@rules_cc//cc:defs.bzl", "CcInfo")

def _ours(label):
    return label.workspace_name == ""

def _headers(dep):
    # Not generated ones: those are copies under an include prefix.
    return [
        f
        for f in dep[CcInfo].compilation_context.headers.to_list()
        if f.is_source and f.owner and _ours(f.owner)
    ]

def _archives(dep):
    found = []
    for linker_input in dep[CcInfo].linking_context.linker_inputs.to_list():
        if not _ours(linker_input.owner):
            continue
        for library in linker_input.libraries:
            archive = library.pic_static_library or library.static_library
            if archive:
                found.append(archive)
    return found

def _tl_sdk_manifest_impl(ctx):
    headers = depset([f for dep in ctx.attr.deps for f in _headers(dep)]).to_list()
    archives = depset([f for dep in ctx.attr.deps for f in _archives(dep)]).to_list()
    manifest = ctx.actions.declare_file(ctx.label.name + ".txt")
    ctx.actions.write(manifest, "".join(
        ["header {}\n".format(f.path) for f in headers] +
        ["archive {}\n".format(f.path) for f in archives],
    ))
    return [DefaultInfo(files = depset([manifest] + archives))]

tl_sdk_manifest = rule(
    implementation = _tl_sdk_manifest_impl,
    attrs = {"deps": attr.label_list(providers = [CcInfo])},
    doc = "Builds the archives below `deps` and writes <name>.txt, a line `header PATH` or `archive PATH` each.",
)
