"""A LoRA run's folder as a repository of the Hugging Face Hub: the model card, and the tokenizer beside the adapter.

    from huggingface_hub import upload_folder
    upload_folder(folder_path="runs/LoRA-12345", repo_id="somebody/cola-lora")
"""
from __future__ import annotations

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from data.backbones import hub_name
from data.hub import is_dataset_name
from data.segments import joins_pairs, separator_of
from data_utils import GLUE_REPOSITORY, HUB_TABLES, Task
from options.schema import RunOptions, TableOptions
from record.files import write_file
from record.ownership import CARD, CARD_TAG, TOKENIZER_FILES, is_card
from serving.merge import for_others, kept_ends, tokenizer_files
from train_utils import selection_split

# Score -> its name among the Hub's metrics, and its heading.
METRICS = {"accuracy": ("accuracy", "accuracy"), "mcc": ("matthews_correlation", "MCC"), "macro_f1": ("f1", "macro F1"),
           "f1_micro": ("f1", "micro F1"), "f1_macro": ("f1", "macro F1"), "pearson": ("pearsonr", "Pearson"),
           "spearman": ("spearmanr", "Spearman"), "mse": ("mse", "MSE")}
ANSWERS = {"single-label": "one of {count} classes out ({classes})", "regression": "a number out ({classes})",
           "multi-label": "any of {count} labels out ({classes})"}
BASELINES = {
    "single-label": "A classifier that always\nsays the commonest class has the accuracy in the last column and an MCC of "
                    "0.",
    "multi-label": "A classifier that always\nsays the commonest label alone has the micro F1 in the last column.",
    "regression": "A model that always says the\nmean has the MSE in the last column and correlations of 0."}
SAME = {"single-label": ("majority_accuracy", "majority accuracy"), "regression": ("mean_mse", "MSE of the mean"),
        "multi-label": ("majority_f1_micro", "micro F1 of the commonest label")}
TEXT = """---
{metadata}
---

# {name}

{kind} adapter and its classification head for `{model}`: {texts} in, {answer}.

## Base

{base}

Adapted: {targets} in {layers}{size}; {trainable:,} of {total:,} parameters were trained
({share:.2f} %).

## Data

Task `{task}`: {rows:,} training sentences{limit}. Files, with the first digits of their SHA-256:

{files}
{init}
## Results

Of the saved weights (epoch {epoch} of {epochs}, chosen on the split `{selection}`), seed {seed}. {baseline}

{results}

## Limits

{limits}

## How to load

```python
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

folder = "."  # this folder, or the repository's name on the Hub
model = AutoPeftModelForSequenceClassification.from_pretrained(folder{num_labels}).eval()
tokenizer = AutoTokenizer.from_pretrained(folder{side})
model.config.pad_token_id = tokenizer.pad_token_id
{inputs}
logits = model(**inputs).logits
labels = {labels}
```

`config.json` records every option, version and file of the training, and the classes of the files as `id2label`.
"""
LIMITS = {
    "single-label": "Probabilities are not calibrated, and every text gets one of the classes, in whatever language it is.",
    "multi-label": "Probabilities are not calibrated; a label is chosen where its probability is above 0.5.",
    "regression": "Every text gets a number, in whatever language it is; it may lie beyond those of the training data."}
INPUTS = """inputs = tokenizer({texts}, padding=True, truncation=True, max_length={max_length},
                   return_tensors="pt")"""
INPUTS_WITHOUT_MIDDLE = """texts = tokenizer(["A sentence."])["input_ids"]
texts = [ids if len(ids) <= {max_length} else ids[:{front}] + ids[-{back}:] for ids in texts]  # the middle is cut
inputs = tokenizer.pad({{"input_ids": texts}}, return_tensors="pt")"""


def write_repository(folder: Path, options: RunOptions, task: Task, tokenizer, max_length: int, summary: dict) -> list[str]:
    """Writes model card and tokenizer into a run's folder; a README.md that is no model card of a run is left alone.

    Args:
        tokenizer: the base's; where it has no pad token, the files name one to pad with.
        max_length: tokens of the longest text; longer ones were cut.
        summary: as in summary.json.

    Returns:
        The files written.
    """
    files = tokenizer_files(for_others(tokenizer, max_length, options.table.truncate))
    files = {name: data for name, data in files.items() if name in TOKENIZER_FILES}
    # A README.md that somebody wrote by hand stays.
    if not (folder / CARD).exists() or is_card(folder / CARD):
        files[CARD] = model_card(options, task, tokenizer, max_length, summary).encode()
    for name, data in files.items():
        write_file(folder / name, data)
    return list(files)


def model_card(options: RunOptions, task: Task, tokenizer, max_length: int, summary: dict) -> str:
    """Returns the text of README.md. The same run gives the same text: no date, no duration, no path of the machine."""
    best, parameters, lora, classes = summary["validation"], summary["parameters"], options.lora, list(task.class_names)
    name, repository = f"{options.mode}-{options.sr}", dataset_of(options)
    hub, shown = hub_name(options.model), [key for key in METRICS if key in next(iter(best.values()))]
    # The metadata are for the Hub's tables, the rows for readers. Both hold the scores of the best epoch.
    results = [EvalResult(task_type="text-classification", task_name="Text Classification", dataset_name=task.name,
                          dataset_type=repository or task.name, dataset_split=split, metric_type=kind, metric_name=shown,
                          metric_value=values[key])
               for split, values in best.items() for key, (kind, shown) in METRICS.items() if key in values]
    metadata = ModelCardData(base_model=hub, library_name="peft", pipeline_tag="text-classification", model_name=name,
                             tags=["lora", CARD_TAG], datasets=repository and [repository],
                             metrics=list(dict.fromkeys(METRICS[key][0] for key in shown)), eval_results=results)
    side, inputs = _tokenisation(options.table, tokenizer, max_length)
    return TEXT.format(
        metadata=metadata.to_yaml(), name=name, model=hub or Path(options.model).name, base=_base(options.model, hub),
        texts="a pair of texts" if options.table.pairs else "one text", baseline=BASELINES[task.problem],
        answer=ANSWERS[task.problem].format(count=len(classes), classes=", ".join(classes[:20]) + (
            ", ..." if len(classes) > 20 else "")),
        kind="An IA3" if options.method == "ia3" else "A LoRA", size=_size(options), trainable=parameters["trainable"],
        targets=", ".join(lora.targets), layers=f"blocks {lora.layers}" if lora.layers else "all blocks",
        total=parameters["total"], share=100 * parameters["trainable"] / parameters["total"], task=task.name,
        rows=len(task.train), limit=" (--limit)" if options.limit else "",
        files="\n".join(f"- `{file if repository else Path(file).name}` {digest[:12]}"
                        for file, digest in task.files.items()),
        init=f"\nTraining began with the adapter of another run, `{options.init.name}`.\n" if options.init else "",
        epoch=summary["best_epoch"], epochs=summary["last_epoch"], selection=selection_split(task.dev),
        seed=options.train.seed, results=_table(best, shown, task.problem),
        limits="\n".join(f"- {line}" for line in _limits(options, task, tokenizer, max_length)),
        side=side, inputs=inputs,
        num_labels="" if len(classes) == 2 else f", num_labels={len(classes)}", labels=classes)


def _table(best: dict[str, dict], shown: list[str], problem: str) -> str:
    """Returns the scores of each split as a table in Markdown."""
    same, heading = SAME[problem]
    headings = ["split", "sentences", *(METRICS[key][1] for key in shown), heading]
    lines = [f"| {' | '.join(headings)} |", "|" + " --- |" * len(headings)]
    for split, values in best.items():
        lines.append(f"| {split} | {values['n']:,} | "
                     + " | ".join(f"{values[key]:.4f}" for key in (*shown, same)) + " |")
    return "\n".join(lines)


def _size(options: RunOptions) -> str:
    """Returns rank, alpha and variant of an adapter in words; IA3 has none of them."""
    lora = options.lora
    if options.method == "ia3":
        return ", scaled by vectors where IA3 does so"
    variant = "" if lora.variant == "lora" else f" ({'rsLoRA' if lora.variant == 'rslora' else lora.variant})"
    return f", rank {lora.rank}, alpha {lora.alpha:g}{variant}"


def _tokenisation(table: TableOptions, tokenizer, max_length: int) -> tuple[str, str]:
    """Returns the arguments that load the tokenizer, and the lines that tokenise: a long text is cut as the run cut it.

    An uncut text of more tokens than the model has positions would end in an error.
    """
    truncate = table.truncate
    if truncate == "middle":
        front, back = kept_ends(tokenizer, max_length)
        return "", INPUTS_WITHOUT_MIDDLE.format(max_length=max_length, front=front, back=back)
    # The saved files do not say the side that is cut: transformers keeps it only after a call that cuts.
    texts = '["A sentence."]'
    if table.pairs:
        texts = '["The first text."], ["The second."]'
        if not joins_pairs(tokenizer):
            texts = f'["The first text.{separator_of(tokenizer)}The second."]'
    return ', truncation_side="left"' if truncate == "head" else "", INPUTS.format(max_length=max_length, texts=texts)


def dataset_of(options: RunOptions) -> str | None:
    """Returns the Hub's name of the data set that a run reads; None for files of the user's own."""
    if options.data is None:
        return GLUE_REPOSITORY if options.task == "cola" else HUB_TABLES.get(options.task, (None,))[0]
    return options.data if is_dataset_name(options.data) else None


def _base(model: str, hub: str | None) -> str:
    """Describes the base model in a sentence."""
    if model == "smollm2":
        return f"[`{hub}`](https://huggingface.co/{hub}), trained on its 4-bit copy (Q4_1, dequantised)."
    if hub is not None:
        return f"[`{hub}`](https://huggingface.co/{hub})."
    if model == "tiny":
        return "The tiny GPT-2 that comes with the training code and learned its built-in grammar; it is on no Hub."
    return "A local model; `adapter_config.json` names its folder. To share the adapter, name a base that others have."


def _limits(options: RunOptions, task: Task, tokenizer, max_length: int) -> list[str]:
    """Returns the reasons to mistrust the model's answers."""
    limits = ["Scores are those of one seed; another seed moves them, by several points of MCC on small splits.",
              LIMITS[task.problem],
              f"Texts longer than {max_length} tokens were cut ({options.table.truncate} cut)."]
    if options.table.truncate == "middle":
        limits.append("The lines below do so too; the tokenizer's own `truncation=True` cuts the tail.")
    if tokenizer.pad_token is None and (pad := for_others(tokenizer, max_length, "tail").pad_token) is not None:
        limits.append(f"The pad token is `{pad}`: a text that ends with this mark is read without it.")
    # Names of the project's own for a base that others know by another name, or in another form.
    if options.model == "smollm2":
        limits.append("The results belong to the 4-bit copy of the base; with the Hub's own weights they differ a little.")
    if options.table.feature_columns:
        limits.append(f"It was trained beside a head for the numbers {', '.join(options.table.feature_columns)}, which PEFT "
                      "does not load (features.safetensors): without it the logits are others.")
    if task.num_labels != 2:
        limits.append(f"PEFT does not read the number of classes from a folder: give num_labels={task.num_labels} as below.")
    return limits
