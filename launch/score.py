"""Score solutions: JSONL in, JSONL out, one line for each line.

    python launch/score.py --model runs/instance_table/export --input in.jsonl --out out.jsonl
    torchrun --nproc_per_node 8 launch/score.py --model ... --input in.jsonl --out out.jsonl

A line in: `{"question": …, "image_path": path | list, "steps": [text, …]}`, or with
`"candidates": [text | [step, …], …]` in place of `steps`; other keys are ignored, but `id`. A line
out has `line`, `id` and `step_scores`; for candidates also their `scores`, the `best` one's index
and `errors`: a candidate that is empty or too long for the model has an error there and null
scores, and is not the best. A line that cannot be scored has `error` instead, and scoring goes on.
Started again after it was stopped, on any number of ranks, it scores what is left.
"""

from dreamprm_dist.evaluation.score_file import ScoreConfig, score_file
from dreamprm_dist.flags import parse_args, run


def main() -> None:
    (config,) = parse_args((ScoreConfig,), None, "Score solutions: JSONL in, JSONL out.")
    print(score_file(config), end="")


if __name__ == "__main__":
    run(main)
