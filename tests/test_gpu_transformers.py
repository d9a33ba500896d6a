"""On a CUDA GPU: the needle model in bf16 answers with sparse prefill, by `generate` and compiled."""

import pytest
import torch

from flexprefill_fa import FlexPrefillConfig
from flexprefill_fa.tools.needle import MODEL_DIR
from flexprefill_fa.tools.needle.prompts import ANSWER_DIGITS, NeedlePrompt, build_prompt, is_correct

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")

CONFIG = FlexPrefillConfig(gamma=0.95, min_budget=512)


@pytest.fixture(scope="module")
def model():
    loaded = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.bfloat16)
    return loaded.to("cuda").eval()


def answers(model, tokenizer, prompts: list[NeedlePrompt], **options) -> list[bool]:
    """Generate for a left-padded batch; which answers are right."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, width - len(prompt.token_ids) :] = 1
    out = model.generate(
        input_ids=ids.cuda(),
        attention_mask=mask.cuda(),
        max_new_tokens=ANSWER_DIGITS,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    texts = [tokenizer.decode(row[width:].tolist()) for row in out]
    return [is_correct(text, prompt.answer) for text, prompt in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize("tokens", [4096, 16384, 32768])
def test_generate_answers_right(model, needle_tokenizer, tokens: int) -> None:
    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    prompts = [build_prompt(needle_tokenizer, tokens, seed=seed) for seed in range(4)]
    with enable_sparse_prefill(model, CONFIG, statistics="density") as handle:
        right = [answers(model, needle_tokenizer, [prompt])[0] for prompt in prompts]
        densities = [layer.density.mean().item() for layer in handle.statistics.values()]
    print({"tokens": tokens, "right": right, "density": sum(densities) / len(densities)})
    assert all(right)
    assert max(densities) < 0.95


def test_generate_of_a_left_padded_batch(model, needle_tokenizer) -> None:
    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    prompts = [build_prompt(needle_tokenizer, tokens, seed=tokens) for tokens in (8192, 3001, 6000, 8191)]
    with enable_sparse_prefill(model, CONFIG, statistics="density") as handle:
        assert all(answers(model, needle_tokenizer, prompts))
        assert all(layer.density.mean() < 0.95 for layer in handle.statistics.values())


def test_compiled_forward_is_sparse_with_one_graph(model, needle_tokenizer) -> None:
    from torch._dynamo.utils import counters

    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad(), enable_sparse_prefill(model, CONFIG, statistics="density") as handle:
        for index, tokens in enumerate((4096, 9001, 6000)):
            prompt = build_prompt(needle_tokenizer, tokens, seed=tokens)
            ids = torch.tensor([prompt.token_ids], device="cuda")

            def cache() -> dict:
                return {"past_key_values": transformers.DynamicCache(config=model.config)}

            eager = model(ids, **cache()).logits[:, -1]
            kept = [layer.kept_blocks.clone() for layer in handle.statistics.values()]
            before_it = counters["stats"]["unique_graphs"]  # the uncompiled call may have compiled its attention anew
            logits = compiled(ids, **cache()).logits[:, -1]
            assert counters["stats"]["unique_graphs"] - before_it == (1 if index == 0 else 0)
            for layer, (statistics, before) in enumerate(zip(handle.statistics.values(), kept, strict=True)):
                assert statistics.density.mean() < 0.95
                # bf16 rounds differently when compiled, so later layers see slightly other inputs
                assert (statistics.kept_blocks - before).abs().sum() <= 0.05 * before.sum(), layer
            assert logits.argmax(-1).item() == eager.argmax(-1).item()
            assert (logits - eager).abs().max() < 0.05 * eager.abs().max() + 0.1


@pytest.mark.parametrize("chunk", [None, 2048])
def test_compiled_generate_answers_right(model, needle_tokenizer, chunk: int | None) -> None:
    """Every prompt by the graphs of the first ones, batch 1 and a left-padded batch, in one piece and in chunks."""
    from torch._dynamo.utils import counters

    from flexprefill_fa.integrations.transformers import compile_prefill, enable_sparse_prefill

    torch._dynamo.reset()
    lengths = (8192,) if chunk else (4096, 8192, 16384, 32768)
    with enable_sparse_prefill(model, CONFIG, statistics="density") as handle, compile_prefill(model):
        before = None
        for tokens in lengths:
            prompt = build_prompt(needle_tokenizer, tokens, seed=tokens)
            assert answers(model, needle_tokenizer, [prompt], prefill_chunk_size=chunk) == [True]
            assert all(layer.density.mean() < 0.95 for layer in handle.statistics.values())
            graphs = counters["stats"]["unique_graphs"]
            assert before in (None, graphs), "a graph of its own for another length"
            before = graphs
        if not chunk:
            prompts = [build_prompt(needle_tokenizer, tokens, seed=tokens) for tokens in (8192, 3001, 6000, 8191)]
            assert all(answers(model, needle_tokenizer, prompts))
            assert all(layer.density.mean() < 0.95 for layer in handle.statistics.values())


def test_a_static_cache_with_compiled_decode(model, needle_tokenizer) -> None:
    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    torch._dynamo.reset()
    with enable_sparse_prefill(model, CONFIG, statistics="density") as handle:
        prompt = build_prompt(needle_tokenizer, 8192, seed=0)
        assert answers(model, needle_tokenizer, [prompt], cache_implementation="static") == [True]
        assert all(layer.density.mean() < 0.95 for layer in handle.statistics.values())


@torch.no_grad()
def test_prefills_as_cuda_graphs(model, needle_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same logits as without, which are not the dense model's, from one graph for all layers."""
    from flexprefill_fa import PeakPrefillConfig, graph_cache
    from flexprefill_fa.integrations.transformers import enable_sparse_prefill

    monkeypatch.setattr(graph_cache, "GRAPHS", graph_cache.GraphCache())
    prompts = [build_prompt(needle_tokenizer, 4096, seed=seed).token_ids for seed in range(3)]

    def logits(ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids], device="cuda"), logits_to_keep=64).logits

    dense = [logits(ids) for ids in prompts]
    with enable_sparse_prefill(model, PeakPrefillConfig()):
        expected = [logits(ids) for ids in prompts]
    with enable_sparse_prefill(model, PeakPrefillConfig(), graph="auto"):
        found = [logits(ids) for ids in prompts]
    assert len(graph_cache.GRAPHS) == 1
    for one, other, whole in zip(found, expected, dense, strict=True):
        assert torch.equal(one, other) and not torch.equal(one, whole)
    graph_cache.GRAPHS.release()
