"""Fine-tune a chat model on conversations of your own, with the loss on the answers only.

    python chat_sft.py chats.jsonl --model Qwen/Qwen3-0.6B

A line of the file is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}; of a longer conversation the last answer is learned. Stop it at any time, by
Ctrl-C too: the same command goes on where it was. A save takes a little more disk than the weights.
Memory is that of train.py, less the logits of questions and padding.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgery

IGNORED = -100  # a label that does not count: chunked_loss does not even compute its logits


def example(tokenizer: Any, messages: list[dict[str, str]], length: int) -> dict[str, torch.Tensor]:
    """Return the ids of a conversation, and as labels those of its last answer alone."""
    whole = tokenizer.apply_chat_template(messages, return_dict=False)[:length]
    asked = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    ids = torch.tensor(whole)
    labels = ids.masked_fill(torch.arange(len(ids)) < len(asked), IGNORED)
    return {"input_ids": ids, "labels": labels}


def batch_of(rows: list[dict[str, torch.Tensor]], device: str) -> dict[str, torch.Tensor]:
    """Pad conversations to the longest one."""
    fill = {"input_ids": 0, "labels": IGNORED}
    made = {k: pad_sequence([r[k] for r in rows], True, fill[k]).to(device) for k in fill}
    sizes = torch.tensor([[len(r["labels"])] for r in rows], device=device)
    there = torch.arange(made["labels"].shape[1], device=device) < sizes
    return made | {"attention_mask": there.long()}


def talks_of(data: Path) -> list[list[dict[str, str]]]:
    """Return the conversations of a file, each with an answer at its end."""
    if not data.is_file():
        raise SystemExit(f"there is no file {data}")
    found = []
    for number, line in enumerate(data.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            messages = json.loads(line)["messages"]
            answered = messages[-1]["role"] == "assistant"
        except (ValueError, TypeError, LookupError):
            answered = False
        if not answered:
            raise SystemExit(f'{data}: record {number} has no "messages" that end in an answer')
        found.append(messages)
    return found


def main(
    data: Annotated[Path | None, typer.Argument(help="Conversations, .jsonl.")] = None,
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct",
    out: Path = Path("out/chat"),
    length: Annotated[int, typer.Option(help="Tokens of a conversation at most.")] = 1024,
    batch: int = 8,
    epochs: int = 1,
    lr: float = 1e-4,
    save_every: int = 50,
) -> None:
    """Train, save a plain checkpoint, and let it answer the first question of the data."""
    if data is None:  # in a clone of the repository there are some
        try:
            from examples.real import sample
        except ImportError:
            raise SystemExit("Which conversations? python chat_sft.py chats.jsonl") from None
        data, model = sample("chats", model)
    talks = talks_of(data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    chat: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    chat.to(device).train()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [example(tokenizer, messages, length) for messages in talks]
    rows = [row for row in rows if (row["labels"] != IGNORED).any()]  # else cut before the answer
    if not rows:
        raise SystemExit(f"no answer of {data} begins within {length} tokens: a larger --length")
    draw = torch.Generator().manual_seed(0)  # the same order when the command is repeated
    turns = torch.cat([torch.randperm(len(rows), generator=draw) for _ in range(epochs)])
    steps = turns.split(batch)

    surgery.apply(chat, ["misa", "recompute", "chunked_loss"])
    optimizer = torch.optim.AdamW(chat.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(steps) + 1)
    run, settings = out / "run", out / "settings.json"
    given = {"model": str(model), "rows": len(rows), "length": length, "batch": batch}
    given |= {"epochs": epochs, "lr": lr}
    if run.exists():
        was = json.loads(settings.read_text())
        other = [f"{key}={was.get(key)}" for key in given if was.get(key) != given[key]]
        if other:
            raise SystemExit(f"{out} holds a run with {', '.join(other)}: choose another --out")
        surgery.load(chat, run, optimizer, schedule)
        print(f"{out}: goes on behind step {schedule.last_epoch} of {len(steps)}")
    out.mkdir(parents=True, exist_ok=True)
    settings.write_text(json.dumps(given))
    stops: list[int] = []  # Ctrl-C is heard between steps
    before = signal.signal(signal.SIGINT, lambda number, frame: stops.append(number))
    done = schedule.last_epoch
    for step, places in enumerate(steps[done:], done + 1):
        loss = chat(**batch_of([rows[i] for i in places], device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chat.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"step {step} of {len(steps)}, loss {loss.item():.3f}", flush=True)
        if stops or step % save_every == 0 or step == len(steps):
            surgery.save(chat, run, optimizer, schedule)
        if stops and step < len(steps):
            raise SystemExit("stopped: the same command goes on from here")
    signal.signal(signal.SIGINT, before)

    chat.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    ask = tokenizer.apply_chat_template(
        talks[0][:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = chat.generate(**ask.to(device), max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(answer[0, ask["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    typer.run(main)
