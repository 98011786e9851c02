"""Train tiny-yi, a small Yi-shaped language model, on the Python manual and save it beside this.

    python models/tiny-yi/train.py [--corpus DIR] [--steps N] [--device cuda] [--out DIR]

The run is a function of its arguments and the corpus: seeds are fixed and an interrupted run that
is started again with the same --state goes on where it stopped, with the same batches.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from pathlib import Path
from typing import NamedTuple

import corpus
import hf_folder
import numpy as np
import sentencepiece
import torch
from hf_folder import ARCHITECTURE, BOS, EOS, IM_END, IM_START, SPECIAL
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 512
CHAT_SHARE = 0.07  # of the characters of the training text
CHAT_EVERY = 2  # one row of every second batch is chat
HELD_OUT_BYTES = 120_000
SEED = 20231102
WARM_UP = 50  # steps
ATTRIBUTION = (
    "This text is taken from the documentation of Python 3.11, Copyright (c) 2001-2023 Python "
    "Software Foundation; All Rights Reserved. It was converted to plain text; LICENSE-PSF.txt "
    "is its licence.\n"
)


class Texts(NamedTuple):
    train: list[str]
    chats: list[str]
    held_out: list[tuple[str, str]]  # page name, text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--corpus",
        type=Path,
        help="folder with *.rst.txt pages at any depth; "
        f"default: download the Debian package {corpus.PACKAGE}",
    )
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps in all")
    parser.add_argument("--batch", type=int, default=16, help=f"rows of {CONTEXT} tokens a step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="where torch runs: cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="model folder")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("build/tiny-yi-state"),
        help="folder for tokens and optimizer state; remove it to start over",
    )
    parser.add_argument("--save-every", type=int, default=100, help="steps between two saves")
    return parser.parse_args()


def chat(question: str, answer: str) -> str:
    """One exchange in ChatML."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def collect(folder: Path) -> Texts:
    """Split by page: every 40th is held out, and no question is made from a held-out page."""
    train, pairs, held_out = [], [], []
    for i, (name, blocks) in enumerate(corpus.read_documents(folder)):
        if i % corpus.HELD_OUT_EVERY == corpus.HELD_OUT_EVERY - 1:
            held_out.append((name, corpus.plain_text(blocks)))
            continue
        train.append(corpus.plain_text(blocks))
        pairs += corpus.questions(name, blocks)
    random.Random(SEED).shuffle(pairs)
    budget = CHAT_SHARE * sum(map(len, train))
    chats = []
    for question, answer in pairs:
        chats.append(chat(question, answer))
        budget -= len(chats[-1])
        if budget < 0:
            break
    return Texts(train, chats, held_out)


def train_tokenizer(texts: list[str]) -> bytes:
    """A sentencepiece BPE model with the special ids and the options of Yi's."""
    model = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=ARCHITECTURE["vocab_size"],
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        character_coverage=0.9995,
        max_sentence_length=16384,
        num_threads=1,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        unk_piece="<unk>",
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        user_defined_symbols=SPECIAL,
        minloglevel=1,
    )
    return model.getvalue()


def prepare(args: argparse.Namespace) -> None:
    """Write tokenizer.model and heldout.txt to --out, the token arrays to --state."""
    args.state.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = collect(args.corpus or corpus.download_corpus())
    if not texts.train:
        raise SystemExit(f"--corpus {args.corpus} holds no *.rst.txt page; name a folder that does")
    model = train_tokenizer(texts.train)
    (args.out / "tokenizer.model").write_bytes(model)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert [pieces.piece_to_id(x) for x in SPECIAL] == [3, 4, 5, IM_START, IM_END]
    write_held_out(args.out / "heldout.txt", texts.held_out)

    documents = pieces.encode(texts.train)
    random.Random(SEED + 1).shuffle(documents)
    np.save(args.state / "train.npy", np.concatenate([np.uint16(d + [EOS]) for d in documents]))
    chats = [d + [EOS] for d in pieces.encode(texts.chats)]
    np.save(args.state / "chat.npy", np.concatenate([np.uint16(d) for d in chats]))
    np.save(args.state / "chat_starts.npy", np.cumsum([0, *map(len, chats)])[:-1])


def write_held_out(path: Path, pages: list[tuple[str, str]]) -> None:
    """Whole pages, the short ones first, up to HELD_OUT_BYTES."""
    parts, size = [ATTRIBUTION], 0
    for _, text in sorted(pages, key=lambda page: len(page[1])):
        size += len(text.encode())
        if size > HELD_OUT_BYTES:
            break
        parts.append(text)
    path.write_text("\n".join(parts), encoding="utf-8")


class Batches:
    """Rows of CONTEXT + 1 tokens; batch ``step`` depends on nothing but the step."""

    def __init__(self, state: Path, rows: int):
        self.stream = np.load(state / "train.npy")
        self.chats = np.load(state / "chat.npy")
        self.chat_starts = np.load(state / "chat_starts.npy")
        self.chat_starts = self.chat_starts[self.chat_starts < len(self.chats) - CONTEXT - 1]
        self.rows = rows
        self.per_epoch = (len(self.stream) - 2 * CONTEXT) // (self.rows * CONTEXT)

    def __getitem__(self, step: int) -> torch.Tensor:
        epoch, place = divmod(step, self.per_epoch)
        rng = np.random.default_rng((SEED, epoch))
        shift = rng.integers(CONTEXT)
        order = rng.permutation(self.per_epoch * self.rows)
        starts = order[place * self.rows : (place + 1) * self.rows] * CONTEXT + shift
        rows = [self.stream[s : s + CONTEXT + 1] for s in starts]
        if step % CHAT_EVERY == 0:
            start = np.random.default_rng((SEED, 1, step)).choice(self.chat_starts)
            rows[0] = self.chats[start : start + CONTEXT + 1]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def make_model() -> LlamaForCausalLM:
    known = {k: v for k, v in ARCHITECTURE.items() if k not in ("torch_dtype", "rope_theta")}
    known["rope_parameters"] = {"rope_type": "default", "rope_theta": ARCHITECTURE["rope_theta"]}
    known.pop("rope_scaling")
    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(**known)).train()


def make_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms; one rate fits both.

    Muon is chosen because it learns more from each token, and this run has few of them.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    tables = [model.model.embed_tokens.weight, model.lm_head.weight]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True),
    ]


def rate_at(step: int, args: argparse.Namespace) -> float:
    """Warm-up, a plateau, and a linear fall to nothing over the last 40 % of the steps.

    Before the fall the rate does not depend on --steps, so a run can be made longer or shorter.
    """
    warm = (step + 1) / WARM_UP
    fall = (args.steps - step) / (0.4 * args.steps)
    return args.rate * min(1.0, warm, fall)


def train(args: argparse.Namespace) -> None:
    """Train from the saved state, or the start, up to --steps; save and export on the way."""
    model = make_model().to(args.device)
    optimizers = make_optimizers(model, args.rate)
    batches = Batches(args.state, args.batch)
    first = load_state(args.state / "state.pt", model, optimizers)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} weights, "
        f"{len(batches.stream):,} + {len(batches.chats):,} tokens, step {first}",
        flush=True,
    )
    start = time.perf_counter()
    for step in range(first, args.steps):
        for group in (g for optimizer in optimizers for g in optimizer.param_groups):
            group["lr"] = rate_at(step, args)
        loss = train_step(model, optimizers, batches[step].to(args.device))
        if step % 20 == 0:
            speed = (step + 1 - first) * args.batch * CONTEXT / (time.perf_counter() - start)
            print(f"step {step} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_state(args.state / "state.pt", model, optimizers, step + 1)
            hf_folder.write_weights(model.state_dict(), args.out)


def train_step(
    model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], rows_BT: torch.Tensor
) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    with torch.autocast(rows_BT.device.type, torch.bfloat16):
        logits_BTV = model(input_ids=rows_BT[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten()
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def save_state(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int
) -> None:
    values = [optimizer.state_dict() for optimizer in optimizers]
    unfinished = path.with_suffix(".tmp")
    torch.save({"model": model.state_dict(), "optimizers": values, "step": step}, unfinished)
    unfinished.replace(path)


def load_state(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> int:
    """Return the number of steps done, 0 where nothing is saved."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(values)
    return state["step"]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if not (args.state / "chat_starts.npy").exists():
        prepare(args)
        hf_folder.write_settings(args.out)
    train(args)


if __name__ == "__main__":
    main()
