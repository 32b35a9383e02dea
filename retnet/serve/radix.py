"""A radix tree of token sequences: edges hold tokens, and nodes are where sequences part, end or carry a value.

Sequences belong to groups: each group has a root of its own, and nothing is shared between groups. Tokens take 4 bytes
each and common prefixes are stored once. Nodes have no link to their parents, so that a dropped tree is freed at once.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

V = TypeVar("V")
NODE_BYTES = 512  # about what a node takes beside its tokens


@dataclass(eq=False)
class Node(Generic[V]):
    """The end of a prefix of `end` tokens. tokens: its last ones, after those of the parent. used: the time of use."""

    tokens: array
    end: int
    used: int = 0
    value: V | None = None
    children: "dict[int, Node[V]]" = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return NODE_BYTES + self.tokens.itemsize * len(self.tokens)


class RadixTree(Generic[V]):
    """Token sequences in groups, with a value at some of their prefixes.

    roots: the groups that have sequences. nbytes: the memory of all groups without the values.
    """

    def __init__(self):
        self.roots: dict[str, Node[V]] = {}
        self.nbytes = 0
        self._time = 0

    def insert(self, tokens: array, group: str = "") -> Node[V]:
        """The node at the end of `tokens`, made if there is none. All nodes on the way to it count as used."""
        self._time += 1
        node = self.roots.get(group)
        if node is None:
            node = self.roots[group] = Node[V](array("i"), 0)
            self.nbytes += _root_bytes(group)
        node.used = self._time
        while node.end < len(tokens):
            node = self._child(node, tokens)
            node.used = self._time
        return node

    def path(self, tokens: array, group: str = "") -> list[Node[V]]:
        """The nodes whose prefixes `tokens` begins with, shortest first."""
        node, found = self.roots.get(group), []
        while node is not None and node.end < len(tokens):
            child = node.children.get(tokens[node.end])
            if child is None or child.tokens != tokens[node.end : child.end]:
                break
            found.append(child)
            node = child
        return found

    def shared(self, tokens: array, group: str = "") -> int:
        """How many first tokens another sequence has too, if `tokens` and one more token are a sequence of the tree."""
        path = self.path(tokens, group)
        node = path[-1] if path else self.roots.get(group)
        if node is None:
            return 0
        if node.end < len(tokens):
            child = node.children.get(tokens[node.end])
            whole = child is not None and child.tokens[: len(tokens) - node.end] == tokens[node.end :]
            if child is not None and whole and (child.children or child.end > len(tokens) + 1):
                return len(tokens)
        return node.end

    def prune(self, nbytes: int) -> None:
        """Forget the sequences that were used least recently, down to `nbytes` if the prefixes with values allow it."""
        edges = sorted(self._edges(), key=lambda edge: (edge[1].used, -edge[1].end))
        for parent, node in edges:
            if self.nbytes <= nbytes:
                break
            if not node.children and node.value is None:  # a node is used whenever its children are: they come first
                del parent.children[node.tokens[0]]
                self.nbytes -= node.nbytes
        for group in [group for group, root in self.roots.items() if not root.children]:
            del self.roots[group]
            self.nbytes -= _root_bytes(group)

    def _child(self, node: Node[V], tokens: array) -> Node[V]:
        """The next node on the way from `node` to the end of `tokens`."""
        child = node.children.get(tokens[node.end])
        if child is None:
            return self._add(node, tokens[node.end :])
        shared = common_length(child.tokens, tokens[node.end : child.end])
        if shared == len(child.tokens):
            return child
        upper = self._add(node, child.tokens[:shared])
        child.tokens = child.tokens[shared:]
        upper.children[child.tokens[0]] = child
        self.nbytes -= shared * child.tokens.itemsize
        return upper

    def _add(self, node: Node[V], tokens: array) -> Node[V]:
        child = node.children[tokens[0]] = Node[V](tokens, node.end + len(tokens))
        self.nbytes += child.nbytes
        return child

    def _edges(self) -> Iterator[tuple[Node[V], Node[V]]]:
        """Every parent with each of its children."""
        nodes = list(self.roots.values())
        while nodes:
            node = nodes.pop()
            for child in node.children.values():
                yield node, child
                nodes.append(child)


def _root_bytes(group: str) -> int:
    return NODE_BYTES + 4 * len(group)


def common_length(a: array, b: array) -> int:
    """How many first tokens two sequences have in common. Takes time in proportion to them."""
    low, high, end = 0, 1, min(len(a), len(b))
    while low < end and a[low:high] == b[low:high]:  # in pieces of twice the length each
        low, high = min(high, end), min(2 * high, end)
    while high - low > 1:  # they differ inside [low, high) and agree before
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
