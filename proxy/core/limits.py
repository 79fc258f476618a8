"""Every bound of the data path, with its unit and the reason for the number.

What an operator may change lives in `proxy.config`; what is here is a property of the design.
"""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

# --- requests -------------------------------------------------------------------------------
# nginx: 4 buffers of 8 KiB; Node: 16 KiB; Apache: 8 KiB a field, 100 fields. Bearer tokens and
# tracing baggage of a few KiB are common, so we sit at the generous end.
HEAD_BYTES_MAX = 64 * KIB
TARGET_BYTES_MAX = 8 * KIB
# Heads that a worker remembers, and the largest of them: half a megabyte of octets for clients of
# a few hundred programs and keys, and twice that for what was worked out of them.
HEADS_REMEMBERED_MAX = 512
REMEMBERED_HEAD_BYTES_MAX = 2 * KIB
FIELDS_MAX = 128
# A connection may send ahead this much while its current request is served; then we stop reading.
PIPELINED_BYTES_MAX = 64 * KIB
# While we do not read, the loop does not tell us that the client has gone; so we look.
PAUSED_LOOK_S = 0.05
CHUNK_SIZE_DIGITS_MAX = 16
CHUNK_EXTENSION_BYTES_MAX = 1 * KIB
TRAILER_BYTES_MAX = 8 * KIB

# HAProxy's advice for timeout http-request is 5 to 10 s: a head comes in one piece or is an attack.
# With the sweep's interval and the linger after the answer, its connection is gone within 10 s.
HEAD_TIMEOUT_S = 6.5
# Request bodies held in memory by one worker, until their replica has begun to answer. At the
# default size limit this is 32 of the largest, or ten thousand prompts of 25 thousand tokens. Less
# where the machine, or the container, has less memory.
BODIES_BYTES_MAX = 1024 * MIB
# Client connections of one worker; fewer where the process may not open as many descriptors.
CLIENT_CONNECTIONS_MAX = 65_536
# Between two pieces of a request body.
BODY_IDLE_TIMEOUT_S = 30.0
# So many octets a second is the least pace of a body, after some patience; else one octet now and
# then would hold a connection for ever. Apache's mod_reqtimeout: 500 a second after 20 s.
BODY_PATIENCE_S = 6.5
BODY_PACE_BYTES = 1 * KIB
# An idle client connection; nginx keeps 75 s.
CLIENT_KEEP_ALIVE_S = 75.0
# After an error answer we read on, so that the client sees the answer and not a reset
# (RFC 9112 §9.6); as nginx's lingering_close, bounded in time and octets. Past those octets the
# client has the rest of the time, and no room to send.
LINGER_S = 2.0
LINGER_BYTES_MAX = 4 * MIB
# After a smaller piece than this we wait a moment, so that what comes next is read in one.
LINGER_GULP_BYTES = 4 * KIB
LINGER_PAUSE_S = 0.01
# A client that takes none of the octets waiting for it.
WRITE_STALL_TIMEOUT_S = 120.0
# Hello to finished: three round trips and some arithmetic, or a client that means none of it.
TLS_HANDSHAKE_TIMEOUT_S = HEAD_TIMEOUT_S
# From our last octet to the end of the session. The sweep ends what does not go on (a client that
# does not say goodbye after LINGER_S, one that takes nothing after WRITE_STALL_TIMEOUT_S); this is
# for one that takes what waits ever so slowly.
TLS_SHUTDOWN_TIMEOUT_S = 600.0
# Deadlines are checked by one sweep over all connections, not by a timer each.
SWEEP_INTERVAL_S = 0.5

# --- responses ------------------------------------------------------------------------------
RESPONSE_HEAD_BYTES_MAX = 64 * KIB
INFORMATIONAL_RESPONSES_MAX = 8
# Octets that wait for a slow client before its replica is paused. One read, of up to 256,000
# octets, may come on top; with both, 500 slow readers of fast streams held 226 KiB each.
WRITE_HIGH_WATER_BYTES = 128 * KIB
# Octets that the kernel takes for a client beyond those under way to it. Some milliseconds of
# work for a fast network; one that is drained is filled again at once.
UNSENT_BYTES_MAX = 128 * KIB
# The end of an answer is kept to read `usage` from.
USAGE_TAIL_BYTES = 2 * KIB
# More tokens than any answer has: a count beyond it is no count, and must not spoil the sums.
USAGE_TOKENS_MAX = 1 << 40

# An engine's error is read whole, to be told as the client reads errors. Engines' own stay below
# 16 KiB; what is longer is no error object and passes as it comes.
ENGINE_ERROR_BYTES_MAX = 64 * KIB
ENGINE_MESSAGE_CHARS_MAX = 8 * KIB

# --- replicas -------------------------------------------------------------------------------
# vLLM closes idle connections after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); we must be first, or a
# request can meet the close.
UPSTREAM_IDLE_S_MAX = 4.0
# Engines that close earlier are learnt of; what could be trusted for less than this is not reused.
UPSTREAM_IDLE_WORTH_S = 0.1
UPSTREAM_IDLE_CONNECTIONS_MAX = 512
# Up to here copying a body behind its head costs less than a write of two pieces.
JOINED_BYTES_MAX = 16 * KIB
SUSPECT_PROBE_FIRST_S = 0.1
# A request that has heard nothing for so long asks whether its replica is there at all. A busy
# engine answers the probe; one that is frozen does not, and takes no further requests.
SILENCE_DOUBT_S = 5.0
# Answers of 500, 502, 503, 504 in a row, with no other answer between, that make a suspect.
# Client errors never count: a bad client must not empty the fleet.
SERVER_ERRORS_IN_ROW_MAX = 5

# --- routing --------------------------------------------------------------------------------
MODEL_BYTES_MAX = 256
SESSION_KEY_BYTES_MAX = 255
# Ring points per replica. The share of the fullest of n replicas is about 1 + 2.5/sqrt(points).
VIRTUAL_NODES = 160
# How far into the first user message, or into a prompt without messages, a conversation is named.
# 4 KiB is about a thousand tokens: past the usual shared head, before turns begin to differ.
OPENER_BYTES_MAX = 4 * KIB
# How far that message is looked for. A system prompt of 64 thousand tokens fits; beyond it, the
# beginning alone names the conversation. Text that is nothing but quotes costs a step for each.
OPENER_SEARCH_BYTES_MAX = 256 * KIB
# First depth of the prefix chain; later depths grow by half, so that a prompt of n octets costs
# O(log n) hashes over n octets and a shared prefix is known to within a third.
CHAIN_FIRST_BYTES = 512
CHAIN_DEPTHS_MAX = 48
# Space before the end of a prompt that is left out of its chain: an indented bracket's, no more.
SPACE_BYTES_MAX = 1 * KIB
# English text and JSON run at about four octets a token in today's vocabularies.
BYTES_PER_TOKEN = 4
# Believed cache of a replica that does not say: 8 B shape at 0.45 of a 141 GB card.
KV_CAPACITY_TOKENS_DEFAULT = 340_000
RECORD_ENTRIES_MAX = 1 << 17
# Prefill speed of a replica nobody has measured: an 8 B model on an H200 does 26 to 39 thousand.
PREFILL_TOKENS_PER_S_DEFAULT = 30_000.0
# Prices this close are the same price, and the earliest on the ring's walk wins. Below it a person
# notices no difference (Miller 1968; Nielsen 1993: 0.1 s is felt as at once).
SPILL_SLACK_S = 0.1
# A request's own uncached tokens, in its price: once for its own wait, twice for the delay to those
# who come next and to whom its blocks displace.
UNCACHED_WEIGHT = 3

# --- what engines tell of their caches --------------------------------------------------------
# A step of 8,192 tokens is 60 KB of batch; a whole prompt of a million tokens, at once, 10 MB.
KV_BATCH_BYTES_MAX = 16 * MIB
# A million tokens in blocks of 16 are 2^16 blocks. SGLang may make an event of each, so as many
# events; twice that, because what they displaced is told in the same batch.
KV_EVENT_BLOCKS_MAX = 1 << 17
KV_BATCH_EVENTS_MAX = 1 << 17
# Of one engine: 16 million tokens in blocks of 16, the KV cache of a card and of its host. 110 MB.
KV_BLOCKS_MAX = 1 << 20
# Of all engines that one proxy follows: sixty with a million tokens each. 450 MB.
KV_BLOCKS_TOTAL_MAX = 1 << 22
# The steps that are looked through for where a prompt went. An engine that writes 10,000 tokens a
# second fills 600 blocks a second besides its prefills: half a minute.
KV_GROWTHS_MAX = 1 << 14
# Chain hashes whose blocks are known, of one engine: as many as the record of what was sent has.
KV_POINTS_MAX = 1 << 17
# And of all engines that one proxy follows: a point for each eight blocks. 240 MB.
KV_POINTS_TOTAL_MAX = KV_BLOCKS_TOTAL_MAX // 8
# Requests that have begun and not ended, and those that ended and wait for their events.
KV_OPEN_MAX = 1 << 16
# A worker says when it sent a request, and an engine's events come when they come: what happened
# up to this long before what the clock says may still be of the request.
KV_EARLY_S = 0.05
# Events arrive 1 ms after their step with vLLM, up to 58 ms with SGLang (measured), and a busy
# supervisor reads them later.
KV_LATE_S = 0.25
# From the event of a prefill's end to its first token: a detokenizer, an HTTP server and a network,
# none of which is a second behind, or clients would complain.
KV_FIRST_TOKEN_S = 1.0

# --- telemetry ------------------------------------------------------------------------------
REQUEST_SERIES_MAX = 256  # (route, model) pairs in metrics; further models count as "other"
ACCESS_LOG_LINES_MAX = 65_536  # lines that wait for the writer; more are dropped and counted
REQUEST_ID_BYTES_MAX = 128
PATH_LOGGED_BYTES_MAX = 256

assert HEAD_BYTES_MAX > TARGET_BYTES_MAX
assert WRITE_HIGH_WATER_BYTES >= RESPONSE_HEAD_BYTES_MAX
assert UPSTREAM_IDLE_WORTH_S < UPSTREAM_IDLE_S_MAX < 5.0
