"""Balance losses: pure functions of a routing's counts.

The loss is  G * sum_i f_i P_i  over G gates. f_i is the share of tokens that count as load of gate i, without
gradient; P_i is the gate's mean probability, with gradient. XMoE and Switch count first choices (Eq 7). AdaMoE counts
all choices and spreads the load of the null experts evenly over them (its Eq 6). MEO has another loss
(``SpreadTerms``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .ordering import count_indices


@dataclass(frozen=True)
class BalanceTerms:
    """Sums over the real tokens of one batch, which can be added over ranks.

    Attributes:
        load_G: float32, no gradient: number of tokens that count as load of each gate.
        prob_sum_G: float32 with gradient: sum over tokens of each gate's probability.
        num_tokens: float32 scalar, no gradient.
    """

    load_G: Tensor
    prob_sum_G: Tensor
    num_tokens: Tensor

    def loss(self) -> Tensor:
        """float32 scalar with gradient, unweighted."""
        return balance_loss(self)

    def counts(self) -> Tensor:
        """float32 vector without gradient, which data-parallel ranks add before the loss."""
        return torch.cat([self.load_G, self.num_tokens.view(1)])

    def with_counts(self, summed: Tensor) -> BalanceTerms:
        """The same terms with counts summed over ranks.

        The probability sums stay this rank's, because gradients are added over ranks.
        """
        return BalanceTerms(summed[:-1], self.prob_sum_G, summed[-1])


@dataclass(frozen=True)
class SpreadTerms:
    """Quantities that should be even over the experts; the loss is the sum of their squared coefficients of variation.

    Attributes:
        amount_QE: float32 with gradient, sums over the sentences of a batch; for MEO importance and load of each gate.

    Source: Shazeer et al., arXiv 1701.06538, as in MEO's released code.
    """

    amount_QE: Tensor

    def loss(self) -> Tensor:
        """Sum over Q of unbiased variance / mean^2; 0 for a single expert."""
        if self.amount_QE.size(1) < 2:
            return self.amount_QE.new_zeros(())
        return (self.amount_QE.var(dim=1) / (self.amount_QE.mean(dim=1) ** 2 + 1e-10)).sum()

    def counts(self) -> Tensor:
        """As in BalanceTerms."""
        return self.amount_QE.detach().flatten()

    def with_counts(self, summed: Tensor) -> SpreadTerms:
        """The amounts of all ranks, with the gradient of this rank's."""
        others_QE = summed.view_as(self.amount_QE) - self.amount_QE.detach()
        return SpreadTerms(self.amount_QE + others_QE)


def balance_loss(terms: BalanceTerms) -> Tensor:
    """G * sum_i f_i P_i, a float32 scalar with gradient; 1 per choice of a token if loads are even, 0 without tokens.

    Source: Eq 7 of arXiv 2403.18926 (as in Switch, arXiv 2101.03961); Eq 6 of arXiv 2406.13233.
    """
    tokens = terms.num_tokens.clamp(min=1)
    return terms.load_G.numel() * ((terms.load_G / tokens) * (terms.prob_sum_G / tokens)).sum()


def first_choice_terms(prob_TE: Tensor, first_T: Tensor, real_T: Tensor | None) -> BalanceTerms:
    """Terms of Eq 7: the load of an expert is the number of real tokens that choose it first (``first_T``)."""
    return _terms(_load(first_T, prob_TE.size(-1), real_T), prob_TE, real_T)


def null_averaged_terms(prob_TG: Tensor, gate_TK: Tensor, num_true: int, real_T: Tensor | None) -> BalanceTerms:
    """Terms of AdaMoE's Eq 6: all choices count as load; each null expert gets the mean load of the null experts.

    Args:
        prob_TG: float32, softmax over true experts, then null experts.
        gate_TK: int64, the chosen gates of each token.
        num_true: number of true experts; the other columns are null experts.
        real_T: bool, False at padding; None when nothing is padding.
    """
    load_G = _load(gate_TK, prob_TG.size(-1), None if real_T is None else real_T.unsqueeze(-1))
    if num_true < load_G.numel():
        load_G[num_true:] = load_G[num_true:].mean()
    return _terms(load_G, prob_TG, real_T)


def _load(gate: Tensor, num_gates: int, real: Tensor | None) -> Tensor:
    return count_indices(gate, num_gates, None if real is None else real.expand_as(gate)).float()


def _terms(load_G: Tensor, prob_TG: Tensor, real_T: Tensor | None) -> BalanceTerms:
    if real_T is None:
        tokens = prob_TG.new_full((), prob_TG.size(0))
        return BalanceTerms(load_G, prob_TG.sum(dim=0), tokens)
    # torch.where instead of a product, because NaN * 0 would bring a NaN at a padded position into the loss
    prob_sum_G = torch.where(real_T.unsqueeze(-1), prob_TG, 0.0).sum(dim=0)
    return BalanceTerms(load_G, prob_sum_G, real_T.sum().float())
