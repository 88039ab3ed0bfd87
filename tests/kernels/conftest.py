"""The benches as modules: the meter of memory of the sweep's is the tests' too."""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "scaled_lse_sweep.py"


@pytest.fixture(scope="session")
def bench():
    """kernels/bench/scaled_lse_sweep.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("bench_scaled_lse_sweep", BENCH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def decode():
    """kernels/bench/decode.py with the modules beside it, which are in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH.parent))
        import decode

        yield decode
    for name in ("scaled_lse_sweep", *(file.stem for file in BENCH.parent.glob("decode*.py"))):
        sys.modules.pop(name, None)
