"""How long each replica takes from one token of a stream to the next, and with a stream more.

A step of decoding reads the weights once for all streams, and then the context of each: its time is
a part that does not depend on their number, and one that grows with it. Both are learned from the
answers of the replica itself, as the line that fits times best to numbers of streams, with the
older ones forgotten (exponentially weighted least squares). Until numbers have differed there is no
slope to be known, and the time is taken for what it was. It never grows faster than the number of
streams: what many of them share is not computed again for one more.
"""

from __future__ import annotations

from proxy.core import claim_limits, limits


class Pacing:
    """Seconds between tokens, by slot."""

    def __init__(self) -> None:
        self.s_per_token: list[float] = []  # as it was of late; 0: not known
        self._streams: list[float] = []  # how many it had then
        self._variance: list[float] = []  # of their number
        self._covariance: list[float] = []  # of their number and that time
        self.answer_tokens: list[float] = []  # of an answer, at the mean of late

    def open(self, slot: int) -> None:
        """A replica has taken the slot."""
        for table in (self.s_per_token, self._streams, self._variance, self._covariance):
            while len(table) <= slot:
                table.append(0.0)
            table[slot] = 0.0
        while len(self.answer_tokens) <= slot:
            self.answer_tokens.append(0.0)
        self.answer_tokens[slot] = claim_limits.OUTPUT_TOKENS_DEFAULT

    def learn(self, slot: int, streams: int, seconds: float) -> None:
        """An answer took so long a token, and ended among so many streams, itself one of them."""
        if not self.s_per_token[slot]:
            self.s_per_token[slot], self._streams[slot] = seconds, float(streams)
            return
        share = limits.LEARN_SHARE
        more, longer_s = streams - self._streams[slot], seconds - self.s_per_token[slot]
        self._streams[slot] += share * more
        self.s_per_token[slot] += share * longer_s
        kept = 1.0 - share
        self._variance[slot] = kept * (self._variance[slot] + share * more * more)
        self._covariance[slot] = kept * (self._covariance[slot] + share * more * longer_s)

    def learn_length(self, slot: int, tokens: int) -> None:
        """An answer had so many tokens."""
        self.answer_tokens[slot] += limits.LEARN_SHARE * (tokens - self.answer_tokens[slot])

    def stall(self, slot: int, requests: float) -> float:
        """Return what a second of prefill costs so many requests that are there before it.

        Each of their tokens comes later by its part of that second. Those who still wait are under
        them, because engines compute prompts first: they will have begun to answer by then. Beyond
        a number, and so where all replicas have as many, one more there makes no difference. What
        has one token, or none, as an embedding, is over with its prompt.
        """
        tokens = self.answer_tokens[slot]
        if tokens < limits.STREAM_FEWEST_TOKENS:
            return 0.0
        stalled = limits.STALL_WEIGHT * requests / max(tokens, limits.ANSWER_FEWEST_TOKENS)
        return min(stalled, limits.STALL_SHARE_MAX)

    def expected_s(self, slot: int, streams: int) -> float:
        """Return the time between tokens among so many streams; 0: not known."""
        seconds, usual = self.s_per_token[slot], self._streams[slot]
        if not seconds or self._variance[slot] < claim_limits.PACE_SPREAD_COUNT_MIN:
            return seconds
        slope_s = max(0.0, self._covariance[slot] / self._variance[slot])
        slope_s = min(slope_s, seconds / max(1.0, usual))
        return seconds + slope_s * (streams - usual)

    def late_s(self, slot: int, streams: int, wanted_s: float) -> float:
        """Return by how much an answer of ordinary length would be later than its client wants."""
        over_s = self.expected_s(slot, streams) - wanted_s
        return over_s * claim_limits.OUTPUT_TOKENS_DEFAULT if over_s > 0.0 else 0.0
