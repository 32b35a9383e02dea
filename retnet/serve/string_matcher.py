"""String matcher: many strings searched in a text that grows, at a cost per character that does not depend on them.

The automaton of Aho and Corasick (1975). A state is the longest end of the text that begins one of the strings.
"""

from array import array
from collections.abc import Sequence

CHARACTERS = 0x110000  # code points of Unicode


class StringMatcher:
    """The automaton of the strings; state 0 is the beginning of a text.

    depth: characters of each state. longest: length of the longest string that ends with the state's last character.
    About 130 bytes per character of the strings.
    """

    def __init__(self, strings: Sequence[str]):
        self._edges: dict[int, int] = {}  # state and next character -> longer state
        self._shorter = array("i", [0])  # the longest other state that ends a state
        self.depth, self.longest = array("i", [0]), array("i", [0])
        parents, characters = array("i", [0]), array("i", [0])
        for string in strings:
            state = 0
            for character in map(ord, string):
                after = self._edges.setdefault(state * CHARACTERS + character, len(parents))
                if after == len(parents):
                    parents.append(state)
                    characters.append(character)
                    self.depth.append(self.depth[state] + 1)
                    self.longest.append(0)
                state = after
            self.longest[state] = len(string)
        self._shorter.extend([0] * (len(parents) - 1))
        for state in sorted(range(1, len(parents)), key=self.depth.__getitem__):
            if parents[state]:
                self._shorter[state] = self._after(self._shorter[parents[state]], characters[state])
            self.longest[state] = self.longest[state] or self.longest[self._shorter[state]]

    def after(self, state: int, character: str) -> int:
        """The state after one more character."""
        return self._after(state, ord(character))

    def _after(self, state: int, character: int) -> int:
        while True:
            longer = self._edges.get(state * CHARACTERS + character)
            if longer is not None or not state:
                return longer or 0
            state = self._shorter[state]
