"""A gymnasium space of all texts, which flattens any of them and can be shared between processes."""
import string
import sys
from collections.abc import Sequence

import gymnasium
import numpy as np
from gymnasium.vector.utils import read_from_shared_memory


class Characters(Sequence):
    """All characters by their code points, as gymnasium's functions on text spaces ask for them."""

    def __len__(self):
        return sys.maxunicode + 1

    def __getitem__(self, code):
        return chr(code)


class AnyText(gymnasium.spaces.Text):
    """A text space that holds every string; gymnasium's own is limited to a character set and a length.

    Flattened, or in shared memory, a text is the code points of its first `max_length` characters. Samples are letters
    and digits.
    """
    character_set = character_list = Characters()

    def __init__(self, max_length=65536):
        super().__init__(max_length, min_length=0)

    def character_index(self, char):
        return np.int32(ord(char))

    def contains(self, x):
        return isinstance(x, str)

    def sample(self, mask=None, probability=None):
        if mask is not None or probability is not None:
            raise ValueError("A space of all texts takes neither a mask nor probabilities of characters.")
        letters = list(string.ascii_letters + string.digits)
        return "".join(self.np_random.choice(letters, self.np_random.integers(self.max_length + 1)))

    def __repr__(self):
        return f"AnyText({self.max_length})"

    def __eq__(self, other):
        return isinstance(other, AnyText) and self.max_length == other.max_length


@gymnasium.spaces.flatten.register(AnyText)
def flatten_text(space, text):
    """[max_length] int32: code points, and the number of all characters in the places that are left."""
    codes = np.full(space.max_length, len(space.character_set), dtype=np.int32)
    found = np.frombuffer(text[:space.max_length].encode("utf-32-le", "surrogatepass"), dtype="<i4")
    codes[:len(found)] = found
    return codes


class SharedTexts(Sequence):
    """The texts that are in shared memory at the moment; a deep copy is a tuple of them."""

    def __init__(self, codes):
        self.codes = codes               # [texts, max_length] int32, as `flatten_text` gives them

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, index):
        codes = self.codes[index]
        return codes[codes <= sys.maxunicode].astype("<i4").tobytes().decode("utf-32-le", "surrogatepass")

    def __deepcopy__(self, memo):
        return tuple(self)


@read_from_shared_memory.register(AnyText)
def read_shared_texts(space, shared_memory, n=1):
    """gymnasium reads texts once, when they are still empty, and trusts that what it got changes with the memory."""
    return SharedTexts(np.frombuffer(shared_memory.get_obj(), dtype=np.int32).reshape(n, space.max_length))
