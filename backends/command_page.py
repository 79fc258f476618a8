"""The guide to the commands, as Markdown: made of their own words, so that neither is behind.

`python -m backends.command_page > deploy/guides/commands.md` writes it; a test holds it equal.
"""

from __future__ import annotations

import sys

from backends.command_line import COMMANDS
from backends.command_words import GROUPS, WORDS

OPENING = """\
# Commands

What there is to call, with which status it ends, and how a shell completes it.

`doherty COMMAND --help` has the flags of each, with defaults and environment variables.
`doherty --version` says which release, Python, engines and form of the data path are in use.
"""
EXITS = """
## Exit statuses

The same for every command:

| status | when | on standard error |
|---|---|---|
| 0 | it is done; a command that serves was asked to end and has | nothing, or warnings |
| 1 | it began and failed: nobody answers, a port is taken, an image is damaged | what, what to do |
| 2 | it did not begin: a flag, a file or a setting is wrong | where, and what is expected |
| 130 | it was interrupted by Ctrl-C; commands that serve end with 0 then | nothing |

What is wrong is said in one line. Where a question is asked, 1 is "no": `doherty snapshot probe`
(they do not work here), `doherty snapshot verify` (an image is damaged), `doherty batch watch` (it
ended without having succeeded). What is asked for goes to standard output, all else to standard
error, so that `doherty top --json` and `doherty batch results` can be piped.
"""
COMPLETION = """
## Completion

    eval "$(doherty completion bash)"                                  # in ~/.bashrc
    doherty completion zsh > "${fpath[1]}/_doherty"                    # before compinit
    doherty completion fish > ~/.config/fish/completions/doherty.fish

Commands, flags, choices and files are completed; so are replicas and pools where a manager answers
at `DOHERTY_MANAGER_URL` (`doherty sleep`, `wake`, `scale`, `snapshot create`). The scripts are made
from the installed release: make them anew after an upgrade.
"""


def page() -> str:
    """Return the whole page."""
    parts = [OPENING]
    for title, names in GROUPS.items():
        parts.append(f"\n## To {title}\n\n| command | | for example |\n|---|---|---|\n")
        for name in names:
            example = WORDS[name].examples[0] if name in WORDS else f"doherty {name} --help"
            summary = COMMANDS[name].summary.replace("|", r"\|")
            parts.append(f"| `{name}` | {summary} | `{example}` |\n")
    return "".join((*parts, EXITS, COMPLETION))


if __name__ == "__main__":
    sys.stdout.write(page())
