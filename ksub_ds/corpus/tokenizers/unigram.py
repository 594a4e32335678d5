"""Exact unigram segmentation of many words at once.

SentencePiece adds log-probabilities in float32 along a whole document, so far into a long text it
breaks near ties by rounding, and differs from HuggingFace's tokenizers (float64, word by word) in a
few words per thousand documents. HuggingFace's own code is exact but slow. This module does the same
search as theirs (Viterbi in float64; the first of equals wins) over a whole batch of words in numpy:
a trie walk that finds every piece at every position, then one relaxation step per position in the
word, all words at once.

Legend: N pieces, W words, C characters of all words together, E edges (a piece at a position).
"""

import itertools
from typing import Any

import numpy as np

SPACE = "▁"  # SentencePiece's mark for the start of a word
UNKNOWN_PENALTY = 10.0  # an unknown character scores this much below the worst piece, as in SentencePiece
CHARACTERS_PER_PASS = 1 << 16  # the working arrays stay in the processor's cache
LONGEST_VECTORISED_WORD = 4096  # longer ones would make the loop over positions slow
LONG_STEP, LONG_OVERLAP = 1 << 16, 1 << 12  # characters of those at a time, and how much more is looked at

_CODE_BITS = 21  # a Unicode code point fits
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


class _Trie:
    """Prefix tree over code points; (node, character) -> node is an open-addressing hash table."""

    def __init__(self, pieces: list[str]):
        lengths = np.array([len(piece) for piece in pieces])
        codes = np.frombuffer("".join(pieces).encode("utf-32-le"), dtype="<u4").astype(np.uint64)
        starts = np.cumsum(lengths) - lengths
        node = np.zeros(len(pieces), dtype=np.uint64)  # node 0 is the root
        alive, keys, count = np.arange(len(pieces)), [], 1
        for depth in range(int(lengths.max())):
            alive = alive[lengths[alive] > depth]
            key = node[alive] << np.uint64(_CODE_BITS) | codes[starts[alive] + depth]
            unique, inverse = np.unique(key, return_inverse=True)
            node[alive] = count + inverse.astype(np.uint64)
            keys.append(unique)
            count += len(unique)
        self.piece = np.full(count, -1, dtype=np.int32)  # the piece that ends at a node
        self.piece[node.astype(np.int64)] = np.arange(len(pieces), dtype=np.int32)
        all_keys = np.concatenate(keys)
        self.has_children = np.zeros(count, dtype=bool)
        self.has_children[(all_keys >> np.uint64(_CODE_BITS)).astype(np.int64)] = True
        self.has_children[0] = False  # node 0 also says "no such node"
        self._fill(all_keys)
        self.root = np.zeros(1 << _CODE_BITS, dtype=np.int32)  # the node of a first character
        self.root[keys[0]] = 1 + np.arange(len(keys[0]), dtype=np.int32)

    def _fill(self, keys: np.ndarray) -> None:
        bits = max(4, int(3 * len(keys)).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._keys = np.full(1 << bits, _EMPTY, dtype=np.uint64)
        self._nodes = np.zeros(1 << bits, dtype=np.int32)
        pending = np.arange(len(keys))
        slot = (keys * _MULTIPLIER >> self._shift).astype(np.int64)
        while pending.size:
            free = self._keys[slot] == _EMPTY
            self._keys[slot[free]] = keys[pending[free]]  # of several for one slot the last stays
            placed = self._keys[slot] == keys[pending]
            self._nodes[slot[placed]] = pending[placed] + 1
            pending, slot = pending[~placed], (slot[~placed] + 1) & self._mask

    def child(self, node: np.ndarray, code: np.ndarray) -> np.ndarray:
        """The node reached from `node` by `code`, elementwise; 0 where there is none."""
        key = node.astype(np.uint64)
        key <<= np.uint64(_CODE_BITS)
        key |= code
        slot = (key * _MULTIPLIER >> self._shift).view(np.int64)
        found = self._keys.take(slot, mode="clip")
        hit = found == key
        result = self._nodes.take(slot, mode="clip")
        result *= hit
        pending = np.flatnonzero(hit == (found == _EMPTY))  # neither: another key lives in the slot
        slot = slot[pending]
        while pending.size:
            slot = (slot + 1) & self._mask
            found = self._keys[slot]
            hit = found == key[pending]
            result[pending[hit]] = self._nodes[slot[hit]]
            going = hit == (found == _EMPTY)
            pending, slot = pending[going], slot[going]
        return result


class UnigramSegmenter:
    """Best segmentation of words under a unigram language model.

    Args:
        pieces: N different strings; none holds the SPACE mark after its first character.
        scores: (N,) log-probabilities.
        ids: (N,) token ids of the pieces.
        unk_id: token id of a character that no piece covers; neighbours merge into one.
        worst_score: lowest score of the whole vocabulary, special tokens included.
    """

    def __init__(self, pieces: list[str], scores: np.ndarray, ids: np.ndarray, unk_id: int, worst_score: float):
        self._trie = _Trie(pieces)
        # One more entry stands for the unknown character.
        self._scores = np.append(np.asarray(scores, dtype=np.float64), worst_score - UNKNOWN_PENALTY)
        self._ids = np.append(np.asarray(ids, dtype=np.int32), np.int32(unk_id))
        self._pieces, self._unk_id = pieces, unk_id
        self._long_words: Any = None  # made when first needed

    def segment(self, words: list[str]) -> list[bytes]:
        """Token ids of each word (given without its leading SPACE mark) as little-endian int32 bytes."""
        results: list[bytes] = []
        first = size = 0
        for index, word in enumerate(words):
            if len(word) > LONGEST_VECTORISED_WORD:
                results += self._segment_pass(words[first:index])
                results.append(self._segment_long(word))
                first, size = index + 1, 0
                continue
            size += len(word) + 1
            if size > CHARACTERS_PER_PASS:
                results += self._segment_pass(words[first : index + 1])
                first, size = index + 1, 0
        return results + self._segment_pass(words[first:])

    def _segment_long(self, word: str) -> bytes:
        """One very long word by HuggingFace's compiled form of the same search, in bounded memory.

        It goes LONG_STEP characters at a time: a step ends at a border between pieces with LONG_OVERLAP characters
        after it still seen, and the next begins there. The result is that of one search over the whole word
        unless a choice of pieces hangs on text that is further away than that.
        """
        from tokenizers import models

        if self._long_words is None:
            vocabulary = list(zip(self._pieces, self._scores[:-1].tolist(), strict=True))
            worst = self._scores[-1] + UNKNOWN_PENALTY
            self._long_words = models.Unigram([*vocabulary, ("", worst)], len(vocabulary), False)
        text, begin = SPACE + word, 0
        parts: list[np.ndarray] = []
        while begin < len(text):
            seen = text[begin : begin + LONG_STEP + LONG_OVERLAP]
            tokens = self._long_words.tokenize(seen)
            ids = self._ids[[token.id for token in tokens]]
            ends = np.cumsum([len(token.value) for token in tokens])
            if begin + len(seen) < len(text):
                # Unknown characters are one token, however many: that one may be cut anywhere.
                count = int(np.searchsorted(ends, LONG_STEP, side="right"))
                inside = count < len(ids) and ids[count] == self._unk_id
                begin += LONG_STEP if inside else int(ends[count - 1])
                ids = ids[: count + inside]
            else:
                begin = len(text)
            if parts and parts[-1][-1] == self._unk_id == ids[0]:
                parts[-1] = parts[-1][:-1]
            parts.append(ids)
        return np.concatenate(parts).astype("<i4").tobytes()

    def _segment_pass(self, words: list[str]) -> list[bytes]:
        if not words:
            return []
        text = (SPACE + SPACE.join(words) + SPACE).encode("utf-32-le")
        codes = np.frombuffer(text, dtype="<u4").astype(np.uint64)
        first = np.flatnonzero(codes == ord(SPACE))  # (W + 1,)
        first, last = first[:-1], first[1:]
        source, length, piece, position = self._edges(codes, first, last)
        # Word w's characters first[w]..last[w] have the graph nodes first[w]+w .. last[w]+w.
        word_index = np.arange(len(words))
        back = self._relax(source, source + length, piece, position, first + word_index, len(codes) + len(words))
        return self._trace(back, source, piece, first + word_index, last + word_index)

    def _edges(
        self, codes: np.ndarray, first: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Every piece at every position: (E,) source node, length, piece, position in its word; by position."""
        place = np.arange(len(codes) - 1)
        node = self._trie.root.take(codes[:-1].view(np.int64), mode="clip")
        unknown = np.flatnonzero(self._trie.piece[node] < 0)  # node 0, no piece, counts as well
        parts = [(unknown, 1, np.full(len(unknown), len(self._pieces), dtype=np.int32))]
        length = 1
        while place.size:
            piece = self._trie.piece.take(node, mode="clip")
            hit = np.flatnonzero(piece >= 0)
            parts.append((place[hit], length, piece[hit]))
            # After a word comes the next word's mark, which no piece holds inside: no walk leaves its word.
            going = np.flatnonzero(self._trie.has_children.take(node, mode="clip"))
            place = place[going]
            node = self._trie.child(node[going], codes.take(place + length))
            alive = np.flatnonzero(node)
            place, node, length = place[alive], node[alive], length + 1
        character = np.concatenate([part[0] for part in parts])
        piece = np.concatenate([part[2] for part in parts])
        size = np.repeat([part[1] for part in parts], [len(part[0]) for part in parts])
        word = np.repeat(np.arange(len(first)), last - first)
        position = (character - first[word[character]]).astype(np.int16)
        order = np.argsort(position, kind="stable")
        source = character + word[character]
        return source[order], size[order], piece[order], position[order]

    def _relax(
        self,
        source: np.ndarray,
        target: np.ndarray,
        piece: np.ndarray,
        position: np.ndarray,
        first_node: np.ndarray,
        num_nodes: int,
    ) -> np.ndarray:
        """Viterbi forwards; (nodes,) the edge by which the best path enters each node."""
        best = np.full(num_nodes, -np.inf)
        best[first_node] = 0.0
        back = np.full(num_nodes, -1, dtype=np.int64)
        score = self._scores[piece]
        bounds = np.searchsorted(position, np.arange(int(position[-1]) + 2))
        for begin, stop in itertools.pairwise(bounds.tolist()):
            # Edges of one position start at different nodes or have different lengths: no target twice.
            goal = target[begin:stop]
            candidate = best[source[begin:stop]] + score[begin:stop]
            better = np.flatnonzero(candidate > best[goal])
            best[goal[better]] = candidate[better]
            back[goal[better]] = begin + better
        return back

    def _trace(
        self, back: np.ndarray, source: np.ndarray, piece: np.ndarray, first: np.ndarray, node: np.ndarray
    ) -> list[bytes]:
        """Follow the best paths back from the words' ends and cut the ids word by word."""
        word = np.arange(len(first))
        counts = np.zeros(len(first), dtype=np.int64)
        steps = []
        while word.size:
            edge = back[node]
            steps.append((word, self._ids[piece[edge]]))
            counts[word] += 1
            node = source[edge]
            more = np.flatnonzero(node != first[word])
            word, node = word[more], node[more]
        ends = np.cumsum(counts)
        ids = np.empty(int(ends[-1]), dtype="<i4")
        for step, (word, token) in enumerate(steps):
            ids[ends[word] - 1 - step] = token
        unknown = ids == self._unk_id
        if unknown.any():  # neighbouring unknown characters of a word are one token
            owner = np.repeat(np.arange(len(first)), counts)
            keep = ~(unknown[1:] & unknown[:-1] & (owner[1:] == owner[:-1]))
            keep = np.append(True, keep)
            ids, ends = ids[keep], np.cumsum(np.bincount(owner[keep], minlength=len(first)))
        raw, cuts = ids.tobytes(), [0, *(4 * ends).tolist()]
        return [raw[a:b] for a, b in itertools.pairwise(cuts)]
