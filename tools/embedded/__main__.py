"""Trains the embedded pair (target and draft) on one CPU core, from text that is on the machine.

    python -m tools.embedded --minutes-target 60 --minutes-draft 20

The stages are `data` (text, tokenizer, token files), `target`, `draft`, and `distil`, which goes on
with the draft (distil_draft.py). specextend/assets/README.md says what came out. glibc's huge pages
make the attention a fifth faster:
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_TOP_PAD_=268435456 python ...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specextend.assets import target_path

from . import distil_draft
from .corpus import prepare, write_corpus
from .train_draft import train_draft
from .train_target import train_target


def save(model: LlamaForCausalLM, work: Path, folder: Path) -> None:
    """Write a model and the tokenizer as `from_pretrained` wants them."""
    model.generation_config.update(bos_token_id=0, eos_token_id=0)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(work / "tokenizer").save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    for key in ("is_local", "local_files_only"):
        settings.pop(key, None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    print(f"saved {folder.name}: {sum(x.stat().st_size for x in folder.iterdir()) / 2**20:.2f} MiB")


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes-target", type=float, default=55)
    parser.add_argument("--minutes-draft", type=float, default=20)
    parser.add_argument("--minutes-distil", type=float, default=60)
    parser.add_argument("--stages", default="data,target,draft,distil")
    parser.add_argument("--prose", type=Path, help="folder of JSON Lines with a `text` field")
    parser.add_argument("--work", type=Path, default=Path("build/embedded"))
    parser.add_argument("--out", type=Path, default=target_path().parent)
    parser.add_argument("--seed", type=int, default=20776)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    stages = args.stages.split(",")
    if "data" in stages:
        prepare(args.work, args.prose, args.seed)
    if "target" in stages:
        target = train_target(args.work, args.minutes_target, args.seed, args.resume)
        save(target, args.work, args.out / "target")
    if "draft" in stages:
        target = LlamaForCausalLM.from_pretrained(args.out / "target", dtype=torch.bfloat16)
        draft = train_draft(target, args.work, args.minutes_draft, args.seed)
        save(draft, args.work, args.out / "draft")
    if "distil" in stages:
        corpus, draft_folder = args.work / "corpus.jsonl", str(args.out / "draft")
        write_corpus(corpus, args.prose, args.seed)
        distil_draft.main([
            "--data", str(corpus), "--work", str(args.work / "distil"),
            "--target", str(args.out / "target"), "--init", draft_folder, "--out", draft_folder,
            "--minutes", str(args.minutes_distil),
        ])  # fmt: skip


if __name__ == "__main__":
    main()
