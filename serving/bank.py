"""Any number of adapters on one frozen base; one batch mixes them row by row.

    bank = AdapterBank.on("gpt2")
    bank.add_run("cola", Path("runs/LoRA-12345"))
    bank.logits(input_ids, attention_mask, ["cola", None, "reviews"])       # (classes,) of each row

The base is in memory once, each adapter's matrices once (adapters/mixed.py); ranks, targets and numbers of classes may
differ. A row without an adapter gets the base under its own head. Nothing here trains.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import speed
from adapters.mixed import MixedHead, MixedLinear, Routing
from adapters.peft_layout import WEIGHTS_FILE, Adapter, read_adapter
from data.backbones import load_config, load_tokenizer, max_length_of
from data.digests import config_digest, tokenizer_digest
from data.segments import add_token_types, read_pairs, read_single_texts
from machine.errors import UserError
from machine.hardware import device
from model import TextClassifier, load_classifier
from options.schema import TableOptions
from record.calibration import calibration_of
from record.config_json import rebuild
from record.files import sha256
from record.folder import read_run
from record.tensors import load_tensors, weights_digest
from serving.texts import Reading, classify

PARTS = {"base_sha256": "weights", "base_config_sha256": "configuration", "tokenizer_sha256": "tokenizer"}
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter of a bank."""

    slot: int  # its number in the layers of adapters/mixed.py; 0 is the base under its own head
    reading: Reading
    task: str | None
    parameters: int  # of adapter and head
    sha256: str | None  # of the file of its weights


class AdapterBank:
    """A frozen base with adapters by name.

    Args:
        classifier: the base under its own head, without an adapter; the bank takes it over.
        tokenizer: the base's.
        model: name or path of the base, for errors.
        precision: fp32, or bf16 for adapters that were trained on a base in bfloat16.

    Raises:
        UserError: the model cannot share a batch, or its head is of a kind that cannot be mixed.
    """

    def __init__(self, classifier: TextClassifier, tokenizer, model: str, precision: str = "fp32"):
        if classifier.by_length:
            raise UserError(f"--model {model}: sentences of different lengths cannot share a batch, so adapters cannot")
        self.classifier = classifier.requires_grad_(False).eval()
        self.tokenizer, self.model, self.precision = tokenizer, model, precision
        # Before `set_precision` changes the weights; under the keys of a run's config.json.
        self.digests = {"base_sha256": weights_digest(classifier.net.base_model),
                        "base_config_sha256": config_digest(classifier.net.config),
                        "tokenizer_sha256": tokenizer_digest(tokenizer)}
        speed.install(classifier)
        speed.set_precision(classifier.net.base_model, precision)
        self.net, self.routing = classifier.net, Routing()
        self.entries: dict[str, LoadedAdapter] = {}
        self.calibrated = False
        # Whether the texts are pairs, with the hook that adds their token types: those of the base are all adapters'.
        self.pairs: bool | None = None
        self.token_types: RemovableHandle | None = None
        labels = self.net.config.id2label
        # The tokenizer's limit alone may be beyond the model's positions, or none at all.
        self.own = Reading(tuple(str(labels[label]) for label in range(self.net.config.num_labels)),
                           min(tokenizer.model_max_length, max_length_of(self.net)))
        # Every linear layer of the head becomes a `MixedHead`: adapters differ in their number of classes.
        self.heads: dict[str, MixedHead] = {}
        for head in classifier.head_names():
            for name, module in list(self.net.get_submodule(head).named_modules(prefix=head)):
                if isinstance(module, nn.Linear):
                    self.heads[name] = MixedHead(module, self.routing)
                elif any(True for _ in module.parameters(recurse=False)):
                    raise UserError(f"--model {model}: its head has a {type(module).__name__} ({name}), of which a bank of "
                                    "adapters cannot hold one for each")
        # Swapped after the walk, so that it meets the library's modules only.
        for name, head in self.heads.items():
            self.net.set_submodule(name, head)

    @classmethod
    def on(cls, model: str, precision: str = "fp32") -> AdapterBank:
        """Loads the base `--model`.

        Raises:
            UserError: it cannot be had, or its head is of a kind that cannot be mixed.
        """
        # A base without a head gets the same random one each time.
        torch.manual_seed(0)
        classifier, _ = load_classifier(model, load_config(model).num_labels)
        return cls(classifier.to(device()), load_tokenizer(model), model, precision)

    @classmethod
    def of(cls, adapters: dict[str, Path], calibrated: bool = False) -> AdapterBank:
        """Loads adapters by name, and the base of the first one; all must have this base.

        Args:
            calibrated: answer by each run's calibration.json.

        Raises:
            UserError: see `on` and `add_run`.
        """
        options = read_run(next(iter(adapters.values())), "LoRA")[0]["options"]
        bank = cls.on(options["model"], _precision(options))
        bank.calibrated = calibrated
        for name, folder in adapters.items():
            bank.add_run(name, folder)
        return bank

    # ------------------------------------------------------------ adapters come and go

    def add_run(self, name: str, folder: Path) -> None:
        """Adds the adapter of a LoRA run (or the head of a run with --method head).

        Raises:
            UserError: no such run, a damaged one, another base, or a name that is taken. The bank is unchanged.
        """
        config, summary = read_run(folder, "LoRA")
        options, folder = config["options"], Path(folder)
        # The base is shared and frozen, and a request holds text alone.
        if options["method"] not in ("lora", "head") or options.get("feature_columns"):
            reason = "reads feature columns" if options.get("feature_columns") else f"has --method {options['method']}"
            raise UserError(f"{folder}: {reason}, which adapters on a shared frozen base cannot have; "
                            f"python run.py predict {folder} reads it alone")
        if _precision(options) != self.precision:
            raise UserError(f"{folder}: was trained on a base in {_precision(options)}, and the shared one is in "
                            f"{self.precision}")
        # By content: one base may have many names. Old runs recorded no digests, and the name has to do.
        recorded = {key: config[key] for key in self.digests if config.get(key) is not None}
        other = [PARTS[key] for key, digest in recorded.items() if digest != self.digests[key]]
        if other or not recorded and options["model"] != self.model:
            raise UserError(f"{folder}: adapter for another base: it was made for {options['model']}, which "
                            f"differs from {self.model} here in {' and '.join(other) or 'name'}")
        pairs = rebuild(TableOptions, options).pairs
        if self.pairs not in (None, pairs):
            raise UserError(f"{folder}: reads {'pairs of texts' if pairs else 'one text'}, and the adapters that are loaded "
                            f"read {'one text' if pairs else 'pairs of texts'}; serve it apart")
        file = folder / (WEIGHTS_FILE if options["method"] == "lora" else "trained.safetensors")
        if options["method"] == "lora":
            adapter = read_adapter(self.net, folder)
        else:
            state = load_tensors(file)
            adapter = Adapter({}, {}, 0.0, False, {key.removeprefix("net."): value for key, value in state.items()})
        self.add(name, adapter, Reading.of(config, calibration_of(folder, self.calibrated)), file, summary.get("task"))
        if pairs and not self.pairs:
            read_pairs(self.tokenizer)
            self.token_types = add_token_types(self.net, self.tokenizer)
        self.pairs = pairs

    def add(self, name: str, adapter: Adapter, reading: Reading, file: Path | None = None, task: str | None = None
            ) -> None:
        """Adds an adapter under a name.

        Args:
            file: the file of its weights, if they come from one.

        Raises:
            UserError: a name that is taken or malformed, an adapter or head that does not fit. The bank is unchanged.
        """
        # Everything is checked before the first matrix is stored, so that an error leaves the bank whole.
        where = file or name
        if adapter.other_formula:
            raise UserError(f"{where}: an adapter of {adapter.other_formula}, which is no sum of low-rank updates, as those "
                            "on a shared base are; python run.py predict RUN reads it alone")
        if not re.fullmatch(NAME, name):
            raise UserError(f"adapter name {name[:80]!r}: expected up to 64 letters, digits, dots, dashes and underscores")
        if name in self.entries:
            raise UserError(f"adapter {name}: the name is taken")
        # The weights saved whole must be those of the head: anything else belongs to the base.
        whole = dict(adapter.whole)
        heads = {head: (whole.pop(f"{head}.weight", None), whole.pop(f"{head}.bias", None)) for head in self.heads}
        if whole:
            raise UserError(f"{where}: {next(iter(whole))} is no LoRA matrix and not of the head; adapters on a shared "
                            "frozen base cannot change it")
        last = list(self.heads)[-1]
        for head, (weight, bias) in heads.items():
            inputs = self.heads[head].pool.widths[0]
            outputs = None if weight is None or weight.ndim != 2 else len(weight)
            if outputs is None or weight.shape[1] != inputs or (bias is not None) != self.heads[head].has_bias or (
                    bias is not None and bias.shape != (outputs,)):
                raise UserError(f"{where}: no classification head for this model ({head})")
            # The last layer gives the classes. The layers before it keep the base's number of outputs.
            if outputs != (len(reading.classes) if head == last else len(self.heads[head].pool.rows[0])):
                raise UserError(f"{where}: the head ({head}) has {outputs} outputs and the run {len(reading.classes)} "
                                "classes")
        # A damaged adapter is refused by its file's name, instead of giving NaN to every request.
        tensors = [tensor for pair in (*adapter.pairs.values(), *heads.values()) for tensor in pair if tensor is not None]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            raise UserError(f"{where}: the adapter holds values that are not finite")
        # The lowest free slot, so that the pools stay small as adapters come and go.
        taken = {entry.slot for entry in self.entries.values()}
        slot = next(slot for slot in range(1, len(taken) + 2) if slot not in taken)
        for module, (A, B) in adapter.pairs.items():
            self._mixed(module).pool.store(slot, A, (adapter.scaling(module) * B.float()).t())
        for head, (weight, bias) in heads.items():
            self.heads[head].store(slot, weight, bias)
        self.entries[name] = LoadedAdapter(slot, reading, task, sum(tensor.numel() for tensor in tensors),
                                           None if file is None else sha256(file))

    def _mixed(self, name: str) -> MixedLinear:
        """Returns the `MixedLinear` of a module's name; a new one takes the place of a plain module."""
        module = self.net.get_submodule(name)
        if not isinstance(module, MixedLinear):
            module = MixedLinear(module, self.routing)
            self.net.set_submodule(name, module)
        return module

    def remove(self, name: str) -> None:
        """Removes an adapter.

        Raises:
            UserError: no adapter has that name.
        """
        slot = self.entry(name).slot
        for module in self.net.modules():
            if isinstance(module, MixedLinear | MixedHead):
                module.pool.release(slot)
        del self.entries[name]
        # Without an adapter, the next one may read texts of the other kind.
        if not self.entries and self.pairs:
            read_single_texts(self.tokenizer)
            if self.token_types is not None:
                self.token_types.remove()
        if not self.entries:
            self.pairs = self.token_types = None

    def entry(self, name: str) -> LoadedAdapter:
        """Returns the adapter of that name.

        Raises:
            UserError: there is none.
        """
        if name not in self.entries:
            known = ", ".join(list(self.entries)[:20]) or "none"
            raise UserError(f"unknown adapter {name[:80]!r}; expected one of {known}")
        return self.entries[name]

    # ------------------------------------------------------------ batches

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor, names: list[str | None]) -> list[Tensor]:
        """Computes logits (classes,) of each row, by its own adapter.

        Args:
            input_ids: (B, T), right-padded.
            attention_mask: (B, T), 1 for a real token, on the CPU, as are the results.
            names: an adapter for each row, or None: the base under its own head.
        """
        slots = torch.tensor([0 if name is None else self.entry(name).slot for name in names])
        classes = [len(self.own.classes if name is None else self.entry(name).reading.classes) for name in names]
        # Sorted, because the grouped matmuls take each adapter's rows as one run; the results go back in order.
        slots, order = slots.sort(stable=True)
        logits = self._sorted_logits(input_ids[order].to(device()), attention_mask[order], slots.to(device())).cpu()
        results: list[Tensor | None] = [None] * len(names)
        for place, row in enumerate(order.tolist()):
            # The columns beyond a row's own classes are padding.
            results[row] = logits[place, :classes[row]]
        return results

    def _sorted_logits(self, input_ids: Tensor, attention_mask: Tensor, slots: Tensor) -> Tensor:
        """Computes logits (B, most classes) of rows that are sorted by slot."""
        present, group = torch.unique_consecutive(slots, return_inverse=True)  # (G,), (B,)

        def route(*groups: Tensor) -> None:
            """Gives the layers the end of each adapter's rows, for each number of rows that a layer may read."""
            ends = {len(rows): torch.bincount(rows, minlength=len(present)).cumsum(0) for rows in groups}
            self.routing.set(present, ends)

        return speed.grouped_logits(self.classifier, input_ids, attention_mask, group, route)

    def classify(self, rows: list[tuple[str | None, str]]) -> list[dict | UserError]:
        """Returns label, probability and probabilities of each (adapter, text), or its error; see `texts.classify`."""
        results: list[dict | UserError | None] = [None] * len(rows)
        known, readings = [], []
        for row, (name, text) in enumerate(rows):
            try:
                readings.append((self.own if name is None else self.entry(name).reading, text))
                known.append(row)
            except UserError as error:
                results[row] = error
        # `classify` numbers the rows without an error from 0: `known` leads back to all rows.
        answers = classify(self.tokenizer, readings, lambda batch, places: self.logits(
            batch.input_ids, batch.attention_mask, [rows[known[place]][0] for place in places]))
        for row, answer in zip(known, answers, strict=True):
            results[row] = answer
        return results


def _precision(options: dict) -> str:
    """Returns the precision of the base that a run's adapter needs: bf16x3 is a way of computing fp32."""
    return "bf16" if options["precision"] == "bf16" else "fp32"
