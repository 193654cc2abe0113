"""The PRM as a web service: a page to try it on, and `POST /v1/score` for programs.

    python launch/serve.py --model runs/instance_table/export
    curl -s localhost:8000/v1/score -H 'Content-Type: application/json' \\
      -d '{"question": "Is 7 even?", "candidates": ["7 is odd.\\n\\nAnswer: no", "Answer: yes"]}'

Only this machine can reach it unless `--host` says otherwise; it knows no users and no passwords.
"""

from dataclasses import dataclass

from dreamprm_dist import PRM
from dreamprm_dist.errors import InputError
from dreamprm_dist.evaluation.scoring_config import ScoringConfig, prm_name
from dreamprm_dist.flags import flag, parse_args, run


@dataclass
class ServeConfig(ScoringConfig):
    """Everything `launch/serve.py` is told."""

    model: str = flag("./weights/export", "Local folder, run folder or hub name of the PRM.")
    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0: all of this machine's.")
    port: int = flag(8000, "Port to listen on; 0: any free one.")


def main(argv: list[str] | None = None) -> None:
    (config,) = parse_args((ServeConfig,), argv, "Serve a PRM over HTTP.")
    try:
        import uvicorn

        from dreamprm_dist.serving.app import create_app
    except ImportError as error:
        raise InputError(f"{error}; install what it takes: pip install -e .[serve]") from error
    app = create_app(config.load(PRM, config.model), prm_name(config.model))
    # A client that sends nothing for a while loses its connection and not the service.
    uvicorn.run(app, host=config.host, port=config.port, timeout_keep_alive=30)


if __name__ == "__main__":
    run(main)
