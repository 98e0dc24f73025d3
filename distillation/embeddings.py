"""A student's first embeddings: its teacher's token embeddings, or means of its hidden states, reduced by PCA.

    FirstEmbeddings(plan).fill(student)                 # as --student-embeddings says
    embed_as(teacher, student, counts)                  # the teacher's token embeddings
    means = token_means(ids, hidden, vocab_size)
    embed_as(teacher, student, counts, means)           # the mean state of each token over its occurrences

The last after Bommasani et al. 2020, "Interpreting Pretrained Contextualized Representations via Reductions to Static
Embeddings", section 3.
"""
from __future__ import annotations

import torch
from torch import Tensor

from distillation.pca import principal_components
from distillation.stages import Plan
from distillation.teachers import HiddenStates
from distillation.vocabulary import row_means, token_counts, vocabulary_rows
from model import DistilRNN, TextClassifier

BLOCK = 5000  # sentences that are added at a time: their states are float64 for so long
RIDGE = 1e-4  # of the mean squared embedding: a direction that embeddings hardly have is not trusted


class FirstEmbeddings:
    """The vocabulary and the first embeddings of the student, from the sentences that train and the first teacher."""

    def __init__(self, plan: Plan):
        self.inputs, self.kind, self.means = plan.inputs, plan.options.student_embeddings, None
        size, ids = self.inputs.student.vocab_size, plan.sentences.ids[:plan.sentences.targeted]
        self.counts = token_counts(ids, size)  # (vocab_size,) of each token id
        # Once for both students: all hidden states are read.
        if self.kind == "contextual":
            self.means = token_means(ids, plan.sentences.hidden, size)

    def fill(self, student: DistilRNN) -> None:
        """Gives a new student its vocabulary and its first embeddings."""
        config = self.inputs.student
        # The rows first: the teacher's embeddings are reduced to them.
        if config.vocabulary:
            student.embedding.rows.copy_(vocabulary_rows(self.counts, config, self.inputs.tokenizer))
        if self.kind != "random":
            embed_as(self.inputs.teachers[0].model, student, self.counts, self.means)


@torch.no_grad()
def embed_as(teacher: TextClassifier, student: DistilRNN, counts: Tensor | None = None, means: Tensor | None = None) -> None:
    """Gives the student the teacher's token embeddings, reduced by PCA to its size and scaled to a variance of 1.

    The rows of a student with a vocabulary of its own are reduced, and no others; a row that tokens share is their mean.
    Tokens and dimensions that the teacher does not have keep the student's values.

    Args:
        counts: (vocab_size,) of each token id in the sentences that train; the teacher's embeddings of all tokens need none.
        means: (vocab_size, d), of `token_means`: they take the place of the embeddings.
    """
    embedding = student.embedding
    rows = teacher.net.base_model.get_input_embeddings().weight[:student.config.vocab_size].float().cpu()
    known, channels = torch.arange(len(rows)), rows.shape[1]
    if means is not None:
        # The last column becomes the share of a row's occurrences: 1, or 0 where none of its tokens occurs.
        rows = torch.cat([rows, means[:len(rows)], (counts[:len(rows)] > 0).float().unsqueeze(1)], 1)
    if embedding.rows is not None:
        rows, known = row_means(rows, counts, embedding.rows)
    if means is not None:
        rows = fill_in(rows[:, channels:-1], rows[:, :channels], rows[:, -1] > 0.5)
    size = min(student.config.embedding_size, rows.shape[1])
    pca = principal_components(rows, size)
    # One scale for all dimensions: the first components stay the largest.
    reduced = pca.reduce(rows) * pca.std
    embedding.weight[known, :size] = (reduced / reduced.std()).to(embedding.weight)
    # A frozen copy is one of the first vectors.
    if embedding.frozen is not None:
        embedding.frozen.copy_(embedding.weight)


def token_means(ids: list[list[int]], hidden: HiddenStates, vocab_size: int) -> Tensor:
    """Returns the mean hidden state of each token id, (vocab_size, d); zeros where it never occurs.

    Args:
        ids: token ids of the sentences with hidden states.
        hidden: reduced to principal components, and standardised; the means have the components' own scale again.
    """
    sums = torch.zeros(vocab_size, len(hidden.std), dtype=torch.float64)
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    # In the order of the states, which may lie in memory-mapped files: each part is read once.
    for rows in hidden.starts.argsort().split(BLOCK):
        tokens = torch.tensor([token for row in rows.tolist() for token in ids[row]])
        # The scores of a decoder's prefixes, which stand behind the states, are no part of a word's meaning.
        sums.index_add_(0, tokens, hidden.of(rows)[:, :len(hidden.std)].double())
        counts += torch.bincount(tokens, minlength=vocab_size)
    return (sums / counts.clamp(min=1).unsqueeze(1) * hidden.std).float()


def fill_in(means: Tensor, static: Tensor, seen: Tensor) -> Tensor:
    """Returns the means (R, d), those of rows that were not seen predicted from their static embeddings.

    The prediction is linear, by least squares over the rows that were seen, in float64.

    Args:
        static: (R, C), the teacher's token embeddings.
        seen: (R,) bool.
    """
    inputs, targets = static.double(), means.double()
    input_mean, target_mean = inputs[seen].mean(0), targets[seen].mean(0)
    centred = inputs[seen] - input_mean
    gram = centred.T @ centred
    # Fewer rows than channels determine no map without it.
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    linear = torch.linalg.solve(gram, centred.T @ (targets[seen] - target_mean))  # (C, d)
    return torch.where(seen.unsqueeze(1), targets, target_mean + (inputs - input_mean) @ linear).float()
