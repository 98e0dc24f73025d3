"""The transfer set: sentences without labels, and what the teacher says of them.

    python run.py distil 12345 --augment 40000 --text plain.txt

Edits of training sentences, plain sentences, sentences that the teacher's language model writes, and edits of those take
turns, so that a smaller set is the beginning of a larger one. Everything is computed once and cached in chunks in
`runs/transfer-KEY/`, beside the runs: KEY depends on the base model and on the task's sentences, the names of the chunks of
the teacher's outputs on their content. A killed process loses the chunks that it was at, and several processes (seeds at a
time) make different chunks. So do several threads of one: two cores make two chunks beside each other sooner than one after
the other.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import random
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data_utils
import speed
import train_utils
from data.backbones import load_causal_lm
from data.edits import edit
from data.tables import read_sentences
from data_utils import Batch, Task
from distillation.heads import Outputs, mean_loss
from distillation.teachers import (
    HiddenStates,
    Reduction,
    hidden_states,
    principal_components,
    states_and_logits,
    token_scores,
)
from machine.errors import UserError
from machine.hardware import bf16_is_fast, device
from machine.signals import Interrupted
from model import TextClassifier, inject_lora, lora_layers
from options.schema import LoRAOptions, TrainOptions
from record import tensors
from record.files import make_folder, read_json, write_file, write_json
from sampling import Sampling

LABELLED = 1024  # sentences in a chunk of the teacher's outputs
SORTED = 64 * LABELLED  # sentences that are sorted before they are cut into chunks
WRITTEN = 1024  # sentences in a chunk that the language model writes
TOGETHER = 256  # of them in a batch
TOKENS = 2048  # tokens in a batch of the teacher's, pads included
PCA_TOKENS = 30_000  # from which the principal components are computed
POLL = 0.5  # seconds between two looks at what other processes make
TRIES = 1000  # edits or texts in a row that give nothing new: then there is nothing more to be had

Stop = Callable[[], int | None]


def normalised(sentence: str) -> str:
    """Returns a sentence without case and punctuation, by which duplicates and development sentences are recognised."""
    return " ".join("".join(c if c.isalnum() else " " for c in sentence.casefold()).split())


def read_text(files: tuple[str, ...]) -> list[str]:
    """Returns the sentences of text files, one a line.

    Raises:
        UserError: a file is missing, not UTF-8, or has no sentence.
    """
    try:
        return [sentence for file in files for sentence in read_sentences(file)]
    except UserError as error:
        raise UserError(f"--text {error}") from None


@dataclass
class Source:
    """Holds what the transfer set is made of, and the folder of its cache."""

    folder: Path
    task: Task
    tokenizer: object
    model: str  # the base, as --model names it
    decoder: bool  # whether it has a language model that writes
    text: list[str]
    stop: Stop

    @classmethod
    def of(cls, beside: Path, base_sha256: str, tokenizer_sha256: str, task: Task, tokenizer, model: str, decoder: bool,
           text: tuple[str, ...], stop: Stop) -> Source:
        """Opens the cache beside the runs in the folder `beside`."""
        splits = {name: split.sentences for name, split in {"train": task.train, **task.dev}.items()}
        made_of = {"base_sha256": base_sha256, "tokenizer_sha256": tokenizer_sha256, "task": task.name,
                   **{f"{name}_sha256": hashlib.sha256("\n".join(rows).encode()).hexdigest()
                      for name, rows in splits.items()}}
        key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
        folder = make_folder(beside / f"transfer-{key}")
        if not (folder / "config.json").exists():
            write_json(folder / "config.json", {**made_of, "model": model})
        return cls(folder, task, tokenizer, model, decoder, read_text(text), stop)

    def check_stop(self) -> None:
        if signal := self.stop():
            raise Interrupted(signal)

    def known(self) -> set[str]:
        """Returns the normalised sentences of the task, none of which may be in the transfer set."""
        return {normalised(sentence) for split in (self.task.train, *self.task.dev.values()) for sentence in split.sentences}

    # ------------------------------------------------------------ sentences

    def plain(self) -> list[str]:
        """Returns the sentences of --text as long as a training sentence is, shuffled, none of the task's."""
        known, longest = self.known(), self.longest()
        kept = {normalised(sentence): sentence for sentence in self.text if len(sentence.split()) <= longest}
        found = [sentence for key, sentence in kept.items() if key and key not in known]
        random.Random(0).shuffle(found)
        return found

    def longest(self) -> int:
        """Returns the words of a long training sentence: 95 in 100 are no longer."""
        lengths = sorted(len(sentence.split()) for sentence in self.task.train.sentences)
        return lengths[len(lengths) * 95 // 100]

    def sentences(self, count: int) -> list[str]:
        """Returns `count` different sentences: edits, plain ones and written ones take turns.

        A warning says where there are not so many.
        """
        seen, found, plain = self.known(), [], self.plain()
        others = list(plain)  # what is edited beside training sentences; grows by what is written
        streams = {"edit of training": edits_of(self.task.train.sentences, 1)}
        if self.decoder:
            streams["written"] = self.written(least=count // (4 if plain else 2))
        if plain:
            streams["plain"] = iter(plain)
        if self.decoder or plain:
            streams["edit of others"] = edits_of(others, 2)
        turns = [*streams, *(["written"] if self.decoder and not plain else [])]
        with tqdm(total=count, unit="sentence", desc="transfer set", dynamic_ncols=True, delay=2) as bar:
            while len(found) < count:
                for name in list(turns):
                    sentence = next((one for one in itertools.islice(streams[name], TRIES)
                                     if (key := normalised(one)) and key not in seen), None)
                    if sentence is None:
                        turns.remove(name)
                        continue
                    if name == "written":
                        others.append(sentence)
                    if len(found) < count:
                        seen.add(normalised(sentence))
                        found.append((name, sentence))
                        bar.update(1)
                if not turns:
                    warnings.warn(f"--augment {count}: only {len(found):,} different sentences can be had", stacklevel=2)
                    break
        rows = "".join(f"{name}\t{one}\n" for name, one in found)
        write_file(self.folder / f"sentences-{hashlib.sha256(rows.encode()).hexdigest()[:12]}.tsv", rows)
        return [sentence for _, sentence in found]

    def written(self, least: int) -> Iterator[str]:
        """Yields sentences that the base's language model writes after an epoch on the training sentences, without end.

        Args:
            least: how many will be taken at least.
        """
        lm, longest, together = None, self.longest(), -(-least // WRITTEN)

        def chunk(number: int) -> Path:
            return self.folder / f"written-{number:05d}.json"

        def write(path: Path) -> None:
            seed = int(path.stem.removeprefix("written-"))
            write_json(path, {"sentences": draw_sentences(lm, self.tokenizer, WRITTEN, 3 * longest, seed, self.check_stop)})

        for number in itertools.count():
            self.check_stop()
            if not chunk(number).exists():
                lm = lm or self.writer()
                threads = cores() if speed.samples_together(lm) else 1
                # All that will surely be taken, then a few at a time: some are too long, or there already.
                last = max(together, number + max(1, together // 16))
                share({chunk(some): WRITTEN for some in range(number, last)}, write, self.check_stop, threads, "writing")
            yield from (text if len(text.split()) <= longest else "" for text in read_json(chunk(number))["sentences"])

    def writer(self):
        """Returns the base's language model, adapted by LoRA for an epoch on the training sentences."""
        torch.manual_seed(0)
        lm = load_causal_lm(self.model)
        lm.requires_grad_(False)
        inject_lora(lm, LoRAOptions(rank=16, alpha=32))
        speed.install(lm)
        speed.set_precision(lm.base_model, "bf16" if bf16_is_fast() else "fp32")
        model = Writer(lm).to(device())
        end = border(self.tokenizer)
        room = data_utils.encode(self.tokenizer, self.task.train.sentences, 8 * self.longest())
        ids = [[end, *row, end] for row in room]
        rows = range(len(ids))
        train, held_out = ([row for row in rows if (row % 20 == 0) == out] for out in (False, True))
        batches, dev = (batches_of(ids, [0] * len(ids), chosen, 512, self.tokenizer) for chosen in (train, held_out))
        options = TrainOptions(seed=0, epochs=1, lr=3e-4, weight_decay=0.0, precision="fp32", save_every=2)
        with filelock.FileLock(self.folder / "writer.lock"):  # another process may train it: then it is ready here
            train_utils.fit(model, batches, {"held_out": dev}, language_loss, options, folder=self.folder, resume=True,
                            name="writer.", select="held_out", score=mean_loss(language_loss), stop=self.stop)
        for layer in lora_layers(lm).values():
            layer.merge()
        return lm.eval()

    # ------------------------------------------------------------ what the teachers say

    def outputs(self, teacher: TextClassifier, teacher_key: str, ids: list[list[int]], size: int, match: bool = True,
                match_weight: float = 1.0, score_weight: float = 0.0) -> tuple[Tensor, HiddenStates | None]:
        """Returns a teacher's logits (N, labels) and reduced hidden states of sentences, cached in chunks.

        Args:
            teacher_key: digest of the teacher's weights.
            ids: token ids of each sentence.
            size: dimensions of the hidden states, at most.
            match: whether hidden states are wanted; logits alone come of the chunks that have both, where there are any.
            match_weight: of the hidden states; a dimension's own share is as its standard deviation.
            score_weight: of the tokens' scores.
        """
        pca, scale = self.components(teacher, teacher_key, size) if match else (None, None)
        chunks: dict[Path, tuple[str, list]] = {}
        # Side by side are sentences that begin alike, whose first tokens a decoder computes once, or, for an encoder,
        # sentences of one length. Not all are sorted together: of a larger set the first chunks are those of a smaller one.
        order = [row for start in range(0, len(ids), SORTED) for row in sorted(
            range(start, min(start + SORTED, len(ids))), key=lambda row: (not teacher.decoder and len(ids[row]), ids[row]))]
        for start in range(0, len(ids), LABELLED):
            chunk = [ids[row] for row in order[start:start + LABELLED]]
            for its_size in (size,) if match else (size, 0):  # 0: logits alone
                key = hashlib.sha256(f"{teacher_key} {its_size} {json.dumps(chunk)}".encode()).hexdigest()
                path = self.folder / f"outputs-{key[:24]}.safetensors"
                if path.exists():
                    break
            chunks[path] = key, chunk

        def label(path: Path) -> None:
            key, chunk = chunks[path]
            tensors.save_checked(path, self.label(teacher, chunk, pca, scale), key)

        # Fused blocks keep nothing of a forward pass; of other architectures that is not known.
        share({path: len(chunk) for path, (_, chunk) in chunks.items()}, label, self.check_stop,
              cores() if speed.is_fused(teacher) else 1, "teacher")
        logits, values = [], []
        for path, (key, _) in chunks.items():
            found, its_key = tensors.load_checked(path)
            if its_key != key:
                raise UserError(f"{path}: holds other sentences' outputs; remove it")
            logits.append(found["logits"])
            values.append(found.get("hidden"))
        back = torch.tensor(order).argsort()
        logits = torch.cat(logits)[back]
        if not match:
            return logits, None
        lengths, scores = torch.tensor([len(ids[row]) for row in order]), len(scale)
        weights = torch.cat([match_weight * pca.std / pca.std.sum(), torch.full((scores,), score_weight / max(1, scores))])
        ends = lengths.cumsum(0)
        return logits, HiddenStates(torch.cat(values), weights, (ends - lengths)[back], ends[back])

    @torch.inference_mode()
    def label(self, teacher: TextClassifier, ids: list[list[int]], pca: Reduction | None, scale: Tensor | None
              ) -> dict[str, Tensor]:
        """Computes a chunk: logits (n, labels), and with `pca` hidden states and scores (tokens, d) in float16."""
        logits, parts = torch.empty(len(ids), teacher.net.config.num_labels), [None] * len(ids)
        batches = neighbours if teacher.decoder and speed.is_fused(teacher) else batches_of
        for batch in batches(ids, [0] * len(ids), list(range(len(ids))), TOKENS, self.tokenizer):
            self.check_stop()
            hidden, said = states_and_logits(teacher, batch.to(device()), needed=bool(pca))
            logits[batch.rows], lengths = said.cpu(), batch.attention_mask.sum(1)
            if pca is None:
                continue
            states = torch.cat([pca.reduce(hidden.cpu()), token_scores(teacher, hidden).cpu() / scale], -1).half()
            for row, part in zip(batch.rows.tolist(), states.split(lengths.tolist()), strict=True):
                parts[row] = part
        return {"logits": logits, **({"hidden": torch.cat(parts)} if pca else {})}

    def components(self, teacher: TextClassifier, teacher_key: str, size: int) -> tuple[Reduction, Tensor]:
        """Returns the principal components of the teacher's hidden states, and the scale of its tokens' scores (labels,).

        They are those of training sentences, and cached in a file.
        """
        key = f"{teacher_key} {size}"
        path = self.folder / f"components-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

        def compute(path: Path) -> None:
            ids = data_utils.encode(self.tokenizer, self.task.train.sentences, 512)
            parts, tokens = [], 0
            for batch in batches_of(ids, [0] * len(ids), list(range(len(ids))), TOKENS, self.tokenizer):
                parts.append(hidden_states(teacher, batch.to(device())).cpu())
                tokens += batch.tokens
                if tokens > PCA_TOKENS:
                    break
            hidden = torch.cat(parts)
            with torch.inference_mode():
                scale = token_scores(teacher, hidden.to(device())).std(0).clamp(min=1e-6).cpu()
            pca = principal_components(hidden, min(size, hidden.shape[1]))
            tensors.save_checked(path, {**vars(pca), "scale": scale}, key)

        share({path: 0}, compute, self.check_stop)
        found, _ = tensors.load_checked(path)
        scale = found.pop("scale")
        return Reduction(**found), scale


def cores() -> int:
    """Returns how many threads compute at a time: those of PyTorch on a CPU, one on a GPU."""
    return torch.get_num_threads() if device().type == "cpu" else 1


def share(wanted: dict[Path, int], make: Callable[[Path], None], check_stop: Callable[[], None], threads: int = 1,
          name: str = "") -> None:
    """Makes the files that are missing, each in one process alone; returns when all are there, whoever made them.

    Args:
        wanted: files, and how many sentences each holds.
        make: writes a file.
        check_stop: called before each file; raises where the process was asked to stop.
        threads: that make a file each, on one core each. An error in one ends the others after their files.
        name: of the bar, which counts sentences.
    """
    ended = threading.Event()

    def there() -> int:
        return sum(count for path, count in wanted.items() if path.exists())

    def work(bar: tqdm) -> None:
        while not ended.is_set() and (missing := [path for path in wanted if not path.exists()]):
            for path in missing:
                check_stop()
                with suppress(filelock.Timeout), filelock.FileLock(f"{path}.lock", blocking=False):
                    try:
                        if not path.exists():
                            make(path)
                            break
                    finally:  # who has waited for it looks for the file first
                        Path(f"{path}.lock").unlink(missing_ok=True)
            else:
                time.sleep(POLL)
            bar.n = there()  # whichever process made them
            bar.update(0)

    def work_alone(bar: tqdm) -> None:
        try:
            torch.set_num_threads(1)
            work(bar)
        finally:
            ended.set()  # or all is there

    threads = min(threads, sum(not path.exists() for path in wanted))
    before = torch.get_num_threads()
    with tqdm(total=sum(wanted.values()), initial=there(), unit="sentence", desc=name, dynamic_ncols=True, delay=2,
              disable=not name) as bar:
        if threads < 2:
            work(bar)
            return
        try:
            with ThreadPoolExecutor(threads) as pool:
                try:
                    for done in [pool.submit(work_alone, bar) for _ in range(threads)]:
                        done.result()
                finally:  # an interruption too, before the pool waits for its threads
                    ended.set()
        finally:
            torch.set_num_threads(before)  # PyTorch has one number for all threads that come


def edits_of(sentences: list[str], seed: int) -> Iterator[str]:
    """Yields edits of sentences drawn at random, without end; nothing (an empty text) where there is none."""
    rng = random.Random(seed)
    while True:
        yield edit(rng.choice(sentences), rng) or "" if sentences else ""


def batches_of(ids: list[list[int]], labels: list[int], rows: list[int], tokens: int, tokenizer, seed: int = 0
               ) -> list[Batch]:
    """Makes batches of some rows of a list of token ids, in random order; a row may come several times.

    A batch holds rows of one length and no pads: nothing has to be packed, which lets an RNN run three times as fast on a
    CPU.
    """
    lengths, rng, buckets = [len(ids[row]) for row in rows], random.Random(seed), []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    order = sorted(range(len(rows)), key=lambda at: (lengths[at], rng.random()))
    for length, group in itertools.groupby(order, key=lambda at: lengths[at]):
        same, size = list(group), max(1, tokens // length)
        buckets += [same[start:start + size] for start in range(0, len(same), size)]
    rng.shuffle(buckets)
    return [data_utils.collate(ids, labels, [rows[at] for at in bucket], pad) for bucket in buckets]


def neighbours(ids: list[list[int]], labels: list[int], rows: list[int], tokens: int, tokenizer) -> list[Batch]:
    """Makes batches of rows that follow each other, whatever their lengths; `tokens` counts pads."""
    found, first, width = [], 0, 0
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    for at, row in enumerate(rows):
        width = max(width, len(ids[row]))
        if at > first and width * (at + 1 - first) > tokens:
            found.append(rows[first:at])
            first, width = at, len(ids[row])
    return [data_utils.collate(ids, labels, some, pad) for some in [*found, rows[first:]]]


# ---------------------------------------------------------------- the language model that writes

class Writer(nn.Module):
    """A language model whose forward pass returns its loss on a batch that begins with the start token."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Outputs:
        hidden = self.lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, C)
        real = attention_mask[:, 1:].bool().to(hidden.device)
        logits = self.lm.lm_head(hidden[:, :-1][real]).float()  # (tokens, V)
        return Outputs(None, language=nn.functional.cross_entropy(logits, input_ids[:, 1:][real]))


def language_loss(outputs: Outputs, batch: Batch) -> Tensor:
    return outputs.language


def border(tokenizer) -> int:
    """Returns the token that stood between texts in pretraining: a text begins and ends with it."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    return tokenizer.get_vocab().get("<|endoftext|>", end)


def draw_sentences(lm, tokenizer, count: int, max_new_tokens: int, seed: int, check_stop: Callable[[], None]) -> list[str]:
    """Draws texts from nothing, at temperature 1 from all tokens; the same seed, the same texts.

    Args:
        check_stop: called after each step; raises where the process was asked to stop.

    Returns:
        `count` texts with single spaces; an empty one where the end did not come within `max_new_tokens`.
    """
    end = border(tokenizer)
    rows = speed.sample_tokens(lm, [[end]] * count, Sampling(seed=seed), max_new_tokens=max_new_tokens, end={end},
                               batch_size=TOGETHER, progress=lambda tokens: check_stop())
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) if row[-1] == end else "" for row in rows]
