"""generation: seeded, ordered, and the same text as `transformers`' own."""

import pytest
import torch
from conftest import CONTEXT, randomize_B
from transformers import GPT2LMHeadModel

from adapters.peft_layout import save_adapter
from data.backbones import load_causal_lm, load_tokenizer
from experiments.generate import GenerateOptions, base_model, generate, read_prompts
from fast.generation import Sampling
from machine.errors import UserError
from model import LoRAOptions, TextClassifier, inject_lora

PROMPTS = ["The cat", "A dog ran to", "mat"]


def texts(folder, prompts=("The cat sat",), greedy=False, temperature=1.0, top_k=0, top_p=1.0, seed=12345, **options
          ) -> list[str]:
    return list(generate(list(prompts), GenerateOptions(str(folder), **{
        "max_new_tokens": 12, "sampling": Sampling(greedy, temperature, top_k, top_p, seed), **options})))


def saved_adapter(gpt2_folder, out, trained: bool):
    lm = load_causal_lm(str(gpt2_folder))
    torch.manual_seed(3)
    classifier = TextClassifier.from_causal_lm(lm, 2)
    inject_lora(classifier.net, LoRAOptions(rank=4, targets=("q", "v", "mlp")))
    if trained:
        randomize_B(classifier.net, std=0.3)
    out.mkdir()
    save_adapter(classifier, out, str(gpt2_folder))
    return out


def test_the_same_seed_gives_the_same_text_and_another_seed_another(gpt2_folder):
    first = texts(gpt2_folder)
    assert texts(gpt2_folder) == first
    assert texts(gpt2_folder, seed=54321) != first
    assert first[0].startswith("The cat sat") and len(first[0]) > len("The cat sat")


def test_greedy_text_equals_the_librarys_own_and_does_not_depend_on_the_seed(gpt2_folder):
    lm, tokenizer = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval(), load_tokenizer(str(gpt2_folder))
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        for _ in range(12):  # without a cache, and without `generate`
            ids = torch.cat([ids, lm(ids).logits[:, -1:].argmax(-1)], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        library = lm.generate(torch.tensor([tokenizer(prompt).input_ids]), max_new_tokens=12, do_sample=False,
                              pad_token_id=0)
        assert torch.equal(library, ids)
        expected.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    assert len(set(expected)) == len(PROMPTS)
    assert texts(gpt2_folder, PROMPTS, greedy=True, num_samples=1) == expected
    assert texts(gpt2_folder, PROMPTS, greedy=True, seed=1) == expected


def test_one_likeliest_token_or_a_cold_temperature_is_greedy(gpt2_folder):
    greedy = texts(gpt2_folder, greedy=True)
    assert texts(gpt2_folder, top_k=1) == texts(gpt2_folder, temperature=1e-4) == texts(gpt2_folder, top_p=1e-9) == greedy
    assert texts(gpt2_folder) != greedy


def test_a_fresh_adapter_gives_exactly_the_bases_text_and_a_trained_one_does_not(gpt2_folder, tmp_path):
    fresh = saved_adapter(gpt2_folder, tmp_path / "fresh", trained=False)
    trained = saved_adapter(gpt2_folder, tmp_path / "trained", trained=True)
    assert base_model(trained) == str(gpt2_folder)
    for greedy in (True, False):
        base = texts(gpt2_folder, PROMPTS, greedy=greedy)
        assert texts(gpt2_folder, PROMPTS, greedy=greedy, adapter=trained) != base
        assert texts(gpt2_folder, PROMPTS, greedy=greedy, adapter=fresh) == base


def test_samples_come_prompt_by_prompt_in_order(gpt2_folder):
    samples = texts(gpt2_folder, PROMPTS, num_samples=3)
    assert [sample.startswith(prompt) for prompt in PROMPTS for sample in samples] == [
        row // 3 == which for which in range(3) for row in range(9)]
    assert len(set(samples)) == 9  # samples of one prompt differ
    assert texts(gpt2_folder, PROMPTS, num_samples=3, batch_size=2) == samples
    assert samples[:3] == texts(gpt2_folder, PROMPTS[:1], num_samples=3)


def test_an_empty_prompt_starts_from_the_beginning_of_text(gpt2_folder):
    lm, tokenizer = GPT2LMHeadModel.from_pretrained(gpt2_folder).eval(), load_tokenizer(str(gpt2_folder))
    first = lm(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].argmax()
    assert texts(gpt2_folder, [""], greedy=True, max_new_tokens=1) == [tokenizer.decode([first], skip_special_tokens=True)]


def test_the_prompt_and_the_new_tokens_must_fit_the_context(gpt2_folder):
    prompt = "The cat sat"
    length = len(load_tokenizer(str(gpt2_folder))(prompt).input_ids)
    assert texts(gpt2_folder, [prompt], max_new_tokens=CONTEXT - length)
    with pytest.raises(UserError, match=rf"^prompt of {length} tokens plus --max-new-tokens {CONTEXT - length + 1}: the "
                                        rf"model's context holds {CONTEXT}$"):
        texts(gpt2_folder, [prompt], max_new_tokens=CONTEXT - length + 1)


def test_a_prompt_too_long_is_refused_before_anything_is_generated(gpt2_folder):
    samples = generate(["The cat", "mat " * 40], GenerateOptions(str(gpt2_folder), max_new_tokens=2,
                                                                sampling=Sampling(greedy=True)))
    with pytest.raises(UserError, match="prompt of "):
        next(samples)


def test_a_damaged_adapter_is_refused(gpt2_folder, tmp_path):
    with pytest.raises(UserError, match="adapter_config.json: cannot be read"):
        texts(gpt2_folder, adapter=tmp_path)


@pytest.mark.parametrize("data, prompts", [
    (b"one\ntwo\n", ["one", "two"]), (b"one\r\n\r\n  \n two \r\n", ["one", " two "]), ("é\u2028x\n".encode(), ["é\u2028x"]),
    (b"no newline", ["no newline"])])
def test_a_prompt_file_holds_one_prompt_a_line(tmp_path, data, prompts):
    (tmp_path / "prompts.txt").write_bytes(data)
    assert read_prompts(tmp_path / "prompts.txt") == prompts


@pytest.mark.parametrize("data, message", [
    (None, r"cannot be read \(No such file or directory\)"), (b"", "no prompt in it; expected one a line"),
    (b"\n \r\n\t\n", "no prompt in it; expected one a line"), (b"ok\n\xff\n", r"not UTF-8 \(byte 3\)")])
def test_a_prompt_file_without_prompts_is_named(tmp_path, data, message):
    path = tmp_path / "prompts.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{path}: {message}$"):
        read_prompts(path)


def test_a_folder_as_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be read"):
        read_prompts(tmp_path)
