"""The gradient noise scale: how large a batch is before further samples hardly improve its gradient.

McCandlish et al. 2018 (arXiv 1812.06162), section 2.2 and appendix A.1. The gradient of a batch of b tokens
has E|G_b|^2 = |G|^2 + tr(Sigma) / b, with G the gradient on all data and Sigma its covariance from one token
to another, so that the norms at two sizes give both; B_simple = tr(Sigma) / |G|^2. Neither estimate is good
alone, and the mean of ratios is not the ratio of means: each is averaged over many steps before they are
divided. The batches are to be independent draws: of a stream whose neighbours are alike, or where a mixture
deals out every batch in the same shares, the scale says less.

A batch's gradient is the mean over its labels, so sizes are counted in labels. Where sequences hold equally
many this is exact. Else (masked tokens, padding) it is exact for noise that is independent from label to
label, and otherwise to first order in one over the number of sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

DECAY = 0.95  # of the averages from one measurement to the next: they are of the last 20


@dataclass(frozen=True)
class Estimate:
    """Of one measurement, without bias, so that either may come out negative.

    gradient_sq: |G|^2. trace: tr(Sigma), times one unit of the sizes that it was made from.
    """

    gradient_sq: float
    trace: float


def estimate(small_sq: float, small: float, big_sq: float, big: float) -> Estimate:
    """From the squared gradient norms of two batches, and their sizes; the small one may be part of the
    big one."""
    return Estimate(
        gradient_sq=(big * big_sq - small * small_sq) / (big - small),
        trace=(small_sq - big_sq) / (1 / small - 1 / big),
    )


@dataclass(frozen=True)
class Averages:
    """Exponential averages of estimates, both with the same weights, which drop out of their ratio."""

    gradient_sq: float = 0.0
    trace: float = 0.0

    def after(self, new: Estimate) -> Averages:
        """With one more estimate."""
        return Averages(
            DECAY * self.gradient_sq + (1 - DECAY) * new.gradient_sq,
            DECAY * self.trace + (1 - DECAY) * new.trace,
        )

    @property
    def scale(self) -> float | None:
        """B_simple, in the unit of the estimates' sizes; None where the noise drowns what is measured."""
        return self.trace / self.gradient_sq if self.gradient_sq > 0 and self.trace > 0 else None
