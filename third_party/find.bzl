"""Helpers shared by the repository rules that find a dependency on the machine."""

PYTHON_ENVIRON = ["TORCHLIFT_PYTHON", "PATH"]

def explain(what, tried, how):
    """Fails with a message of one shape: what is missing, where it was sought, how to get it."""
    fail("\n\ntorchlift: {} was not found.\n  Looked in: {}\n  To get it: {}\n".format(
        what,
        "; ".join(tried),
        how,
    ))

def find_python(ctx):
    """The Python interpreter that owns torch: TORCHLIFT_PYTHON, else .venv of the checkout, else PATH."""
    named = ctx.os.environ.get("TORCHLIFT_PYTHON", "")
    if named:
        return named
    venv = ctx.path(Label("//:WORKSPACE")).dirname.get_child(".venv").get_child("bin").get_child("python")
    if venv.exists:
        return str(venv)
    found = ctx.which("python3")
    return str(found) if found else None

def ask_python(ctx, python, code):
    """Standard output of `python -c code`, stripped; None if it failed."""
    if not python:
        return None
    result = ctx.execute([python, "-c", code])
    return result.stdout.strip() if result.return_code == 0 else None

def find_header(ctx, header, environ_prefix = None):
    """The include folder that holds `header`: under $environ_prefix, /usr/local or /usr; else None."""
    prefixes = ["/usr/local", "/usr"]
    if environ_prefix and ctx.os.environ.get(environ_prefix):
        prefixes = [ctx.os.environ[environ_prefix]]
    for prefix in prefixes:
        if ctx.path(prefix + "/include/" + header).exists:
            return prefix + "/include"
    return None

def find_library(ctx, include_dir, file_name):
    """The folder beside `include_dir` that holds `file_name`; None if there is none."""
    prefix = include_dir[:-len("/include")]
    for lib in ["lib", "lib64", "lib/x86_64-linux-gnu", "lib/aarch64-linux-gnu"]:
        if ctx.path(prefix + "/" + lib + "/" + file_name).exists:
            return prefix + "/" + lib
    return None
