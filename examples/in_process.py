"""A base and adapters in this process: one batch, in which every adapter and the base answer.

python examples/in_process.py smollm2-135m support=adapters/support pirate=adapters/pirate
"""

import sys

from loramux import LLM

QUESTION = [{"role": "user", "content": "My order is late. What can I do?"}]


def main(base: str, *adapters: str) -> None:
    folders = dict(adapter.split("=", 1) for adapter in adapters)
    names = [*folders, None]  # None: the base itself
    with LLM(base, adapters=folders) as llm:
        answers = llm.generate(
            [QUESTION] * len(names), adapter=names, max_tokens=40, temperature=0.0
        )
    for name, answer in zip(names, answers, strict=True):
        print(f"{name or 'the base'} ({answer.finish_reason}): {answer.text}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["smollm2-135m"])
