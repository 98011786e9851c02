"""Print the held-out perplexity of tiny-yi and what it writes, as transformers computes them.

    python models/tiny-yi/evaluate.py [--model DIR] [--text FILE]

Perplexity is per token: the text is cut into windows of 512 tokens that do not overlap, nothing is
put before a window, and every token but the first of each window is predicted.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaForCausalLM

CONTEXT = 512
EOS, IM_END = 2, 7
PROMPTS = (
    "The `json` module",
    "If the file does not exist,",
    "A generator is a function which",
    "<|im_start|>user\nWhat does the function `os.listdir()` do?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is the module `zlib` for?<|im_end|>\n<|im_start|>assistant\n",
)


@torch.inference_mode()
def perplexity(model: LlamaForCausalLM, tokens: list[int]) -> tuple[float, int]:
    """Return (perplexity, number of predicted tokens)."""
    loss, predicted = 0.0, 0
    for start in range(0, len(tokens), CONTEXT):
        window_BT = torch.tensor([tokens[start : start + CONTEXT]])
        if window_BT.shape[1] < 2:
            break
        logits_BTV = model(window_BT, use_cache=False).logits.float()
        loss += torch.nn.functional.cross_entropy(
            logits_BTV[0, :-1], window_BT[0, 1:], reduction="sum"
        ).item()
        predicted += window_BT.shape[1] - 1
    return math.exp(loss / predicted), predicted


def continuation(model: LlamaForCausalLM, tokens: list[int], limit: int = 60) -> list[int]:
    """Greedy continuation of a prompt, without the end token."""
    output_BT = model.generate(
        torch.tensor([tokens]), max_new_tokens=limit, do_sample=False, eos_token_id=[EOS, IM_END]
    )
    new = output_BT[0, len(tokens) :].tolist()
    return new[:-1] if new[-1] in (EOS, IM_END) else new


def parse_arguments() -> argparse.Namespace:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=here, help="model folder")
    parser.add_argument("--text", type=Path, default=here / "heldout.txt", help="held-out text")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    pieces = sentencepiece.SentencePieceProcessor(str(args.model / "tokenizer.model"))
    value, predicted = perplexity(model, pieces.encode(args.text.read_text(encoding="utf-8")))
    print(f"perplexity {value:.2f} over {predicted:,} tokens of {args.text.name}")
    for prompt in PROMPTS:
        tokens = pieces.encode(prompt)
        print(f"--- {prompt}\n+++ {pieces.decode(continuation(model, tokens))}")


if __name__ == "__main__":
    main()
