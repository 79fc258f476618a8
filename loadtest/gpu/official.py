"""A streamed chat by the official OpenAI client, in a process of its own.

An engine brings that client with it, in an environment of its own; so this is run by whichever
interpreter has it, and imports nothing of the load test. Prints what it saw as JSON.

    python loadtest/gpu/official.py http://127.0.0.1:8000/v1 MODEL TOKENS
"""

from __future__ import annotations

import json
import sys
import time

MISSING_STATUS = 3  # there is no such client here


def main(url: str, model: str, tokens: int) -> dict[str, object]:
    """Ask once. Raises what the client raises."""
    from openai import OpenAI, __version__  # noqa: PLC0415 - only where it is there

    official = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
    begun_s, first_s, reason, told = time.monotonic(), 0.0, None, None
    pieces: list[str] = []
    stream = official.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Say hello to the class."}],
        stream=True,
        stream_options={"include_usage": True},
        max_tokens=tokens,
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        told = chunk.usage or told
        for choice in chunk.choices:
            reason = choice.finish_reason or reason
            if choice.delta.content:
                first_s = first_s or time.monotonic() - begun_s
                pieces.append(choice.delta.content)
    return {
        "client": f"openai {__version__}",
        "pieces": len(pieces),
        "first_s": first_s,
        "whole_s": time.monotonic() - begun_s,
        "finish_reason": reason,
        "completion_tokens": told.completion_tokens if told else None,
        "text": "".join(pieces)[:60],
    }


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(MISSING_STATUS)
