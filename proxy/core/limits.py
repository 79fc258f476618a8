"""Every bound of the data path, with its unit and the reason for the number.

What an operator may change lives in `proxy.config`; what is here is a property of the design. A
`Final` one is a plain number in the translation, where each of the others is looked up by its name
at every use, as a request does some forty times: those that tests set are the ones without.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

# --- requests -------------------------------------------------------------------------------
# nginx: 4 buffers of 8 KiB; Node: 16 KiB; Apache: 8 KiB a field, 100 fields. Bearer tokens and
# tracing baggage of a few KiB are common, so we sit at the generous end.
HEAD_BYTES_MAX: Final = 64 * KIB
TARGET_BYTES_MAX: Final = 8 * KIB
# Heads that a worker remembers, and the largest of them: half a megabyte of octets for clients of
# a few hundred programs and keys, and twice that for what was worked out of them.
HEADS_REMEMBERED_MAX: Final = 512
REMEMBERED_HEAD_BYTES_MAX: Final = 2 * KIB
FIELDS_MAX: Final = 128
# A connection may send ahead this much while its current request is served; then we stop reading.
PIPELINED_BYTES_MAX: Final = 64 * KIB
# While we do not read, the loop does not tell us that the client has gone; so we look.
PAUSED_LOOK_S = 0.05
CHUNK_SIZE_DIGITS_MAX: Final = 16
CHUNK_EXTENSION_BYTES_MAX: Final = 1 * KIB
TRAILER_BYTES_MAX: Final = 8 * KIB

# HAProxy's advice for timeout http-request is 5 to 10 s: a head comes in one piece or is an attack.
# With the sweep's interval and the linger after the answer, its connection is gone within 10 s.
HEAD_TIMEOUT_S: Final = 6.5
# Request bodies held in memory by one worker, until their replica has begun to answer. At the
# default size limit this is 32 of the largest, or ten thousand prompts of 25 thousand tokens. Less
# where the machine, or the container, has less memory.
BODIES_BYTES_MAX = 1024 * MIB
# Client connections of one worker; fewer where the process may not open as many descriptors.
CLIENT_CONNECTIONS_MAX: Final = 65_536
# Between two pieces of a request body.
BODY_IDLE_TIMEOUT_S: Final = 30.0
# So many octets a second is the least pace of a body, after some patience; else one octet now and
# then would hold a connection for ever. Apache's mod_reqtimeout: 500 a second after 20 s.
BODY_PATIENCE_S: Final = 6.5
BODY_PACE_BYTES: Final = 1 * KIB
# An idle client connection; nginx keeps 75 s.
CLIENT_KEEP_ALIVE_S: Final = 75.0
# After an error answer we read on, so that the client sees the answer and not a reset
# (RFC 9112 §9.6); as nginx's lingering_close, bounded in time and octets. Past those octets the
# client has the rest of the time, and no room to send.
LINGER_S: Final = 2.0
LINGER_BYTES_MAX: Final = 4 * MIB
# An upload that is refused goes on for so long, and is dropped: the official client reads no answer
# before it has sent its file, and would find a connection that is reset. nginx's lingering_time.
UNWANTED_BODY_S: Final = 30.0
# After a smaller piece than this we wait a moment, so that what comes next is read in one.
LINGER_GULP_BYTES: Final = 4 * KIB
LINGER_PAUSE_S = 0.01
# A client that takes none of the octets waiting for it.
WRITE_STALL_TIMEOUT_S: Final = 120.0
# Hello to finished: three round trips and some arithmetic, or a client that means none of it.
TLS_HANDSHAKE_TIMEOUT_S = HEAD_TIMEOUT_S
# From our last octet to the end of the session. The sweep ends what does not go on (a client that
# does not say goodbye after LINGER_S, one that takes nothing after WRITE_STALL_TIMEOUT_S); this is
# for one that takes what waits ever so slowly.
TLS_SHUTDOWN_TIMEOUT_S: Final = 600.0
# Deadlines are checked by one sweep over all connections, not by a timer each.
SWEEP_INTERVAL_S: Final = 0.5

# --- responses ------------------------------------------------------------------------------
RESPONSE_HEAD_BYTES_MAX: Final = 64 * KIB
INFORMATIONAL_RESPONSES_MAX: Final = 8
# Octets that wait for a slow client before its replica is paused. One read, of up to 256,000
# octets, may come on top; with both, 500 slow readers of fast streams held 226 KiB each.
WRITE_HIGH_WATER_BYTES: Final = 128 * KIB
# Octets that the kernel takes for a client beyond those under way to it. Some milliseconds of
# work for a fast network; one that is drained is filled again at once.
UNSENT_BYTES_MAX: Final = 128 * KIB
# The end of an answer is kept to read `usage` from.
USAGE_TAIL_BYTES: Final = 2 * KIB
# More tokens than any answer has: a count beyond it is no count, and must not spoil the sums.
USAGE_TOKENS_MAX: Final = 1 << 40

# An engine's error is read whole, to be told as the client reads errors. Engines' own stay below
# 16 KiB; what is longer is no error object and passes as it comes.
ENGINE_ERROR_BYTES_MAX: Final = 64 * KIB
ENGINE_MESSAGE_CHARS_MAX: Final = 8 * KIB

# --- replicas -------------------------------------------------------------------------------
# vLLM closes idle connections after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE); we must be first, or a
# request can meet the close.
UPSTREAM_IDLE_S_MAX: Final = 4.0
# Engines that close earlier are learnt of; what could be trusted for less than this is not reused.
UPSTREAM_IDLE_WORTH_S: Final = 0.1
UPSTREAM_IDLE_CONNECTIONS_MAX = 512
# Up to here copying a body behind its head costs less than a write of two pieces.
JOINED_BYTES_MAX: Final = 16 * KIB
# Writes that wait for each other within a turn of the loop. The first waits while so many requests
# are read, a quarter of a millisecond. With 24 in the place of 8 a request of 1 KB cost 2 % less in
# `loadtest bench`, and one of 16 KB nothing.
WRITES_HELD_MAX: Final = 8
SUSPECT_PROBE_FIRST_S: Final = 0.1
# A request that has heard nothing for so long asks whether its replica is there at all. A busy
# engine answers the probe; one that is frozen does not, and takes no further requests.
SILENCE_DOUBT_S: Final = 5.0
# Answers of 500, 502, 503, 504 in a row, with no other answer between, that make a suspect.
# Client errors never count: a bad client must not empty the fleet.
SERVER_ERRORS_IN_ROW_MAX: Final = 5

# --- routing --------------------------------------------------------------------------------
MODEL_BYTES_MAX: Final = 256
SESSION_KEY_BYTES_MAX: Final = 255
# Ring points per replica. The share of the fullest of n replicas is about 1 + 2.5/sqrt(points).
VIRTUAL_NODES: Final = 160
# Of a replica of the largest weight. A ring of n of them takes n milliseconds to build.
VIRTUAL_NODES_MAX: Final = 1600
# How far into the first user message, or into a prompt without messages, a conversation is named.
# 4 KiB is about a thousand tokens: past the usual shared head, before turns begin to differ.
OPENER_BYTES_MAX: Final = 4 * KIB
# How far that message is looked for. A system prompt of 64 thousand tokens fits; beyond it, the
# beginning alone names the conversation. Text that is nothing but quotes costs a step for each.
OPENER_SEARCH_BYTES_MAX: Final = 256 * KIB
# First depth of the prefix chain; later depths grow by half, so that a prompt of n octets costs
# O(log n) hashes over n octets and a shared prefix is known to within a third.
CHAIN_FIRST_BYTES: Final = 512
CHAIN_DEPTHS_MAX: Final = 48
# A copy of so few octets costs less than a view of them (at 512 octets, 110 ns against 180).
PIECE_COPIED_BYTES_MAX: Final = 2 * KIB
# Ends of messages in a chain: the last, and the eight before it. A turn appends an answer and a
# question, or a call of tools and what each of them returned; more than eight at once are rare, and
# then the depths still tell two thirds of what is shared.
CHAIN_BOUNDARIES_MAX: Final = 9
# A prompt without messages has its last eight multiples of a step instead, a sixteenth of it or
# less: they reach back by a quarter, and what a text shares with one that it has grown from, by no
# more than that, is known to within a step.
CHAIN_STEPS_MAX: Final = 8
# Elements that the scan without C may name to find where the last of them end: 2 ms, 2 MB. More
# commas than that stand in half a megabyte of code, or in a list of numbers.
ELEMENTS_NAMED_MAX: Final = 32 * KIB
# Space before the end of a prompt that is left out of its chain: an indented bracket's, no more.
SPACE_BYTES_MAX: Final = 1 * KIB
# English text and JSON run at about four octets a token in today's vocabularies.
BYTES_PER_TOKEN: Final = 4
# Speech takes an engine 50 positions a second, and 16,000 octets a second as an mp3 of 128 kbit/s:
# between what a telephone sends and what stands on a CD, each a factor of ten away.
AUDIO_BYTES_PER_TOKEN: Final = 320
# What an engine makes of a picture or a piece of sound in a JSON body. LLaVA 1.5 makes 576 tokens
# of any picture; Qwen2-VL one of each 28 x 28 pixels, 1,369 of a square of 1,024, and its authors
# advise 1,280 as the most; GPT-4o counts 765 for that square, 1,105 for 2,048 x 4,096. Qwen2-Audio
# makes 25 of a second, so this is 40 s of sound.
MEDIA_TOKENS: Final = 1024
# Pictures of one part of a prompt whose places are kept: engines allow some ten in a prompt. What
# more there are, weighs at the place of the last of them.
MEDIA_REGIONS_MAX: Final = 64
# What a second of a flex request counts against one of the others. OpenAI sells that tier at half
# the price and promises no latency; half again, so that two of them never outweigh one of these.
FLEX_WEIGHT: Final = 0.25
# Believed cache of a replica that does not say: 8 B shape at 0.45 of a 141 GB card.
KV_CAPACITY_TOKENS_DEFAULT: Final = 340_000
# Entries of the index per replica, ghosts included; some 250 octets each, so 33 MB at the most.
INDEX_ENTRIES_MAX: Final = 1 << 17
INDEX_ENTRIES_TOTAL_MAX = 1 << 21  # of all replicas of a worker: half a gigabyte
# What was used within the last such part of a cache need not be moved to its young end again: the
# order of use is exact to 3 %, well within what the believed size is.
YOUNG_SPANS_PER_CACHE: Final = 32
# Ghosts, in believed caches: one that is eight times as large as believed is found out.
GHOST_CACHES_MAX: Final = 7
# How a believed size learns: at most a tenth of the way for one answer, within what an engine's
# flags can make of a card. What was used in the last twentieth may still be under way.
RESIZE_SHARE: Final = 0.1
RESIZE_YOUNG_SHARE: Final = 0.05
CACHE_SHARE_MIN: Final = 1 / 64
CACHE_SHARE_MAX: Final = 64.0
# Octets a token, learned from answers: the guess counts as much as so many tokens, and what is
# older than so many is forgotten.
RATIO_PRIOR_TOKENS: Final = 10_000
RATIO_WINDOW_TOKENS: Final = 1_000_000
RATIO_MIN: Final = 1.0  # octets a token: digits; and the longest words, or much space
RATIO_MAX: Final = 16.0
# Misses in a row on one replica that may teach the size of its group's caches; a cache that was too
# large by four still hits one time in four.
MISSES_TAUGHT_MAX: Final = 3
# Gauges are read every second, or two; older than this nobody reads them any more.
GAUGE_AGE_S_MAX: Final = 10.0
# For so long a replica that refused or failed a request is dearer by that time, twice as long each
# time in a row up to the eighth: 64 s.
REFUSED_PAUSE_S: Final = 0.5
REFUSALS_COUNTED_MAX: Final = 8
SEATS_REMEMBERED_MAX: Final = 1024  # pools whose slots are looked up once per fleet

# Prefill speed of a replica nobody has measured: an 8 B model on an H200 does 26 to 39 thousand.
PREFILL_TOKENS_PER_S_DEFAULT: Final = 30_000.0
# What was measured counts half after so much work; the group's speed counts as much as a second
# of it. Within a quarter, differences are the spread of measured prefills of one card.
SPEED_HALF_LIFE_S: Final = 20.0
SPEED_PRIOR_S: Final = 1.0
SPEED_BAND: Final = 1.25
LEARN_SHARE: Final = 0.1  # of a new sample in a running mean
MIX_SHARE: Final = 0.01  # in that of prompts' sizes, which differ a hundredfold
# What a first token takes beyond its prefill is seen where there is hardly any prefill.
SMALL_PREFILL_TOKENS: Final = 256
FIRST_TOKEN_OVERHEAD_S_MAX: Final = 0.1
# A request's own uncached tokens count once for its own wait, and twice more for those who come
# next and to whom its blocks displace: between 1 and 4 the optimum is flat on recorded traces.
RECOMPUTE_WEIGHT: Final = 2.0
# What a prompt costs those whose answers it holds up (`core.cost`). A second more for each token of
# an answer counts as much as so many seconds more until another's first token.
STALL_WEIGHT: Final = 30.0
# All of them together count no more than the prompt itself so many times: hundreds of answers
# beside short prompts would else be all that counts, and be spread evenly, instead of the work.
STALL_SHARE_MAX: Final = 3.0
# Of a prompt: a chunk, as engines compute it between two tokens of a stream (vLLM's and SGLang's
# default on such a card).
STALL_TOKENS_MAX: Final = 8_192
STALL_LINE_S: Final = 1.0  # with so much before it, it counts half
ANSWER_FEWEST_TOKENS: Final = 32.0  # shorter ones count as these: they hardly are streams
STREAM_FEWEST_TOKENS: Final = 2.0  # and these are none
# KV space beyond which a newcomer waits for somebody to end, or has somebody preempted; and below
# which nobody looks whether it would fit.
KV_FULL_SHARE: Final = 0.95
KV_TIGHT_SHARE: Final = 0.4
KV_LONG_SHARE: Final = 0.5  # of a cache: a longer prompt is looked at everywhere
# A prefix is everybody's when one request in twenty begins with it and no longer one is known; the
# counters find what one in 256 begins with, and forget by half after so many requests.
HOT_SHARE: Final = 0.05
HOT_COUNT_MIN: Final = 8
# All that is as hot as this must fit into a quarter of every cache.
HOT_CACHE_SHARE: Final = 0.25
HOT_COUNTERS_MAX: Final = 256
HOT_WINDOW_MAX: Final = 16_384
# Computed on different ways, equal prices differ by rounding.
SAME_PRICE_S: Final = 1e-6
# Nor is a difference of less than this worth an unequal use of the caches: a fifth of what a
# person feels as at once, or less where the price itself is small.
SAME_PRICE_SHARE: Final = 0.03
SAME_PRICE_S_MAX: Final = 0.02
# Prices this close are the same price, and the earliest on the ring's walk wins, where the ring is
# asked at all. Below it a person notices no difference (Miller 1968; Nielsen 1993: 0.1 s is felt
# as at once).
SPILL_SLACK_S: Final = 0.1
# While others route to the same replicas and do not tell: this part of what the engines run.
FOREIGN_SHARE_MIN: Final = 0.2
# Then the home may well hold what we do not know of: what that is worth, in times of the prefill.
RING_WEIGHT: Final = 1.2
# Loading a LoRA adapter from disk takes a tenth of a second to a second.
ADAPTER_LOAD_S: Final = 0.5

# --- what tenants may have --------------------------------------------------------------------

# --- late binding ---------------------------------------------------------------------------
# A replica with less work than this is open: an engine fills each step with up to 8,192 tokens of
# whatever waits, 0.27 s of an 8 B model on an H200, and with less before it runs steps half empty.
RUNWAY_S: Final = 0.3
# Who waits is ordered by the work it brings, less its age: a second waited outweighs so many
# seconds of prefill. With 1 the median falls by a third near saturation, and the 99th percentile,
# which is the longest prompts, rises by a tenth; with 4 by a tenth and a fiftieth.
AGEING_WEIGHT: Final = 4.0
HELD_TRIED_MAX: Final = 16  # requests that one release looks at
# A class of work that waits yields to online work that comes within so long after it, and to none
# that comes later: so online work is first in every queue that is shorter, and nobody waits longer
# for it by more than this. Ten seconds are nothing to a burst that is done in minutes, and two
# minutes nothing to work that nobody waits for.
SEMI_ONLINE_YIELD_S: Final = 10.0
OFFLINE_YIELD_S: Final = 120.0
# Parts of the room that a class may take; online work may take all of it. These leave it a quarter
# together, so that an online burst finds room without sending anybody away; what offline work finds
# no room for is kept by who sends it, and costs nothing but asking again.
SEMI_ONLINE_SHARE: Final = 0.5
OFFLINE_SHARE: Final = 0.25
# How many times --queue-timeout-secs a class may wait; online work once. At its default that is two
# minutes and ten, which is what the official clients wait for an answer (openai-python,
# `DEFAULT_TIMEOUT`).
SEMI_ONLINE_PATIENCE_WEIGHT: Final = 2.0
OFFLINE_PATIENCE_WEIGHT: Final = 10.0
# Requests that one online request may have ended, so that its own can begin. A replica takes more
# only while it has less to do than `RUNWAY_S`, so what is to be cleared is a few prompts.
PREEMPTED_TOGETHER_MAX: Final = 16
# Another worker that was asked to give way keeps offline work from that replica for so long, and so
# do all others: until the end of what went is told, and the place taken, a few times what notes are
# collected for by a busy worker.
GIVE_WAY_S: Final = 0.1
# How often one is sent back before it is left to end: work that is begun a fourth time has cost
# more than what online work would wait for it.
PREEMPTIONS_MAX: Final = 3
# Of the room, for those of models that have nothing awake: they may stay for the whole of a start,
# and those of models that serve must not find it full of them.
STARTING_SHARE: Final = 0.5
# A start is given up when the manager has let it be for so long: four of a proxy's reports of who
# waits, to each of which it might have answered by another.
START_FAILED_S: Final = 2.0
# A demand that cannot wait is told by a worker at once, and no oftener than this.
DEMAND_PUSH_S: Final = 0.01
# A manager that takes no report for so long does not hold up the next one.
DEMAND_TIMEOUT_S = 1.0
# Calls that end a request whose client has left: so many under way, each for so long.
ABORTS_MAX: Final = 64
ABORT_TIMEOUT_S = 5.0
# Replicas of which a newcomer finds, one after the other, that another worker has just filled them.
RESERVED_TRIED_MAX: Final = 4
# Requests that leave in one turn of the loop: a millisecond of work; the others leave in the next.
HELD_TAKEN_MAX: Final = 16
# The event loop's timers are no finer.
HELD_TIMER_S_MIN: Final = 0.001
# Workers see the same replica become open in the same moment. Each looks at a moment of its own
# within so long, many times what it takes to note that: the first takes it, the rest read so.
HELD_SPREAD_S = 0.006
# While somebody waits, what others say is read so often: nobody is woken by their notes.
HELD_READ_S: Final = 0.005
# When a replica comes up for which several workers hold requests, each gives it its part of what it
# may have, and waits for so long, or up to twice that, until it has heard what the others gave.
OPENED_SHARED_S: Final = 0.05
# The pace at which requests leave is measured over so long: some prefills, and less than clients
# wait before they ask again.
DRAIN_HALF_LIFE_S: Final = 10.0

# --- other regions ---------------------------------------------------------------------------

# --- stored responses -----------------------------------------------------------------------
# Answers whose replica is remembered, since only that one can go on from them: two hours at ten a
# second, some 150 octets each. Engines keep them in memory, too, and lose them with the process.
RESPONSES_MAX = 1 << 16
# Where in an answer its id is looked for. It is in the first event, or the first field.
RESPONSE_ID_SEARCH_BYTES_MAX: Final = 2 * KIB
# Of a stream, in which its first token is looked for: the event that opens it may repeat what was
# asked, instructions and tools included. After that many, whatever comes is taken for a token.
OPENINGS_BYTES_MAX: Final = MIB

# --- explanations ---------------------------------------------------------------------------
# A worker explains between requests: a body of this size holds them up for some ten milliseconds.
EXPLAINED_BYTES_MAX: Final = 8 * MIB

# --- what engines tell of their caches --------------------------------------------------------
# A step of 8,192 tokens is 60 KB of batch; a whole prompt of a million tokens, at once, 10 MB.
KV_BATCH_BYTES_MAX = 16 * MIB
# A million tokens in blocks of 16 are 2^16 blocks. SGLang may make an event of each, so as many
# events; twice that, because what they displaced is told in the same batch.
KV_EVENT_BLOCKS_MAX: Final = 1 << 17
KV_BATCH_EVENTS_MAX: Final = 1 << 17
# Of one engine: 16 million tokens in blocks of 16, the KV cache of a card and of its host. 110 MB.
KV_BLOCKS_MAX: Final = 1 << 20
# Of all engines that one proxy follows: sixty with a million tokens each. 450 MB.
KV_BLOCKS_TOTAL_MAX: Final = 1 << 22
# Of a replay, what is held unread in case the engine tells further on that its cache was emptied: a
# million tokens in blocks of 16 are 7 MB of batches. All engines share it.
KV_HELD_BYTES_MAX: Final = 64 * MIB
# The steps that are looked through for where a prompt went. An engine that writes 10,000 tokens a
# second fills 600 blocks a second besides its prefills: half a minute.
KV_GROWTHS_MAX: Final = 1 << 14
# Chain hashes whose blocks are known, of one engine: as many as the record of what was sent has.
KV_POINTS_MAX: Final = 1 << 17
# And of all engines that one proxy follows: a point for each eight blocks. 240 MB.
KV_POINTS_TOTAL_MAX: Final = KV_BLOCKS_TOTAL_MAX // 8
# Requests that have begun and not ended, and those that ended and wait for their events.
KV_OPEN_MAX = 1 << 16
# Chain hashes told as gone in the last `KV_LATE_S`: an engine that displaces 60,000 blocks a second
# with a chain hash in each would need more, and none is near it.
KV_TOLD_MAX = 1 << 14
# A worker says when it sent a request, and an engine's events come when they come: what happened
# up to this long before what the clock says may still be of the request.
KV_EARLY_S: Final = 0.05
# Events arrive 1 ms after their step with vLLM, up to 58 ms with SGLang (measured); they are read
# at intervals, a busy supervisor reads them later, and of the first that are read nobody knows how
# long they had lain there.
KV_GATHER_S: Final = 0.25
KV_LATE_S: Final = 0.5
# From the event of a prefill's end to its first token: a detokenizer, an HTTP server and a network,
# none of which is a second behind, or clients would complain.
KV_FIRST_TOKEN_S: Final = 1.0

# --- sharing decisions ------------------------------------------------------------------------
# What each process of a proxy has said and others may not have read yet: more than half a second of
# the notes of 5,000 requests/s, and whoever serves reads twice a second at the least. Whoever was
# overtaken gets what is open, in place of how it came to be.
NOTES_RING_BYTES: Final = 1 * MIB
# Who chooses seldom reads so many in one turn, about two milliseconds, and not all that is said in
# half a second, for which its streams would wait; but not more often than so.
NOTES_TURN_MAX: Final = 100
NOTES_READ_S_MIN: Final = 0.02
# Peers wait for notes: they go at once where none have gone for so long, else they are collected
# for as long: shorter than any prefill, so that a burst over all proxies sees itself. A worker that
# tells of more than a thousand requests a second (three notes each) collects for longer, because a
# small batch costs more in waking three processes than its requests do: for about one step of an
# engine, which looks at newcomers between two of them. Such rates need so many replicas that none
# of them gets more than a request or two in that time.
NOTES_FLUSH_S = 0.0015
NOTES_FLUSH_BUSY_S = 0.016
NOTES_BUSY_PER_S: Final = 3000
# What one batch of them has: a hundred dispatches, or one page of a digest.
NOTES_BATCH_BYTES_MAX = 32 * KIB
# Octets that may wait for one who is sent them, a worker or a peer. A second of the notes of 5,000
# requests/s; whoever is further behind gets what is open, later, in place of how it came to be.
NOTES_WAITING_BYTES_MAX = 2 * MIB
# What is open is told in full so often, if anything has changed: what a lost note spoils is wrong
# for no longer. It is about 30 octets for each request in flight.
NOTES_WHOLE_S = 2.0
NOTE_POINTS_MAX: Final = 32
NOTE_HASHES_MAX: Final = 1024
NOTE_LEASES_MAX: Final = 512
# No prompt has more; no class weighs more. Beyond them a note is broken, and would spoil the sums.
NOTE_TOKENS_MAX: Final = 1 << 26
NOTE_WEIGHT_MAX: Final = 1000.0
# Workers of this and of other proxies whose notes are heard, and the leases of each: twice what a
# worker holds at the default of --max-concurrent-requests. Some 300 octets a lease.
ORIGINS_MAX = 1024
FOREIGN_LEASES_MAX = 16_384
# Replicas that others named before we knew them: as many as come up at once.
STRANGERS_MAX = 1024
# One frame between two proxies: the largest batch, which may have grown by its last note.
PEER_FRAME_BYTES_MAX: Final = 256 * KIB
# A frame before the other one has shown who it is.
PEER_HELLO_BYTES_MAX: Final = 1 * KIB
PEER_LINKS_MAX = 64
PEER_HANDSHAKE_TIMEOUT_S = 5.0
# Each side says something so often, and is taken for gone when it was not heard for so long: three
# beats lost, and some time for a machine that is busy.
PEER_BEAT_S = 1.0
PEER_SILENCE_S = 5.0
PEER_PAUSE_FIRST_S = 0.1
PEER_PAUSE_MAX_S = 5.0
# As long as most name servers of clusters keep an answer (CoreDNS for Kubernetes: 5 s).
PEER_NAMES_INTERVAL_S = 5.0
# What is cached where, told to one who has just started: 1.4 million entries, as many as twenty
# replicas of a million tokens have, in pages that hold up neither side for a millisecond.
DIGEST_BYTES_MAX = 16 * MIB
DIGEST_PAUSE_S: Final = 0.002
DIGEST_PAGE_S: Final = 0.001  # what one page may take besides
# One for each worker that has just started, and one for each peer.
DIGESTS_MAX: Final = 320

# Beginnings of prompts whose tokens a worker knows: two of each answer, some 100 octets each.
LENGTHS_REMEMBERED_MAX = 32_768

# --- telemetry ------------------------------------------------------------------------------
REQUEST_SERIES_MAX: Final = 256  # (route, model) pairs in metrics; further models count as "other"
ACCESS_LOG_LINES_MAX = 65_536  # lines that wait for the writer; more are dropped and counted
REQUEST_ID_BYTES_MAX: Final = 128
PATH_LOGGED_BYTES_MAX: Final = 256

assert HEAD_BYTES_MAX > TARGET_BYTES_MAX
assert WRITE_HIGH_WATER_BYTES >= RESPONSE_HEAD_BYTES_MAX
assert UPSTREAM_IDLE_WORTH_S < UPSTREAM_IDLE_S_MAX < 5.0
assert NOTES_WHOLE_S < PEER_SILENCE_S
assert SEMI_ONLINE_SHARE + OFFLINE_SHARE < 1.0
assert PEER_BEAT_S * 3 < PEER_SILENCE_S
assert PEER_FRAME_BYTES_MAX * 4 <= NOTES_RING_BYTES
assert NOTES_BATCH_BYTES_MAX + 32 * max(NOTE_HASHES_MAX, NOTE_LEASES_MAX) < PEER_FRAME_BYTES_MAX
