"""How each command of the pages is carried out by `make verify NAME=docs`: with which stand-ins, cuts, and what before.

In: a command as a page has it. Out: the command to carry out. A command without a rule is an error.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import UnmeasuredError
from benchmarks.stand_ins import HOST, LOOPBACK, STAND_INS

DEMO = "make pretrain"  # again it takes seconds, and the chain that ran last is the demo's
PHOTOS = "make pretrain DATA=/data/photos"
CAPTIONER = "make finetune-captioning"
SCORES = "python -m pipelines score_pairs smoke --pairs runs/smoke/import_pairs/4be1... --scorer my_scorer.py"
LOOPBACK_SITE = f"--fetch.policy.resolve {HOST}:80 {LOOPBACK}:{{web}}"
SHORT_ROAD = (
    "--train-image-tokenizer.loop.num-steps 20 --train-image-tokenizer.num-workers 1"
    " --pretrain.loop.num-steps 20 --pretrain.num-workers 1"
)
FEW_STEPS = "--loop.num-steps 20"
ALONE = f"{FEW_STEPS} --num-workers 1"
SHORT_REPRODUCTION = (
    "--compare-image-tokenizers.loop.num-steps 20 --stress-stability.num-steps 5"
    " --finetune-captioning.loop.num-steps 20 --rank-candidates.num-scenes 5 --rank-candidates.candidates 4"
    " --machine-evaluation.num-captions 20 --machine-evaluation.candidates 2"
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a command is carried out here.

    flags: joined to ARGS of make, or put behind a job's own; swap: literal text -> what stands there instead; first:
    commands of the pages that are carried out before; is_server: ask for its page, and stop it; is_cluster: with a Ray
    head on this machine.
    """

    flags: str = ""
    swap: Mapping[str, str] | None = None
    first: tuple[str, ...] = ()
    is_server: bool = False
    is_cluster: bool = False


# What the whole command looks like -> its rule, of which the first counts.
RULES: Mapping[str, Rule] = {
    r"make pretrain": Rule(),
    r"make pretrain ARGS=.*": Rule(flags="--pretrain.loop.num-steps 40 --generate.num-scenes 20", first=(DEMO,)),
    r"make pretrain DATA=/data/list.*": Rule(flags="--until filter_pairs"),  # the rest is as for folders
    r"make pretrain DATA=.*": Rule(flags=SHORT_ROAD),
    r"make pretrain CLUSTER=.*": Rule(
        flags=f"--scrape-pairs.demo.num-scenes 600 {SHORT_ROAD}",
        swap={"PRESET=paper": "PRESET=smoke", "http://127.0.0.1:8265": "{cluster}"},
        is_cluster=True,
    ),
    r"make test": Rule(flags="tests/shards"),
    r"make (lint|format|status|doctor)( .*)?": Rule(),
    r"make dashboard": Rule(flags="--port {port}", is_server=True),
    r"make serve": Rule(flags="--port 0", is_server=True, first=(DEMO,)),
    r"make human-evaluation": Rule(
        flags="--port 0 --num-groups 5 --each 3 --repeated 1 --planted 1", is_server=True, first=(DEMO,)
    ),
    r"make human-evaluation MODELS=.*": Rule(
        flags="--port 0 --num-groups 5 --each 3 --repeated 1 --planted 1", is_server=True, first=(PHOTOS,)
    ),
    r"make count-votes": Rule(first=("make human-evaluation",)),
    r'make generate PROMPT=".*" BEST=8': Rule(first=(DEMO, CAPTIONER)),
    r'make generate PROMPT="\.\.\."': Rule(swap={'"..."': '"a small blue square on a white background"'}),
    r'make generate PROMPT="A cat of ink drawing style" .*': Rule(
        first=(DEMO, 'make finetune-style DATA=/data/drawings STYLE="ink drawing"')
    ),
    r"make generate .*": Rule(),
    r"make finetune-captioning": Rule(flags=ALONE, first=(DEMO,)),
    r"make caption IMAGES=.*": Rule(swap={"/data/photos": "/coco/val2014"}, first=(DEMO, CAPTIONER)),
    r"make (finetune-super-resolution|finetune-direct-sr finetune-iterative-sr)": Rule(
        flags=f"{ALONE} --scenes.num-scenes 200", first=(DEMO,)
    ),
    r"make finetune-style .*": Rule(flags=FEW_STEPS, first=(DEMO,)),
    r"make (finetune-fashion|pretrain-coglm)( .*)?": Rule(flags=ALONE),
    r"make super-resolve": Rule(first=("make finetune-super-resolution",)),
    r"make super-resolve-at-once": Rule(first=("make finetune-direct-sr finetune-iterative-sr",)),
    r"make (generate-coglm|complete) .*": Rule(first=("make pretrain-coglm",)),
    r"make machine-evaluation PRESET=paper .*": Rule(
        flags="--extractor inception --num-captions 8 --candidates 2 --radii 0 --scores.distance-resamples 2",
        swap={"PRESET=paper": "PRESET=smoke"},
        first=(DEMO, CAPTIONER),
    ),
    r"make machine-evaluation REFERENCE=.*": Rule(
        flags="--num-captions 20",
        swap={"REFERENCE=... PICTURES=...": "REFERENCE=captions_val2014.json PICTURES=/coco/val2014"},
        first=(DEMO, CAPTIONER),
    ),
    r"make machine-evaluation": Rule(flags="--num-captions 20 --candidates 2", first=(DEMO, CAPTIONER)),
    r"make rank-candidates( .*)?": Rule(flags="--num-scenes 5 --candidates 4", first=(DEMO, CAPTIONER)),
    r"make compare-image-tokenizers": Rule(flags=FEW_STEPS, first=(DEMO,)),
    r"make stress-stability": Rule(flags="--num-steps 5"),
    r"make analyse-attention": Rule(first=(DEMO,)),
    r"make reproduce": Rule(flags=SHORT_REPRODUCTION, first=(DEMO,)),
    r"make import-weights .*": Rule(),
    r"python -m pipelines \w+ paper .*--plan.*": Rule(),
    r"python -m pipelines scrape_pairs paper --queries .*": Rule(
        flags=f"--per-query 4 --endpoints openverse http://{HOST}/openverse wikimedia http://{HOST}/wikimedia "
        + LOOPBACK_SITE
    ),
    r"python -m pipelines scrape_pairs paper --(table|pages) .*": Rule(
        flags=LOOPBACK_SITE, swap={"https://": "http://"}
    ),
    r"python -m pipelines take_down .*": Rule(
        swap={f"runs/smoke/{job}/...": f"{{inputs}}/taken/{job}" for job in ("scrape_pairs", "tokenize_pairs")}
    ),
    r"python -m pipelines road .*--until filter_pairs.*": Rule(),
    r"python -m pipelines road .*": Rule(flags=SHORT_ROAD),
    r"python -m pipelines score_pairs .*": Rule(first=(PHOTOS,)),
    r"python -m pipelines filter_pairs .*": Rule(first=(SCORES,)),
    r"python -m pipelines pretrain .*": Rule(flags=ALONE),
}


def rule_of(command: str) -> Rule:
    """The rule of a command. UnmeasuredError if it has none: a new command of a page needs one."""
    for pattern, rule in RULES.items():
        if re.fullmatch(pattern, command):
            return rule
    raise UnmeasuredError(f"no rule of benchmarks/{Path(__file__).name} says how to carry out: {command}")


def treated(command: str, *, inputs: Path, places: Mapping[str, object]) -> str:
    """The command with stand-ins and cuts; places: values of the names in braces of a rule."""
    rule, words = rule_of(command), command
    for literal, instead in (rule.swap or {}).items():
        words = words.replace(literal, instead)
    flags = rule.flags
    for name, value in {"inputs": inputs, **places}.items():
        words, flags = (text.replace(f"{{{name}}}", str(value)) for text in (words, flags))
    for literal in sorted(STAND_INS, key=len, reverse=True):
        words = re.sub(rf"(?<![\w/.]){re.escape(literal)}(?![\w/.])", str(inputs / STAND_INS[literal]), words)
    return with_flags(words, flags)


def with_flags(command: str, flags: str) -> str:
    """The flags behind those that the command has: in ARGS of make, or at the end of a job's."""
    if not flags:
        return command
    if not command.startswith("make "):
        return f"{command} {flags}"
    if 'ARGS="' in command:
        return re.sub(r'ARGS="([^"]*)"', lambda found: f'ARGS="{found[1]} {flags}"', command)
    return f'{command} ARGS="{flags}"'
