"""When unusable samples stop a run: `data.max_skipped_fraction`, read as a share of all the data.

Two rules, neither of which depends on how many ranks there are:

- The share is judged by the samples of all ranks together, and with a margin: the run stops when
  they are too many to be chance if no more than the limit were bad. At a limit of 0.1 that is 7
  samples of which all are bad, about 390 of which a fifth is, or 5800 of which an eighth is. A
  limit of 0 needs no margin: the first unusable sample exceeds it. A limit of 1 is never exceeded.
- A rank gives up when it meets nothing but unusable samples for so long that waiting has no sense:
  100 in a row at a limit up to 0.75, more at higher ones, and 10 000 at a limit of 1. Without it
  the other ranks would wait for a rank whose images are all missing.
"""

import math

from megatron_dattn.errors import DataError

# A run in which no more than the limit is bad is stopped, ever, with at most these probabilities.
_CHANCE_OF_ALL = 1e-6
_CHANCE_OF_A_RANK = 1e-12  # per place in a rank's stream, of which a run has many

_FEWEST_IN_A_ROW, _MOST_IN_A_ROW = 100, 10_000


def exceeds(num_bad: int, num_seen: int, limit: float) -> bool:
    """Whether more than the share `limit` of the data must be bad.

    The samples are looked at after every step, so a bound that holds at one time only would be
    crossed by chance some day. This one holds at all times together: it is Ville's inequality for
    the likelihood ratio of the counts under Krichevsky and Trofimov's mixture of all shares, whose
    logarithm is within log(n) / 2 + log(2) of n times the relative entropy.
    """
    if num_bad <= limit * num_seen:
        return False
    if limit == 0.0:
        return True
    needed = -math.log(_CHANCE_OF_ALL) + math.log(num_seen) / 2 + math.log(2)
    return num_seen * _relative_entropy(num_bad / num_seen, limit) > needed


def _relative_entropy(share: float, limit: float) -> float:
    """Of drawing bad samples with one probability, to another, in nats; 0 < limit < share."""
    rest = (1 - share) * math.log((1 - share) / (1 - limit)) if share < 1 else 0.0
    return share * math.log(share / limit) + rest


def most_in_a_row(limit: float) -> int:
    """Unusable samples in a row after which a rank gives up."""
    if limit == 0.0:
        return _FEWEST_IN_A_ROW
    if limit == 1.0:
        return _MOST_IN_A_ROW
    by_chance = math.ceil(math.log(_CHANCE_OF_A_RANK) / math.log(limit))
    return max(_FEWEST_IN_A_ROW, min(_MOST_IN_A_ROW, by_chance))


def check_share(skipped: dict[str, int], num_seen: int, limit: float) -> None:
    """Judge the counts of all ranks.

    Args:
        skipped: unusable samples by reason.
        num_seen: samples, used and unusable ones.

    Raises:
        DataError: the limit is exceeded.
    """
    num_bad = sum(skipped.values())
    if exceeds(num_bad, num_seen, limit):
        raise DataError(
            f"{num_bad} of {num_seen} samples could not be used ({describe(skipped)}), more than "
            f"data.max_skipped_fraction {limit:g} allows; tools/check_data.py lists them"
        )


def describe(skipped: dict[str, int]) -> str:
    """The reasons that occurred with their numbers, the most frequent first."""
    by_number = sorted(skipped.items(), key=lambda item: -item[1])
    return ", ".join(f"{reason} {number}" for reason, number in by_number if number)
