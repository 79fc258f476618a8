"""Every bound on what has a claim on the fleet: credentials, tenants, classes, other regions.

As in `limits`, whose rule holds here too: each bounds something, and says why it is what it is.
"""

from __future__ import annotations

from typing import Final

from proxy.core.limits import KIB

# --- requests -------------------------------------------------------------------------------

# A key has some 60 octets; a token of an identity provider with groups and roles, a few KiB.
CREDENTIAL_BYTES_MAX: Final = 8 * KIB
# A provider's key has some 400 octets, with its certificates a few KiB, and few are in force.
JWKS_BYTES_MAX: Final = 256 * KIB
JWKS_KEYS_MAX: Final = 64
# Tokens whose verification a worker remembers; each is some 100 octets of digest and a principal.
TOKENS_REMEMBERED_MAX: Final = 16_384
# Times beyond it are none: the year 5138.
UNIX_S_MAX: Final = 1e11

# --- responses ------------------------------------------------------------------------------

# Of an answer in which a tier has to be told: a whole one, or a line of a stream. It has room for
# some 50,000 tokens of text.
TIER_HELD_BYTES_MAX: Final = 256 * KIB

# --- routing --------------------------------------------------------------------------------

# Tokens that a body may ask for; whoever writes more means no number. `_scan.c` has it, too.
OUTPUT_TOKENS_MAX: Final = 1_000_000_000
# How long OpenAI's and Anthropic's clients listen unless they are told otherwise (`_constants.py`,
# `client.ts`): ten minutes, which nobody has chosen.
CLIENT_PATIENCE_DEFAULT_S: Final = 600.0
PACE_SPREAD_COUNT_MIN: Final = 0.25  # of a number of streams, before it tells what one more costs

# --- what tenants may have --------------------------------------------------------------------

# When to come again who was refused for what others of its tenant have running: nobody knows when
# one of them ends, and a second is what the official clients wait at first.
CLAIM_RETRY_S: Final = 1.0
# An answer whose request does not bound it is reckoned as its tenant's mean, which begins here.
COMPLETION_PRIOR_TOKENS: Final = 256
COMPLETION_TOKENS_BELIEVED_MAX: Final = 8192
# Series of tenants and models that a worker counts; those after them are counted as `other`.
TENANT_SERIES_MAX: Final = 1024

# --- late binding ---------------------------------------------------------------------------

# Who waits and has said no deadline stands among those who have as if it were so long after it
# came: a reader's patience with a page (Nielsen 1993: ten seconds keep attention, one second the
# flow of thought), and longer than a proxy that is not overloaded ever holds anybody.
OBJECTIVE_S: Final = 2.0
# One with a deadline far ahead lets others of its class go first by so much at the most: less than
# classes lie apart.
DEADLINE_YIELD_S_MAX: Final = 5.0
# Tenants whose counters differ by less than this are equal, and the earliest deadline decides: some
# ordinary requests, so that it is not whose turn it is that orders them, and a few tens of
# milliseconds of a replica, which is all that one who comes now and then waits for another's.
SHARE_QUANTUM_TOKENS: Final = 4096.0
# What one who takes less than his share has in hand when he comes, as time of all replicas: the
# bursts of an even stream of requests are over by then, and a flood is held up no longer.
SHARE_CREDIT_S: Final = 2.0
# Whoever sent something within so long is about, though nothing of his waits: a person between two
# turns of an agent, and a client with less than his share. Others are judged by him, too.
SHARE_RECENT_S: Final = 5.0
# While others are about, one who is over his share finds replicas open only when they have less
# than this to do: so that who comes next does not wait for a whole runway of his.
RUNWAY_OVER_S: Final = 0.03
# Offline work is beside more urgent work for so long after a replica was given any: longer than the
# gaps of an even stream of requests, shorter than what offline work would notice. It finds such a
# replica open as one over his share does, and gets a part of its time: what the other work leaves
# below nine tenths, from where on queues grow fast, squared; and a hundredth at any rate.
BESIDE_S: Final = 5.0
SPARE_BUSY_MAX: Final = 0.9
SPARE_SHARE_MIN: Final = 0.01
# Of an answer, until a tenant's own answers have told: what they have at the mean in the first half
# hour of Azure's conversation trace of 2023 (AzurePublicDataset).
OUTPUT_TOKENS_DEFAULT: Final = 222.0
# A tenant may have so many times as many requests open as there are places left, by his weight: one
# alone 16 of 17 of them, two 16 of 33 each.
CROWD_WEIGHT: Final = 16.0
ACCOUNTS_MAX: Final = 4096  # of tenants, by class, in one worker; those who have nothing open go
# What other workers charged is read again after so long: a fraction of what a request takes, and
# some thousand cells for each reading.
SHARE_READ_S = 0.01
SHARE_IDLE_S: Final = 60.0  # after that the cells of one may become another's

# --- other regions ---------------------------------------------------------------------------

# What a place abroad must be cheaper by than one here, besides the round trip: prices are guesses,
# a request that crosses costs two proxies, and a burst that is over in less than a person notices
# is no reason to send anybody away.
REGION_SLACK_S: Final = 0.25
# A region that was gone is taken back by degrees within so long: what was sent away from it comes
# back to empty caches and, perhaps, to a cause that is still there.
REGION_RETURN_S: Final = 10.0
# One that cannot be reached although it tells of itself is left alone for so long, twice as long
# each time in a row up to the fifth.
REGION_PAUSE_S: Final = 0.5
REGION_PAUSES_COUNTED_MAX: Final = 5
# How long a start takes of which nobody has said it.
UNKNOWN_START_S: Final = 60.0
# How long a request holds its place where none has ended yet.
UNKNOWN_REQUEST_S: Final = 1.0
# Models that one remote proxy may name; a place in the picture for each.
REMOTE_MODELS_MAX: Final = 256
# Pools of one fleet as those see them who may not go everywhere.
RESIDENT_POOLS_MAX: Final = 1024

# --- sharing decisions ------------------------------------------------------------------------

# Between regions a connection that the path has lost is not waited for: as soon as the path is
# there again a fresh one is, and a SYN that got lost was sent twice more by then (RFC 6298 §2).
REGION_DIAL_TIMEOUT_S = 2.0
REGION_PAUSE_MAX_S = 1.0
# By how much the clocks of two regions may differ, with the time that a request is on its way.
HOP_SKEW_S: Final = 30.0
HOP_BYTES_MAX: Final = 8 * KIB  # of what is signed: some 300, and the regions that are allowed
HOP_REGIONS_MAX: Final = 64
# How often one request crosses in vain before it stays where it came: each time cost a round trip.
HOPS_TRIED_MAX: Final = 3
# A connection to another region takes a round trip, with TLS three, and a lost SYN is sent again
# after a second (RFC 6298 §2).
HOP_CONNECT_S_MIN: Final = 1.0
HOP_CONNECT_WEIGHT: Final = 4.0
# Octets on their way between regions that are not acknowledged for so long end their connection.
HOP_SILENCE_S: Final = 4.0
# Places in which used numbers are kept, fifteen in each, per worker and minute: 1,000 a second fill
# half of them. 1 MiB.
NONCE_BUCKETS_MAX: Final = 8192
# Who has only another region to go to waits for so long where that is lost, before he is told so:
# a proxy that takes over from another is linked in half a second.
REGION_LEFT_S: Final = 2.0
# Models of which other regions are told, and what is told at most to be free for one.
SUMMARY_MODELS_MAX: Final = 4096
SUMMARY_FREE_MAX: Final = 65_536
# A request is taken to bring at least as much work, as long as few have been seen.
USUAL_WORK_TOKENS: Final = 256
# Round trips of which the least is that of the path: sixteen seconds of them.
ROUND_TRIPS_MAX: Final = 64

# --- telemetry ------------------------------------------------------------------------------

# Tenants for whom the offline service asks, each worked out once: as many as are often configured,
# and with an identity provider's tenants the busiest of them.
TENANTS_REMEMBERED_MAX = 4096
