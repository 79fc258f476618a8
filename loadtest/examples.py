"""Examples of each command, for its `--help`: whole lines that its parser takes as they stand."""

from __future__ import annotations

CALL = "python -m loadtest"
# Commands in the order in which somebody who has a server meets them.
GROUPS: dict[str, tuple[str, ...]] = {
    "send requests to a server": ("replay",),
    "compare": ("compare", "bench", "explain", "sdk"),
    "break things under load": ("faults", "storm", "siege", "soak", "upgrade", "burst", "operate"),
    "decisions in virtual time": (
        *("policies", "scaling", "pool", "claims-lab", "regions-lab", "regions-day"),
    ),
    "tenants, keys, deadlines": (
        *("fairness", "deadlines", "tenants-limits", "tenants-proxies", "keys", "guessing"),
    ),
    "jobs, engines, regions": ("offline", "gpu", "snapshots", "readahead", "regions"),
}
EXAMPLES: dict[str, tuple[str, ...]] = {
    "": (
        "replay conversation --url http://127.0.0.1:8000 --limit 500",
        "compare conversation --policies round_robin,prefix --speed 3",
        "COMMAND --help",
    ),
    "replay": (
        "replay conversation --url http://127.0.0.1:8000 --speed 2 --limit 500",
        "replay trace.jsonl --url http://router:8000 --model llama --json -",
    ),
    "compare": (
        "compare conversation --policies round_robin,prefix --speed 3",
        "compare conversation --workers 2 --kv-cache-tokens 750000 --lab",
    ),
    "bench": ("bench --quick", "bench --rounds 3 --seconds 1.5"),
    "explain": ("explain", "explain --requests 200 --replicas 4"),
    "sdk": ("sdk --quick", "sdk --json sdk.json"),
    "faults": ("faults", "faults --victims replica --rate 40 --after 20"),
    "storm": ("storm --quick", "storm --streams 10000 --faults 50"),
    "siege": ("siege --quick", "siege slow-heads slow-readers"),
    "soak": ("soak --quick", "soak --requests 1000000 --workers 2"),
    "upgrade": ("upgrade --quick", "upgrade --upgrades 8 --reloads 12 --clients 4"),
    "burst": ("burst --before 15 --burst 45 --after 60", "burst --json burst.json"),
    "operate": ("operate --duration 60 --users 20", "operate --out operate-run"),
    "policies": (
        "policies conversation --policies round_robin,llm-d,doherty,oracle",
        "policies conversation --targets --processes 2",
    ),
    "scaling": ("scaling --loads step10,noise --starts 15", "scaling --check --processes 2"),
    "pool": ("pool --cards 32,24", "pool --models 20 --minutes 30"),
    "claims-lab": ("claims-lab", "claims-lab --seconds 120 --workers 2"),
    "regions-lab": ("regions-lab", "regions-lab --workload nothing-shared"),
    "regions-day": ("regions-day", "regions-day --loads azure --seeds 7"),
    "fairness": ("fairness", "fairness --seconds 30 --workers 2"),
    "deadlines": ("deadlines", "deadlines --overload 2 --deadline-ms 500"),
    "tenants-limits": ("tenants-limits", "tenants-limits --workers 4 --minutes 2"),
    "tenants-proxies": ("tenants-proxies", "tenants-proxies --times 2"),
    "keys": ("keys --quick", "keys --proxies 2 --changes 50"),
    "guessing": ("guessing --quick", "guessing --keys 10000"),
    "offline": ("offline throughput", "offline kills"),
    "offline jobs": ("offline jobs", "offline jobs --limit 20 --profile fast"),
    "offline kills": (
        "offline kills",
        "offline kills --lines 2000 --kills 6 --chunk-lines 100",
    ),
    "offline lab": ("offline lab", "offline lab --rates 2,8,16 --burst 6 --priority"),
    "offline spare": ("offline spare", "offline spare --lines 5000 --seconds 60 --rate 4"),
    "offline throughput": (
        "offline throughput",
        "offline throughput --lines 20000 --out throughput.txt",
    ),
    "gpu": (
        "gpu prove --engine vllm --model-path models/qwen3-8b",
        "gpu prove --engine simulator -- --dialect sglang",
    ),
    "gpu cost": (
        "gpu cost --engine simulator --quick",
        "gpu cost --engine vllm --direct http://gpu1:8000 --proxy http://proxy:8000",
    ),
    "gpu fidelity": ("gpu fidelity speeds.json --profile h200-8b-vllm",),
    "gpu fit": ("gpu fit speeds.json --name my-gpu --out my-gpu.json",),
    "gpu fleet": (
        "gpu fleet --engine simulator --record sim.fleet --seconds 15 --sessions-share 1",
        "gpu fleet --engine vllm --model-path models/qwen3-8b --record vllm.fleet --budget-s 560",
    ),
    "gpu floors": (
        "gpu floors --engines vllm --gpu h200 --model-path models/qwen3-8b",
        "gpu floors --rehearse",
    ),
    "gpu ladder": (
        "gpu ladder --engine vllm --model-path models/qwen3-8b --swap 10",
        "gpu ladder --engine simulator --gpus 0 --swap 10",
    ),
    "gpu offline": ("gpu offline --engine simulator --lines 500 --shared-lines 100",),
    "gpu paths": (
        "gpu paths --engines sglang --model-path models/qwen3-8b",
        "gpu paths --rehearse",
    ),
    "gpu prove": (
        "gpu prove --engine vllm --model-path models/qwen3-8b --out vllm.txt",
        "gpu prove --engine simulator -- --dialect sglang",
    ),
    "gpu speeds": (
        "gpu speeds --engine vllm --url http://127.0.0.1:8000 --json speeds.json",
        "gpu speeds --rehearse --quick",
    ),
    "gpu surge": (
        "gpu surge --engine simulator --gpus none --replicas 2 --rungs asleep,cold --record s.gz",
    ),
    "gpu verdict": ("gpu verdict vllm.fleet --out fleet-h200-vllm.txt",),
    "snapshots": ("snapshots --quick", "snapshots --tables-mib 1024 --restores 20"),
    "readahead": (
        "readahead --drop all -- python3 -c 'import pandas'",
        "readahead --rounds 3 --out readahead.txt -- python3 -c 'import scipy'",
    ),
    "regions": ("regions live",),
    "regions live": ("regions live", "regions live --steps cut,residency --seconds 30"),
}


def lines_of(path: str) -> list[str]:
    """Return the examples of a command, as they are typed."""
    return [f"{CALL} {line}" for line in EXAMPLES.get(path, ())]
