"""generation: greedy texts are `transformers`' own, samples follow their distribution, a row depends on itself alone."""
from dataclasses import asdict, replace

import pytest
import torch
from conftest import CONTEXT, FAMILIES, SIZES, VOCAB
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import sampling as sampling_module
import speed
from fast import generation, onepass
from fast.generation import FastSampling
from fast.installation import install
from fast.matmul import set_precision
from sampling import Sampling, uniforms

CONFIGS = {
    "gpt2": lambda: GPT2Config(**SIZES["gpt2"][2], vocab_size=VOCAB, initializer_range=0.2),
    "llama": lambda: LlamaConfig(**SIZES["llama"][2], vocab_size=VOCAB, initializer_range=0.2, pad_token_id=0),
    # not known here: row by row through the library
    "neox": lambda: GPTNeoXConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, max_position_embeddings=CONTEXT, initializer_range=0.2)}
KNOWN = ("gpt2", "llama")
DECODERS = [name for name, sizes in FAMILIES.items() if "num_key_value_heads" in sizes]
SEEDED = Sampling(seed=1)
PROMPTS = [[5], [1, 2, 3, 4], [7, 7, 9], [1, 2, 3, 4], [5], [8, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 9]]


def language_model(architecture: str):
    torch.manual_seed(0)
    config = CONFIGS[architecture]() if architecture in CONFIGS else AutoConfig.for_model(
        architecture, vocab_size=VOCAB, initializer_range=0.2, pad_token_id=0, **FAMILIES[architecture])
    lm = AutoModelForCausalLM.from_config(config).eval()
    for name, p in lm.named_parameters():
        if name.endswith("norm.weight") or "ln_" in name and name.endswith("weight"):
            torch.nn.init.normal_(p, 1.0, 0.2)
    install(lm)
    return lm


def texts(lm, prompts=PROMPTS, sampling=SEEDED, **options) -> list[list[int]]:
    return list(speed.sample_tokens(lm, prompts, sampling, **{"max_new_tokens": 12, **options}))


def library_texts(lm, end: int) -> list[list[int]]:
    rows = [lm.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                        max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=0)[0].tolist()
            for prompt in PROMPTS]
    return [row[len(prompt):] for row, prompt in zip(rows, PROMPTS, strict=True)]


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_texts_are_the_librarys_own(architecture, batch_size):
    lm = language_model(architecture)
    end = library_texts(lm, end=VOCAB)[1][4]  # so that rows end at different times
    expected = library_texts(lm, end)
    assert len({len(text) for text in expected}) > 1 and len(set(map(tuple, expected))) > 3
    assert texts(lm, end={end}, sampling=Sampling(greedy=True), batch_size=batch_size) == expected


@pytest.mark.parametrize("short", [0, 12, 100])  # never, until texts are longer, always
@pytest.mark.parametrize("architecture", KNOWN)
def test_either_way_of_computing_attention_gives_the_librarys_texts(architecture, short, monkeypatch):
    computed, attend = [], onepass.attend
    monkeypatch.setattr(onepass, "attend", lambda *args: computed.append(1) or attend(*args))
    monkeypatch.setattr(generation, "SHORT", short)
    lm = language_model(architecture)
    texts(lm, [[7]], sampling=Sampling(greedy=True))  # no token of a prompt is computed without a new one
    assert bool(computed) == (short > 0 and onepass.available())
    assert texts(lm, end={VOCAB}, sampling=Sampling(greedy=True), batch_size=3) == library_texts(lm, VOCAB)


@pytest.mark.parametrize("architecture", DECODERS)
def test_windows_biases_and_norms_of_heads_give_the_librarys_texts(architecture):
    lm = language_model(architecture)
    assert generation.takes(lm) == (architecture != "gemma2")  # its scores and logits have a cap
    assert texts(lm, end={VOCAB}, sampling=Sampling(greedy=True), batch_size=3) == library_texts(lm, VOCAB)


@pytest.mark.parametrize("architecture", KNOWN)
def test_known_architectures_do_not_go_through_the_library(architecture, monkeypatch):
    monkeypatch.setattr(sampling_module, "sample_tokens", None)
    assert len(texts(language_model(architecture))) == len(PROMPTS)


def test_settings_that_only_the_library_knows_are_left_to_it():
    lm = language_model("gpt2")
    plain = texts(lm, sampling=Sampling(greedy=True))
    assert len(set(plain[0])) < 12
    lm.generation_config.repetition_penalty = 100.0
    assert all(len(set(text)) == 12 for text in texts(lm, sampling=Sampling(greedy=True)))


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("sampling", [SEEDED, Sampling(top_k=5, temperature=0.7, seed=1), Sampling(top_p=0.8, seed=1)])
def test_a_row_depends_on_the_seed_and_its_number_alone(architecture, sampling):
    lm = language_model(architecture)
    together = texts(lm, sampling=sampling)
    assert together == texts(lm, sampling=sampling, batch_size=2)
    assert together == [*texts(lm, PROMPTS[:3], sampling=sampling), *texts(lm, PROMPTS[3:], sampling=sampling, first_row=3)]
    assert together[1] != together[3] and together[0] != together[4]  # the same prompts
    assert together != texts(lm, sampling=replace(sampling, seed=2))


def test_random_numbers_do_not_depend_on_how_many_are_asked_for():
    assert uniforms(1, 2, 3) == uniforms(1, 2, 5)[:3]
    assert len({*uniforms(1, 2, 5), *uniforms(2, 1, 5), *uniforms(1, 3, 5)}) == 15


def library_distribution(logits, sampling: Sampling) -> torch.Tensor:
    scores = logits / 1.0
    for warper in ([TemperatureLogitsWarper(sampling.temperature)]
                   + ([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else [])
                   + ([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else [])):
        scores = warper(None, scores)
    return scores.softmax(-1)


@pytest.mark.parametrize("kind", [Sampling, FastSampling])
@pytest.mark.parametrize("sampling", [
    Sampling(), Sampling(temperature=0.5), Sampling(top_k=4), Sampling(top_p=0.7), Sampling(top_k=1), Sampling(top_p=1e-9),
    Sampling(temperature=1.5, top_k=9, top_p=0.6)])
@pytest.mark.parametrize("block", [256, 8, 7])  # one, five whole ones, five and a part
def test_tokens_are_chosen_by_the_librarys_distribution(kind, sampling, block, monkeypatch):
    """Uniform numbers in equal steps choose each token as often as its probability says, to within a step."""
    monkeypatch.setattr(generation, "BLOCK", block)
    steps = 2000
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 2
    expected = library_distribution(logits, sampling)
    uniform = (torch.arange(steps) + 0.5) / steps
    for row, p in zip(logits, expected, strict=True):
        chosen = kind(**asdict(sampling)).choose(row.expand(steps, -1).clone(), uniform)
        assert (chosen.bincount(minlength=40) / steps - p).abs().max() < 2 / steps


@pytest.mark.parametrize("kind", [Sampling, FastSampling])
@pytest.mark.parametrize("block", [256, 8, 7, 1])
def test_the_likeliest_token_is_numpys(kind, block, monkeypatch):
    monkeypatch.setattr(generation, "BLOCK", block)
    logits = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    chosen = kind(greedy=True).choose(logits.clone(), torch.zeros(500))
    assert chosen.tolist() == logits.numpy().argmax(-1).tolist() and len(chosen.unique()) == 40


def test_the_whole_sum_leads_to_the_last_one_with_a_probability():
    p = torch.tensor([[0.25, 0.5, 0.0, 0.0], [0.0, 0.0, 0.25, 0.25]])
    index, rest = generation._invert(p, p.sum(-1, keepdim=True))
    assert index.tolist() == [[1], [3]]
    torch.testing.assert_close(rest, torch.tensor([[0.5], [0.25]]))
    assert generation._invert(p, torch.zeros(2, 1))[0].tolist() == [[0], [2]]


@pytest.mark.parametrize("kind", [Sampling, FastSampling])
@pytest.mark.parametrize("block", [256, 2, 1])
def test_the_largest_uniform_number_chooses_no_impossible_token(kind, block, monkeypatch):
    monkeypatch.setattr(generation, "BLOCK", block)
    logits = torch.tensor([[0.0, 1.0, -200.0]])
    almost = torch.tensor([1 - 2 ** -24])
    assert kind().choose(logits.clone(), almost).item() == 1
    assert kind().choose(logits.clone(), torch.zeros(1)).item() == 0


@pytest.mark.parametrize("architecture", KNOWN)
def test_finished_rows_make_room_for_waiting_ones(architecture, monkeypatch):
    """No step computes a finished row, and the batch is as full as it can be."""
    lm, sizes, plain = language_model(architecture), [], generation._Batch.step
    monkeypatch.setattr(generation._Batch, "step",
                        lambda self, sampling: (sizes.append(len(self.rows)), plain(self, sampling)))
    end = set(range(0, VOCAB, 4))
    found = texts(lm, [[5]] * 20, end=end, batch_size=4)
    lengths = list(map(len, found))
    assert sum(sizes) == sum(lengths) < 20 * 12 and len(set(lengths)) > 2
    assert set(sizes[:len(sizes) // 2]) == {4}
    assert all(text[-1] in end or len(text) == 12 for text in found)


def test_progress_counts_every_token_that_was_asked_for():
    counted = []
    texts(language_model("gpt2"), end=set(range(0, VOCAB, 4)), progress=counted.append)
    assert sum(counted) == 12 * len(PROMPTS)


@pytest.mark.parametrize("architecture", KNOWN)
def test_bf16_weights_draw_texts_too(architecture):
    lm = language_model(architecture).requires_grad_(False)
    exact = texts(lm, sampling=Sampling(greedy=True), max_new_tokens=1)
    set_precision(lm, "bf16")
    assert lm.get_output_embeddings().weight.dtype == torch.bfloat16
    rough = texts(lm, sampling=Sampling(greedy=True), max_new_tokens=1)
    assert sum(a == b for a, b in zip(exact, rough, strict=True)) >= len(PROMPTS) - 2


@pytest.mark.parametrize("architecture", KNOWN)
@pytest.mark.parametrize("sampling", [Sampling(seed=1), Sampling(top_k=5, top_p=0.9, seed=3), Sampling(greedy=True)])
def test_the_reference_samples_the_same_texts(architecture, sampling):
    lm = language_model(architecture)
    fast = texts(lm, sampling=sampling, end={VOCAB - 1})
    assert fast == list(sampling_module.sample_tokens(lm, PROMPTS, sampling, max_new_tokens=12, end={VOCAB - 1}))
    assert len(set(map(tuple, fast))) > 3


def test_no_prompts_give_no_texts():
    assert texts(language_model("gpt2"), []) == []
