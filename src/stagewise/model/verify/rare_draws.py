"""Extreme random numbers of Python and NumPy, so that rare branches are taken while observed.

Problem: a few seeds only show one side of `random() < 0.05`, and a trace would keep that forever.
Idea: both use the Mersenne Twister (Matsumoto, Nishimura, TOMACS 1998), whose state is its next 624
words, each scrambled by an invertible matrix. So states are constructed whose next numbers are the
smallest, the largest, or next to the middle, where normal numbers are largest.
"""

import random
import sys
from collections.abc import Callable

_WORDS, _CHOSEN, _TOP = 624, 312, 0xFFFFFFFF  # words after the chosen ones are random
# The two words of a number in [0, 1): 0, almost 1, and just above and below the middle.
_NUMBERS = ((0, 0), (_TOP, _TOP), (0x80000000, 0x40), (0x7FFFFFFF, _TOP))
NUM_SEEDS = 8  # to try with `seed_others`


def seed_others(seed: int) -> None:
    """Seed Python's and NumPy's random numbers; seeds 1 to 4 yield extreme and middle numbers."""
    numpy = sys.modules.get("numpy")
    random.seed(seed)
    if numpy is not None:
        numpy.random.seed(seed)
    if not 1 <= seed <= len(_NUMBERS):
        return
    version, state, gauss = random.getstate()
    pair = [_unscrambled(word) for word in _NUMBERS[seed - 1]]
    words = (*pair * (_CHOSEN // 2), *state[_CHOSEN:_WORDS])
    random.setstate((version, (*words, 0), gauss))
    if numpy is not None:
        numpy.random.set_state(("MT19937", numpy.array(words, dtype=numpy.uint32), 0))


def save_others() -> Callable[[], None]:
    """Save the states of Python's and NumPy's random numbers; return a function to restore them."""
    numpy = sys.modules.get("numpy")
    state, others = random.getstate(), numpy.random.get_state() if numpy is not None else None

    def put_back() -> None:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(others)

    return put_back


def _unscrambled(word: int) -> int:
    """Return the state's word that is scrambled to `word`."""
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    found = word
    for _ in range(4):
        found = word ^ ((found << 7) & 0x9D2C5680)
    word = found & _TOP
    for _ in range(2):
        found = word ^ (found >> 11)
    return found
