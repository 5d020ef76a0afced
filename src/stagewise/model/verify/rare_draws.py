"""Python's and NumPy's random numbers at their ends, so that a rare draw decides while it is seen.

Problem: of `random() < 0.05` a few seeds show one side only, and a trace holds that for ever.
Idea: both draw from the Mersenne Twister (Matsumoto, Nishimura, TOMACS 1998), whose state is its
next 624 words, each scrambled by a matrix that has an inverse. So a state is made whose next
numbers are the least, the greatest, or next to the middle, where normal numbers are the largest.
"""

import random
import sys
from collections.abc import Callable

_WORDS, _CHOSEN, _TOP = 624, 312, 0xFFFFFFFF  # words after the chosen ones are random
# The two words of a number in [0, 1): 0, almost 1, and just above and below the middle.
_NUMBERS = ((0, 0), (_TOP, _TOP), (0x80000000, 0x40), (0x7FFFFFFF, _TOP))
NUM_SEEDS = 8  # that differ in what `seed_others` makes of them


def seed_others(seed: int) -> None:
    """Seed Python's and NumPy's random numbers; by 1 to 4, with numbers at the ends and middle."""
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


def others_as_they_are() -> Callable[[], None]:
    """What puts the states of Python's and NumPy's random numbers back."""
    numpy = sys.modules.get("numpy")
    state, others = random.getstate(), numpy.random.get_state() if numpy is not None else None

    def put_back() -> None:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(others)

    return put_back


def _unscrambled(word: int) -> int:
    """The word of a state that becomes `word`."""
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    found = word
    for _ in range(4):
        found = word ^ ((found << 7) & 0x9D2C5680)
    word = found & _TOP
    for _ in range(2):
        found = word ^ (found >> 11)
    return found
