"""What `--help` says beyond the flags: which commands go together, and examples of each.

An example is a whole line that works as it stands, where its files and replicas are there; the
tests read each one by the parser of its command.
"""

from __future__ import annotations

from proxy.help_form import Words

# Commands in the order in which they are met; what is in none comes last, under `further`.
GROUPS: dict[str, tuple[str, ...]] = {
    "serve": ("up", "proxy", "manager", "offline", "simulator"),
    "look": ("top", "status", "scale"),
    "operate": ("sleep", "wake", "reclaim", "keys", "batch"),
    "prepare": ("check", "plan", "snapshot", "compile", "completion"),
}
ROOT = Words(
    (
        "doherty up                    two simulated replicas and a proxy on port 8000",
        "doherty up doherty.yaml       what the file says",
        "doherty top                   watch it",
        "doherty COMMAND --help        flags, environment and examples of a command",
    )
)
WORDS: dict[str, Words] = {
    "up": Words(
        (
            "doherty up",
            "doherty up doherty.yaml --host 0.0.0.0 --workers 4",
            "doherty up doherty.yaml --run-dir /var/lib/doherty --access-log off",
            "DOHERTY_API_KEY=secret doherty up doherty.yaml",
        ),
        "Manager, replicas, offline service and proxy run until Ctrl-C. A process that\n"
        "dies is started again. Flags of the proxy win over the file's proxy section.",
    ),
    "manager": Words(
        (
            "doherty manager --config doherty.yaml",
            "doherty manager --config doherty.yaml --port 8002 --detach-on-exit",
            "doherty manager --config doherty.yaml --sweep",
        ),
        "Starts, watches and scales the replicas of a region. It keeps a journal in the\n"
        "run folder, so that a manager that is started again adopts what runs.",
    ),
    "offline": Words(
        (
            "doherty offline doherty.yaml --manager-url http://127.0.0.1:8002",
            "doherty offline --port 8003 --store jobs.db --proxy-url http://127.0.0.1:8000",
            "doherty offline doherty.yaml --store postgresql://jobs@db/doherty",
        )
    ),
    "batch": Words(
        (
            "doherty batch submit requests.jsonl --watch",
            "doherty batch status",
            "doherty batch results batch_0123 -o answers.jsonl",
        ),
        "A batch goes on when the command that watches it is interrupted.",
    ),
    "batch submit": Words(
        (
            "doherty batch submit requests.jsonl --watch",
            "doherty batch submit prompts.jsonl --endpoint /v1/chat/completions",
            "cat prompts.jsonl | doherty batch submit - --window 4h --metadata team=search",
        )
    ),
    "batch list": Words(("doherty batch list", "doherty batch list --url http://proxy:8000")),
    "batch status": Words(("doherty batch status", "doherty batch status batch_0123")),
    "batch results": Words(
        (
            "doherty batch results batch_0123 -o answers.jsonl",
            "doherty batch results batch_0123 --follow",
            "doherty batch results batch_0123 --errors",
        )
    ),
    "batch watch": Words(
        ("doherty batch watch batch_0123", "doherty batch watch batch_0123 --api-key secret")
    ),
    "batch cancel": Words(
        ("doherty batch cancel batch_0123", "doherty batch cancel batch_0123 --api-key secret")
    ),
    "simulator": Words(
        (
            "doherty simulator --port 30000",
            "doherty simulator --dialect sglang --profile h100-8b --time-scale 10",
            "doherty simulator --port 30001 --fault delay:2:p=0.1",
        )
    ),
    "check": Words(
        (
            "doherty check doherty.yaml",
            "doherty check doherty.yaml --tenant acme --class offline",
            "doherty check --schema > doherty.schema.json",
            "doherty check --reference | less",
        ),
        "Exits 0 when the file is good and 2 when it is not; warnings change nothing.",
    ),
    "plan": Words(
        (
            "doherty plan Qwen/Qwen3-8B --gpu h100 --class online",
            "doherty plan ./model --gpu h100,h200 --class offline --prices gpus.yaml",
            "doherty plan ./model --gpu all --class semi-online --json",
        )
    ),
    "snapshot": Words(
        (
            "doherty snapshot probe",
            "doherty snapshot create demo-0",
            "doherty snapshot list --json",
        ),
        "A manager makes and restores images by itself where a pool says\n`snapshot: true`.",
    ),
    "snapshot probe": Words(("doherty snapshot probe", "doherty snapshot probe --json")),
    "snapshot create": Words(
        (
            "doherty snapshot create demo-0",
            "doherty snapshot create --port 8000 -- vllm serve ./model --host 0.0.0.0",
        )
    ),
    "snapshot list": Words(
        ("doherty snapshot list", "doherty snapshot list --dir /var/lib/doherty/snapshots --json")
    ),
    "snapshot verify": Words(("doherty snapshot verify", "doherty snapshot verify 3f2a")),
    "snapshot restore": Words(
        ("doherty snapshot restore 3f2a --once", "doherty snapshot restore 3f2a --timeout 120")
    ),
    "snapshot prune": Words(("doherty snapshot prune", "doherty snapshot prune --mib-max 200000")),
    "keys": Words(
        (
            "doherty keys create --tenant acme --expires 90d",
            "doherty keys list",
            "doherty keys revoke key_0123",
        ),
        "Of a key only a digest is kept: it is printed once, when it is made.",
    ),
    "keys create": Words(
        (
            "doherty keys create --tenant acme --name ci --expires 90d",
            "doherty keys create --tenant acme --models llama --classes offline",
        )
    ),
    "keys import": Words(
        (
            "doherty keys import --tenant acme < key.txt",
            "doherty keys import --tenant acme --name old --config doherty.yaml < key.txt",
        )
    ),
    "keys list": Words(("doherty keys list", "doherty keys list --tenant acme --all --json")),
    "keys show": Words(("doherty keys show key_0123", "doherty keys show ci --json")),
    "keys rotate": Words(
        ("doherty keys rotate ci --grace 24h", "doherty keys rotate ci --grace 0s --expires 90d")
    ),
    "keys revoke": Words(("doherty keys revoke key_0123", "doherty keys revoke --tenant acme")),
    "keys prune": Words(("doherty keys prune", "doherty keys prune --over 7d")),
    "keys usage": Words(
        (
            "doherty keys usage usage.log --since 30d",
            "doherty keys usage usage.log --by tenant,model --csv",
        )
    ),
    "top": Words(
        (
            "doherty top",
            "doherty top --url http://proxy:8001 --api-key-file admin.key",
            "doherty top --once --filter llama",
            "doherty top --json | python -m json.tool",
        ),
        "Keys: 1-6 panels, s sort, / filter, d drain, u undrain, e explain, ? the rest.\n"
        "Where standard output is no terminal it prints one table, as with --once.",
    ),
    "status": Words(
        ("doherty status", "doherty status --manager-url http://gpu1:8002"),
        "As the manager sees them; `doherty top` shows what the proxy makes of them.",
    ),
    "scale": Words(
        ("doherty scale", "doherty scale llama", "doherty scale llama 4"),
        "A size that was set here holds until the configuration is read again.",
    ),
    "reclaim": Words(
        ("doherty reclaim 120", "doherty reclaim 30 --gpus 0,1", "doherty reclaim --cancel"),
        "Without SECONDS it tells what is about to be taken away, and what is done.",
    ),
    "sleep": Words(
        (
            "doherty sleep demo-0",
            "doherty sleep demo-0 --level 2",
            "doherty sleep demo-0 --rung suspended",
        )
    ),
    "wake": Words(("doherty wake demo-0", "doherty wake demo-0 --manager-url http://gpu1:8002")),
    "compile": Words(
        ("doherty compile", "doherty compile --force"),
        "Needs a C compiler and this Python's headers. Where it has been done, workers\n"
        "run the translation, else the sources, to the same effect at twice the price.",
    ),
    "completion": Words(
        (
            'eval "$(doherty completion bash)"',
            "doherty completion zsh > ~/.zfunc/_doherty",
            "doherty completion fish > ~/.config/fish/completions/doherty.fish",
        )
    ),
}


def group_of(command: str) -> str:
    """Return the heading under which a command is listed."""
    return next((title for title, names in GROUPS.items() if command in names), "further")
