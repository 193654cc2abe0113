"""The PRM as a web service: a page to try it on, and `POST /v1/score` for programs.

    python launch/serve.py --model runs/instance_table/export
    curl -s localhost:8000/v1/score -H 'Content-Type: application/json' \\
      -d '{"question": "Is 7 even?", "candidates": ["7 is odd.\\n\\nAnswer: no", "Answer: yes"]}'

Only this machine can reach it unless `--host` says otherwise; it knows no users and no passwords.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dreamprm_dist import PRM
from dreamprm_dist.config import flag, parse_args


@dataclass
class ServeConfig:
    """Everything `launch/serve.py` is told."""

    model: str = flag("./weights/export", "Local folder or hub name of the PRM.")
    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's.")
    port: int = flag(8000, "Port to listen on; 0: any free one.")
    max_patch_num: int = flag(12, "Most tiles of an image, thumbnail not counted.")
    score_over: Literal["vocabulary", "pair"] = flag(
        "vocabulary", "Softmax over all words, or over + and - alone as VisualPRM does."
    )
    precision: Literal["bf16", "fp32"] = flag("bf16", "Parameters and activations.")
    device: Literal["auto", "cuda", "cpu"] = flag("auto", "auto: cuda where there is one.")

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda, but torch sees no GPU; use --device cpu")


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((ServeConfig,), argv, "Serve a PRM over HTTP.")
    try:
        import uvicorn

        from dreamprm_dist.serving.app import create_app
    except ImportError as error:
        raise ValueError(f"{error}; install what it takes: pip install -e .[serve]") from error
    prm = PRM.from_pretrained(
        config.model,
        precision=config.precision,
        device=None if config.device == "auto" else config.device,
        max_patch_num=config.max_patch_num,
        score_over=config.score_over,
    )
    path = Path(config.model).resolve()
    name = path.parent.name if path.name == "export" else path.name
    # A client that sends nothing for a while loses its connection and not the service.
    uvicorn.run(create_app(prm, name), host=config.host, port=config.port, timeout_keep_alive=30)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
