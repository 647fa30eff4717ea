"""Trains an adapter on a file of prompts and completions, and asks it what it has learned.

python examples/train_then_serve.py smollm2-135m data.jsonl runs/mine
"""

import sys

from loramux import LLM, train


def main(base: str, data: str, output: str) -> None:
    settings = dict(rank=8, learning_rate=5e-3, max_steps=30, max_seq_len=256)
    (result,) = train(data, output, base=base, name="mine", **settings)
    if result.error is not None:
        raise SystemExit(result.error)
    print(f"loss {result.records[0].loss:.3f} -> {result.records[-1].loss:.3f}: {result.folder}")
    with LLM(base, adapters={"mine": result.folder}) as llm:
        (answer,) = llm.generate(["The captain"], adapter="mine", max_tokens=20, temperature=0.0)
    print(f"mine: The captain{answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
