"""The radix tree: against plain lists of token sequences."""

import random
from array import array

import pytest

from retnet.serve.radix import NODE_BYTES, RadixTree, common_length


def tokens_of(text: str) -> array:
    return array("i", list(text.encode()))


@pytest.mark.parametrize("alphabet", ["a", "ab", "abcdefgh"])
def test_paths_end_where_earlier_sequences_part_or_end(alphabet):
    rng, tree, seen = random.Random(len(alphabet)), RadixTree(), []
    for _ in range(150):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 12)))
        node = tree.insert(tokens_of(text))
        seen.append(text)
        assert node.end == len(text)
        assert tree.insert(tokens_of(text)) is node
        query = "".join(rng.choices(alphabet, k=12))
        beginnings = {query[:n] for n in range(1, 13)}
        following = {start: {s[len(start)] for s in seen if s.startswith(start) and s != start} for start in beginnings}
        expected = sorted(len(start) for start in beginnings if start in seen or len(following[start]) > 1)
        found = tree.path(tokens_of(query))
        assert [node.end for node in found] == expected
        assert [len(node.children) for node in found] == [len(following[query[: node.end]]) for node in found]


def test_the_least_recently_used_sequences_are_forgotten_first_and_values_never():
    tree = RadixTree()
    for n in range(10):
        tree.insert(tokens_of(f"common{n}"))
    tree.insert(tokens_of("common0")).value = "kept"
    tree.insert(tokens_of("common1"))
    full = tree.nbytes
    assert full == 12 * NODE_BYTES + 4 * (6 + 10)
    tree.prune(full - 1)
    assert [len(tree.path(tokens_of(f"common{n}"))) for n in range(10)] == [2, 2, 1, 2, 2, 2, 2, 2, 2, 2]
    tree.prune(NODE_BYTES + 3 * (NODE_BYTES + 40))
    assert [len(tree.path(tokens_of(f"common{n}"))) for n in range(3)] == [2, 2, 1]
    tree.prune(0)
    assert [node.value for node in tree.path(tokens_of("common0"))] == [None, "kept"]
    assert tree.nbytes == 3 * NODE_BYTES + 4 * 7


@pytest.mark.parametrize("alphabet", ["a", "ab"])
def test_what_a_sequence_shares_with_others_is_known_up_to_its_last_token(alphabet):
    rng = random.Random(1)
    for _ in range(200):
        texts = list({"".join(rng.choices(alphabet, k=rng.randint(1, 9))) for _ in range(4)})
        tree = RadixTree()
        for text in texts:
            tree.insert(tokens_of(text))
        own = rng.choice(texts)
        common = [common_length(tokens_of(own[:-1]), tokens_of(text)) for text in texts if text != own]
        assert tree.shared(tokens_of(own[:-1])) == max(common, default=0), (own, texts)


def test_the_common_length_of_two_sequences():
    rng = random.Random(0)
    for _ in range(300):
        a, b = (array("i", rng.choices(range(2), k=rng.randint(0, 9))) for _ in range(2))
        expected = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        assert common_length(a, b) == expected
