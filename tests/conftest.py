"""Common to all tests: Triton by its interpreter without a GPU, fixed seeds, needle model and recipe."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Containers often switch bytecode off; then each of the many processes compiles torch and transformers from source.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")  # it costs graphs as small as these more than it saves
import torch  # noqa: E402

# pytest listens to every logger that does not propagate; torch.compile then writes its trace for it.
logging.getLogger("torch.__trace").propagate = True

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # one kernel per graph: a pool of workers has no use

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    threads = max(1, (os.cpu_count() or 1) // workers)  # not all cores for each of them
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start; the kernels of CPUs depend on it

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel
    from vllm_stubs import FakeVllm

    from bench.needle.corpus import Corpus


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_collection_finish() -> None:
    """What torch and transformers made at import stays: looking it through again takes a tenth of a compilation."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> None:
    if not HAS_GPU and importlib.util.find_spec("triton"):
        from interpreter import make_quick

        make_quick()


@pytest.fixture(scope="session", autouse=True)
def quick_compiler() -> None:
    """Each compilation empties the processor's caches to time its guards, for a log."""
    from torch._dynamo import guards

    setattr(guards, "profile_guard_manager", lambda *_: 0.0)  # noqa: B010 (not exported, for pyright)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_decided() -> None:
    """What a test puts in the place of a function is asked."""
    if (calls := sys.modules.get("flexprefill_fa.calls")) is not None:
        calls._known.clear()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small operations: threads that wait for each other cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gpu_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 in Triton's interpreter as on a GPU: by itself it cuts fp32 off, and multiplies bf16 as integers."""
    import numpy as np
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, create_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounded(self: InterpreterBuilder, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        nearest = torch.from_numpy(np.asarray(src.data).copy()).to(torch.bfloat16)
        return TensorHandle(nearest.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return create_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


@pytest.fixture(params=["0.24.0", "0.33.0"])
def vllm(request: pytest.FixtureRequest) -> Iterator[FakeVllm]:
    """Stand-ins for vLLM's modules as a release has them, with our backend imported over them."""
    from vllm_releases import RELEASES
    from vllm_stubs import fake_vllm

    with fake_vllm(RELEASES[request.param]) as fake:
        yield fake


@pytest.fixture(scope="session")
def needle_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer

    from flexprefill_fa.tools.needle import MODEL_DIR

    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="session")
def needle_model() -> PreTrainedModel:
    """The trained needle model in fp32; tests leave it as they found it."""
    from transformers import AutoModelForCausalLM

    from flexprefill_fa.tools.needle import MODEL_DIR

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval()


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """Of a few files."""
    from needle_runs import FILES

    from bench.needle.corpus import build_corpus

    return build_corpus(FILES)


@pytest.fixture(scope="session")
def whole_run(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that a needle run made; tests leave it as they found it."""
    from needle_runs import run_in

    folder = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tests' own fixture comes later
    run_in(folder, corpus)
    torch.set_num_threads(threads)
    return folder
