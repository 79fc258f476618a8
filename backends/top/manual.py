"""What `?` shows: keys, and what columns mean; in 72 columns, so that a box of 80 has it."""

HELP = """\
1-6, ← →     panels: replicas, classes, models, pools, routing, prefixes
Tab          the panel's second table above, and the cursor in it
↑ ↓ j k      a row up or down; PgUp, PgDn, Home, End
s, S         sort replicas: name, load, wait, KV, hits, requests, state;
             S turns the order round
/            only rows with these words; Esc shows all again
Enter        all that is known of the replica under the cursor
d, u         drain it (no further request), undrain it; you are asked
e            explain where a request would go and why, with every price
p            pause: the screen stands still
Ctrl-L       draw anew      Ctrl-Z  suspend      q  quit

Times, rates and shares are of the last seconds; the second line says
of how many, where it has room. `-` is not known, which is not zero.
Percentiles lie between two edges of a histogram.

REPLICAS  LOAD    requests in flight of the limit, by all workers
          WAIT    work that is queued there, in seconds
          KV      share of the KV cache in use, as the engine says
          HIT     share of the prompt tokens that it found cached
          RUN     and QUEUE: requests, as the engine counts
          RING    share of the hash ring that it is home to
          suspect: workers do not reach it; held: an operator drained it
CLASSES   QUEUED  requests that wait in the proxy; OLDEST: how long
          REFUSED a second, for want of room to wait
          TTFT50  time to the first token, of which half were faster
          TPOT99  time per output token, of which 99 in 100 were faster
          WAIT95  time in the queue, of those that had to wait
POOLS     WANTED  replicas, and those READY, COMING, GOING, RESTING;
          below: the decisions of the scaling and their reasons
ROUTING   why replicas were chosen; below: other regions
PREFIXES  what many requests share: its HOME on the ring, and by whom
          it is believed to be HELD
"""
