"""How many tokens the beginnings of prompts are, where answers have told.

Without a tokenizer a prompt's tokens are reckoned by one mean length of a token, learned for each
model. That is good for load, and poor for a single prompt: code, tables and most languages have two
to four times as many tokens to their octets as English prose has. But an answer tells how many
tokens its whole prompt had, and how many of them were cached; and what is cached of the next prompt
is nearly always one of just these beginnings: the turn before, the same head again. So both are
kept under the names of their points in the chain, for what is believed cached to be told in the
tokens that the engine will report.

A report of what was cached is taken as the length of what was believed cached only where it comes
near to its share of the prompt: an engine that has dropped a part, or has more than was believed,
tells of another beginning.
"""

from __future__ import annotations

from proxy.core import limits
from proxy.core.prefix import PrefixChain

NEAR_LOW, NEAR_HIGH = 0.6, 1.4  # of its share by octets; parts of a prompt differ in their text


class Lengths:
    """Tokens by the hash of a point; what was told longest ago is forgotten first.

    In two generations: a dict that loses its first key for each new one leaves holes that the next
    search for a first key passes over one by one.
    """

    __slots__ = ("_older", "_tokens")

    def __init__(self) -> None:
        self._tokens: dict[int, int] = {}
        self._older: dict[int, int] = {}

    def tokens_at(self, chain: PrefixChain, octets: int) -> int:
        """Return how many tokens the prompt has up to its point at `octets`; -1: nobody told."""
        for depth in range(len(chain.ends) - 1, -1, -1):
            if chain.ends[depth] <= octets:
                if chain.ends[depth] == octets and depth < len(chain.hashes):
                    name = chain.hashes[depth]
                    told = self._tokens.get(name, -1)
                    return told if told >= 0 else self._older.get(name, -1)
                break
        return -1

    def learn(
        self, chain: PrefixChain, cached_octets: int, prompt_tokens: int, cached_tokens: int
    ) -> None:
        """Take what an answer told of its prompt, of which `cached_octets` were believed cached."""
        whole = chain.prompt_bytes
        if prompt_tokens <= 0 or whole <= 0:
            return
        self._keep(chain, whole, prompt_tokens)
        share = prompt_tokens * cached_octets / whole
        if NEAR_LOW * share <= cached_tokens <= NEAR_HIGH * share and cached_tokens > 0:
            self._keep(chain, cached_octets, cached_tokens)

    def _keep(self, chain: PrefixChain, octets: int, tokens: int) -> None:
        for depth in range(len(chain.hashes) - 1, -1, -1):
            if chain.ends[depth] == octets:
                self._tokens[chain.hashes[depth]] = tokens
                if 2 * len(self._tokens) >= limits.LENGTHS_REMEMBERED_MAX:
                    self._older, self._tokens = self._tokens, {}
                return
            if chain.ends[depth] < octets:
                return
