#!/usr/bin/env python3
"""Shows a streamed OpenAI chat answer as it arrives: curl -N ... | show_stream.py TEXT_FILE USAGE_FILE

Writes the whole answer to TEXT_FILE and the usage object to USAGE_FILE. Fails unless the stream is
complete: an event with a finish reason, a usage, and [DONE].
"""
import json
import pathlib
import sys


def main():
    text_file, usage_file = map(pathlib.Path, sys.argv[1:3])
    text, usage, finish, done = "", None, None, False
    for line in sys.stdin:
        if not line.startswith("data: "):
            if line.strip() and not line.startswith(":"):
                sys.exit(f"not an event: {line.strip()}")
            continue
        data = line[6:].strip()
        if data == "[DONE]":
            done = True
            break
        event = json.loads(data)
        if "error" in event:
            sys.exit(f"the server reported: {event['error']}")
        for choice in event.get("choices", []):
            piece = choice.get("delta", {}).get("content") or ""
            print(piece, end="", flush=True)
            text += piece
            finish = choice.get("finish_reason") or finish
        usage = event.get("usage") or usage
    print()
    text_file.write_text(text, encoding="utf-8")
    usage_file.write_text(json.dumps(usage), encoding="utf-8")
    if not done or finish is None or usage is None:
        sys.exit(f"the stream is incomplete: finish reason {finish}, usage {usage}, [DONE] {done}")


if __name__ == "__main__":
    main()
