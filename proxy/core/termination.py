"""How a request ended, in two letters of the access log, as HAProxy's log has them.

The first says who ended it, the second how far it had come:

    -  nobody: it was answered          C  the client went away        c  the client was too slow
    L  the proxy answered it itself     P  refused: it may not, or is wrong
    R  refused for want of room         S  the replica, or there is none   s  a time ran out
    I  a fault of the proxy

    -  the end   R  its head and body   Q  waiting for a replica   C  connecting
    H  sent, no answer yet              D  the answer is under way

So `CD` is a client that left a stream, `SH` a replica that died before it answered, `sQ` the time
limit of the queue. HAProxy's manual explains its own in "Session state at disconnection".
"""

from __future__ import annotations

from typing import Final

from proxy import errors
from proxy.core.retry import Progress

# Who ended it, by outcome; whatever is not here was refused by a rule (P).
_WHO: Final = {
    errors.OK: "-",
    errors.CLIENT_GONE: "C",
    errors.STREAM_CUT: "S",
    errors.RequestTimeoutError.code: "c",
    errors.ReplicaUnreachableError.code: "S",
    errors.ReplicaLostError.code: "S",
    errors.BadReplicaAnswerError.code: "S",
    errors.NoReplicaError.code: "S",
    errors.NotAwakeError.code: "S",
    errors.OfflineUnreachableError.code: "S",
    errors.OfflineLostError.code: "S",
    errors.OfflineReadLostError.code: "S",
    errors.ReplicaTimeoutError.code: "s",
    errors.QueueTimeoutError.code: "s",
    errors.DeadlineExceededError.code: "s",
    errors.OfflineTimeoutError.code: "s",
    errors.OverloadedError.code: "R",
    errors.QueueFullError.code: "R",
    errors.NoSpareError.code: "R",
    errors.PreemptedError.code: "R",
    errors.DrainingError.code: "R",
    errors.InternalError.code: "I",
}
_HOW_FAR: Final = {
    Progress.CHOOSING: "R",
    Progress.QUEUED: "Q",
    Progress.CONNECTING: "C",
    Progress.REQUEST_SENT: "H",
    Progress.RESPONSE_STARTED: "D",
}


def termination(outcome: str, progress: Progress, *, local: bool) -> str:
    """Return the two letters. `local`: the proxy answers this path itself."""
    if outcome == errors.OK:
        return "L-" if local else "--"
    who = _WHO.get(outcome, "P")
    if who == "S" and progress is Progress.CHOOSING:
        return "SC"  # there is nobody to connect to; HAProxy says so, too
    return who + _HOW_FAR[progress]
