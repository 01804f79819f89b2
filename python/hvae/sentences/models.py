"""A recurrent network that predicts sentences word by word, and the auto-encoder with it as the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.densities import standard_normal_divergence, standard_normal_log_prob
from hvae.importance import Scored
from hvae.sentences.data import BEGIN, END, PADDING, UNKNOWN, Batch

#: How many logits are computed at once.
LARGEST = 1 << 24


class SentenceModel(nn.Module):
    """``z ~ N(0, I)``; ``p(x | z) = prod_t p(x_t | x_1 .. x_{t-1}, z)`` by an LSTM, ended by a word of its own.

    q(z | x) is Gaussian, from the state that another LSTM has after the last word. z gives the decoder's first state,
    and stands beside each word that it reads. Without latent dimensions z is empty, and all but the recurrent network
    falls away. An inputless decoder reads the unknown word in every place.

    Args:
        vocabulary: number of words, those of ``data.SPECIAL`` among them.
        latent, embedding, hidden: dimensions of z, of a word and of the states.
        inputless: whether the decoder never sees a word.

    Source: Bowman et al., Generating sentences from a continuous space, arXiv 1511.06349.
    """

    def __init__(self, vocabulary: int, latent: int, embedding: int, hidden: int, inputless: bool = False):
        super().__init__()
        self.latent, self.inputless = latent, inputless
        if latent:
            self.read = nn.Embedding(vocabulary, embedding)
            self.encoder = nn.LSTM(embedding, hidden, batch_first=True)
            self.posterior = nn.Linear(hidden, 2 * latent)
            self.first = nn.Linear(latent, 2 * hidden)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.decoder = nn.LSTM(embedding + latent, hidden, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, batch: Batch, noise: Tensor, dropped: Tensor | None = None) -> Scored:
        """Standard normals ``(B, latent)``; words ``(B, T)`` that the decoder is not to see, or None."""
        loc, log_scale = self.encode(batch)
        z = loc + log_scale.exp() * noise
        divergence = standard_normal_divergence(loc, log_scale)
        log_ratio = standard_normal_log_prob(z) - standard_normal_log_prob(noise) + log_scale.sum(-1)
        return Scored(self.log_likelihood(batch, z, dropped), divergence, log_ratio)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of ``q(z | x)``, ``(B, latent)``."""
        if not self.latent:
            nothing = self.output.weight.new_zeros(len(batch.words), 0)
            return nothing, nothing
        states, _ = self.encoder(self.read(batch.words))
        last = states[torch.arange(len(states)), batch.lengths - 1]  # padding comes after it
        loc, log_scale = self.posterior(last).chunk(2, -1)
        return loc, log_scale

    def log_likelihood(self, batch: Batch, z: Tensor, dropped: Tensor | None = None) -> Tensor:
        """``log p(x | z)``, ``(B,)``: of the words and the end, and of nothing behind it."""
        words, lengths = batch
        seen = words if dropped is None else words.masked_fill(dropped, UNKNOWN)
        states, _ = self._decode(F.pad(seen, (1, 0), value=BEGIN), z, self._begin(z))
        targets = F.pad(words, (0, 1), value=PADDING).scatter(1, lengths.unsqueeze(1), END)
        row, place = (torch.arange(targets.shape[1]) <= lengths.unsqueeze(1)).nonzero(as_tuple=True)
        # torch's linear_cross_entropy in chunks took 1.0 to 1.8 times as long at 250 to 20,000 words
        at_a_time = max(1, LARGEST // self.output.out_features)
        parts = zip(states[row, place].split(at_a_time), targets[row, place].split(at_a_time), strict=True)
        losses = torch.cat([F.cross_entropy(self.output(part), target, reduction="none") for part, target in parts])
        return losses.new_zeros(len(words)).index_add(0, row, -losses)

    @torch.no_grad()
    def generate(self, z: Tensor, longest: int, uniform: Tensor | None = None) -> Tensor:
        """Sentences ``(B, <= longest)`` with their ends: the likeliest word each time, or by ``uniform (longest, B)``.

        What follows an end is padding.
        """
        state = self._begin(z)
        word = torch.full((len(z), 1), BEGIN)
        ended = torch.zeros(len(z), dtype=torch.bool)
        found = []
        for place in range(longest):
            states, state = self._decode(word, z, state)
            logits = self.output(states[:, -1])
            if uniform is None:
                chosen = logits.argmax(-1)
            else:
                shares = logits.double().softmax(-1).cumsum(-1)
                chosen = torch.searchsorted(shares, uniform[place].double().unsqueeze(1)).squeeze(1)
                chosen = chosen.clamp(max=logits.shape[-1] - 1)
            chosen = chosen.masked_fill(ended, PADDING)
            found.append(chosen)
            ended = ended | (chosen == END)
            if ended.all():
                break
            word = chosen.unsqueeze(1)
        return torch.stack(found, 1)

    def _begin(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.latent:
            return None
        hidden, cell = self.first(z).unsqueeze(0).chunk(2, -1)
        return hidden.tanh().contiguous(), cell.contiguous()

    def _decode(self, words: Tensor, z: Tensor, state: tuple[Tensor, Tensor] | None):
        """States ``(B, T, hidden)`` after each word that is read, and the last with its cells."""
        if self.inputless:
            words = torch.where(words == BEGIN, BEGIN, UNKNOWN)
        read = self.embedding(words)
        if self.latent:
            read = torch.cat([read, z.unsqueeze(1).expand(-1, words.shape[1], -1)], -1)
        return self.decoder(read, state)
