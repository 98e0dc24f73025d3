"""What works with each text classifier of `transformers`: toy checkpoints of all of them, run through run.py.

    python benchmarks/architectures.py --json > benchmarks/results/architectures.json
    python benchmarks/summarise.py                   # writes the table of docs/architectures.md from that file

Each architecture has two blocks of 32 channels, random weights and a tokenizer of ten words; one of the sentences is longer
than any context. An outcome begins with "works", or is the one line with which run.py refuses (exit status 2). Anything
else, a traceback above all, begins with FAILED and ends the program with exit status 1.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "tests")]

import torch  # noqa: E402
import toy  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402
from transformers.models.auto.modeling_auto import (  # noqa: E402
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from adapters.peft_layout import load_adapter  # noqa: E402
from benchmarks import common  # noqa: E402
from data.backbones import is_decoder  # noqa: E402
from experiments.evaluate import load_finetuned  # noqa: E402
from machine.errors import UserError  # noqa: E402
from model import load_classifier, lora_layers  # noqa: E402

FAILED, TOLERANCE = "FAILED", 1e-5

PAD, VOCAB, CONTEXT = 1, 24, 64
SIZES = {
    "vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.2,
    "init_std": 0.2,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
                     "num_decoder_layers"), 2),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "input_embedding_size",
                     "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim",
                     "dff", "feed_forward_size", "d_inner"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
}
TEXT = {key: SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range",
                                    "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size",
                                    "max_position_embeddings", "num_key_value_heads", "head_dim")}
VISION = {"num_hidden_layers": 1, "depth": 1, "hidden_size": 32, "num_attention_heads": 2, "num_heads": 2,
          "intermediate_size": 48, "image_size": 28, "patch_size": 14, "out_hidden_size": 32}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**LATENT, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
            "first_k_dense_replace": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "layer_types": ["linear_attention", "full_attention"]}
# What an architecture wants beside these sizes (None: the size is not given).
WANTS: dict[str, dict] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3"), DEEPSEEK), "mistral4": {**DEEPSEEK, "head_dim": 16},
    "minicpm3": {**LATENT, "num_key_value_heads": 4},
    "bigbird_pegasus": {"block_size": 8}, "canine": {"num_hash_buckets": 64, "local_transformer_stride": 16},
    "esmc": {"num_key_value_heads": 4}, "falcon": {"head_dim": None},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "longformer": {"attention_window": 8}, "layoutlm": {"max_2d_position_embeddings": 32},
    "luke": {"entity_vocab_size": 8, "entity_emb_size": 8}, "markuplm": {"max_depth": 4, "xpath_unit_hidden_size": 4},
    "mobilebert": {"intra_bottleneck_size": 16, "true_hidden_size": 16},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_self_attends_per_block": 2, "num_cross_attention_heads": 2,
                  "num_self_attention_heads": 2},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "attention_head_size": 8, "num_buckets": 4,
                 "is_decoder": False},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "xlnet": {"max_position_embeddings": None, "d_head": 8}, "xmod": {"default_language": "en_XX"},
    "t5": {"decoder_start_token_id": 1},
    "layoutlmv3": {"max_2d_position_embeddings": 32, "coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48, "max_2d_position_embeddings": 32},
    "tapas": {"type_vocab_sizes": [3, 8, 8, 2, 2, 8, 8]},
    "qwen2_moe": {"shared_expert_intermediate_size": 16},
    **dict.fromkeys(("gemma3", "modernvbert", "ultravbert"), {"text_config": TEXT, "vision_config": VISION}),
    "qwen3_5": {"text_config": {**TEXT, **LINEAR}, "vision_config": VISION},
    "t5gemma": {"encoder": TEXT, "decoder": TEXT},
    "t5gemma2": {"encoder": {"text_config": TEXT, "vision_config": VISION}, "decoder": TEXT},
    **dict.fromkeys(("zamba", "zamba2"), {  # its attention is shared between hybrid blocks: two of them
        "num_hidden_layers": 3, "layers_block_type": ["hybrid", "linear_attention", "hybrid"], "num_key_value_heads": 4,
        "head_dim": None}),
    "ctrl": {"pad_token_id": None}, "cohere_compass_text": {"layer_types": ["full_attention"] * 2, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text"), {
        **LINEAR, "shared_expert_intermediate_size": 16}),
}


def config_of(architecture: str):
    """A configuration of toy size."""
    config_class = CONFIG_MAPPING[architecture]
    default = config_class()
    sizes = {}
    for name, size in SIZES.items():
        try:
            if hasattr(default, name):
                sizes[name] = size
        except NotImplementedError:
            pass
    sizes = {**sizes, **WANTS.get(architecture, {})}
    return config_class(**{name: size for name, size in sizes.items() if size is not None})


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of the toy words that puts <s> and </s> around a sentence, with pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "<pad>", "</s>", "<unk>", *toy.WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                            unk_token="<unk>", cls_token="<s>", sep_token="</s>").save_pretrained(folder)


def write_checkpoint(architecture: str, folder: Path) -> Path:
    """A causal language model where the architecture has one, as people publish it; else the backbone under no head."""
    config = config_of(architecture)
    torch.manual_seed(0)
    if is_decoder(config) and architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        net = AutoModelForCausalLM.from_config(config)
    else:
        net = AutoModelForSequenceClassification.from_config(config).base_model
    net.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


# ---------------------------------------------------------------- what is tried

class Refused(Exception):
    """Carries the one line with which run.py refuses, or what went wrong."""


def call(*arguments) -> tuple[str, str]:
    """What run.py prints in this process, on stdout and on stderr.

    Raises:
        Refused: its exit status was 2 and it said one line; or anything else happened (FAILED, and what).
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("always")
            status = toy.main(*arguments)
    except Exception:
        raise Refused(f"{FAILED}: {' | '.join(traceback.format_exc().strip().splitlines()[-3:])}") from None
    lines = [line for line in err.getvalue().splitlines() if line.startswith("run.py: ")]
    if status == 2 and len(lines) == 1:
        raise Refused(lines[0].removeprefix("run.py: "))
    if status:
        raise Refused(f"{FAILED}: exit status {status}: {err.getvalue()[-500:]}")
    return out.getvalue(), err.getvalue()


def train(folder: Path, work: Path, *options) -> tuple[str, str]:
    """Trains for two epochs into `folder`, holds `eval` to the summary, and returns what the training printed."""
    printed = call("LoRA", "12345", "--model", work / "base", "--data", work / "cola", "--out", folder, "--epochs", 2,
                   "--batch-size", 8, "--lr", 0.01, "--no-plots", *options)
    expected = json.loads((folder / "summary.json").read_text())["validation"]["in_domain"]
    found = json.loads(call("eval", folder, "--data", work / "cola" / toy.COLA_FILES[1], "--json")[0])
    for key in ("loss", "accuracy", "mcc"):
        if abs(found[key] - expected[key]) > 1e-6:
            raise Refused(f"{FAILED}: eval gives {key} {found[key]}, the summary {expected[key]}")
    return printed


def train_cached(folder: Path, work: Path, *options) -> str:
    """Trains with and without cached frozen blocks: the same bytes; says whether they were."""
    printed = train(folder, work, *options)
    fresh = folder.with_name(f"{folder.name}-fresh")
    train(fresh, work, "--no-keep", *options)
    file = next(folder.glob("*.safetensors")).name
    if (folder / file).read_bytes() != (fresh / file).read_bytes():
        raise Refused(f"{FAILED}: with cached blocks the run ends in other bytes")
    said = re.search(r"cannot be cached: (.*);", printed[0])
    return f"works, not cached: {said[1]}" if said else "works"


@torch.no_grad()
def compare_logits(ours, theirs, tokenizer) -> str:
    """Holds our logits of a padded batch against the library's, sentence by sentence and without a pad."""
    ids = [tokenizer(sentence).input_ids for sentence, _ in toy.toy_rows(6, seed=9)]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    expected = torch.cat([theirs(input_ids=torch.tensor([row])).logits for row in ids])
    difference = float((ours(batch["input_ids"], batch["attention_mask"]) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise Refused(f"{FAILED}: logits differ by {difference:.1e}")
    return "works"


def train_lora(work: Path) -> str:
    """Trains LoRA on all blocks, and looks whether every adapted layer has moved."""
    (work / "warnings").write_text(train(work / "lora", work)[1])
    still = [name.removeprefix("base_model.model.").removesuffix(".lora_B.weight") for name, value in load_file(
        work / "lora" / "adapter_model.safetensors").items() if "lora_B" in name and not value.any()]
    return f"works, no gradient reaches {still[0]}" if still else "works"


def library_net(work: Path):
    return AutoModelForSequenceClassification.from_pretrained(work / "base", num_labels=2, dtype=torch.float32)


def to_peft(work: Path) -> str:
    """Loads the adapter of the run `lora` in PEFT."""
    if said := re.search("PEFT takes .*", (work / "warnings").read_text()):
        raise Refused(said[0])
    classifier, tokenizer, _ = load_finetuned(work / "lora")
    return compare_logits(classifier, PeftModel.from_pretrained(library_net(work), work / "lora").eval(), tokenizer)


def from_peft(work: Path) -> str:
    """Loads an adapter that PEFT saved, of the same layers with random weights."""
    classifier, tokenizer, _ = load_finetuned(work / "lora")
    model = get_peft_model(library_net(work), LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=list(lora_layers(classifier.net)),
        modules_to_save=classifier.head_names()))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.1)
    model.save_pretrained(work / "peft")
    classifier, _ = load_classifier(str(work / "base"), 2)
    load_adapter(classifier.net, work / "peft")
    return compare_logits(classifier.eval(), model.eval(), tokenizer)


TRIALS: dict[str, Callable[[Path], str]] = {
    "LoRA": train_lora,
    "--layers 1": lambda work: train_cached(work / "layers", work, "--layers", 1),
    "--method head": lambda work: train_cached(work / "head", work, "--method", "head"),
    "--method full": lambda work: train(work / "full", work, "--method", "full") and "works",
    "adapter to PEFT": to_peft,
    "adapter from PEFT": from_peft,
}


def attempt(trial: Callable[[Path], str], work: Path) -> str:
    """The outcome of a trial: "works", or the line with which it was refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return trial(work)
    except (Refused, UserError) as refused:
        return str(refused).replace(str(work / "base"), "NAME").replace(f"{work}/", "")
    except Exception:
        return f"{FAILED}: {' | '.join(traceback.format_exc().strip().splitlines()[-3:])}"


def outcomes(architecture: str, work: Path) -> dict[str, str]:
    """Every trial of an architecture in a folder of its own."""
    write_cola(work / "cola")
    try:
        write_checkpoint(architecture, work / "base")
    except UserError as refused:  # it needs a library beside transformers
        return dict.fromkeys(TRIALS, str(refused))
    found = {}
    for name, trial in TRIALS.items():
        if "PEFT" in name and not found["LoRA"].startswith("works"):
            found[name] = found["LoRA"]
        else:
            found[name] = attempt(trial, work)
    return found


def write_cola(folder: Path) -> None:
    """Toy sentences, one of them longer than every context here."""
    toy.write_cola(folder, train=24)
    with open(folder / toy.COLA_FILES[0], "a", encoding="utf-8") as file:
        file.write(toy.tsv([(" ".join(toy.WORDS * 60), 1)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architectures", nargs="*", metavar="NAME", help="model types; all of the library's if none")
    parser.add_argument("--json", action="store_true", help="print one JSON object; the lines go to stderr")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = {}
    for architecture in args.architectures or MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        with tempfile.TemporaryDirectory() as work:
            result[architecture] = outcomes(architecture, Path(work))
        print("\n".join(f"{architecture}, {name}: {outcome}" for name, outcome in result[architecture].items()),
              file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print(common.result({"outcomes": result}))
    return int(any(outcome.startswith(FAILED) for found in result.values() for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
